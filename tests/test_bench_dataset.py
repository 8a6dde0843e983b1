"""The benchmark of the data set: both ways make the same blocks, and what it writes has a form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import are_progress_bars_disabled, enable_progress_bars

from mome_utils import bench, bench_dataset
from mome_utils.balance import SPLITS
from mome_utils.config import MomeError, load_profile
from mome_utils.corpus import load_corpus
from mome_utils.dataset import StudyData, build_dataset
from mome_utils.tokenization import encode, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(root=ROOT, topics=12, vocabulary=300, block=64, max_diff_percent=30.0, least_seconds=0.0)


def test_both_ways_of_the_textbook_are_timed_against_ours() -> None:
    enable_progress_bars()
    rows = list(bench_dataset.dataset(rounds=1, **TINY))
    assert [row["textbook"] for row in rows] == ["by document", "by batch"]
    for row in rows:
        assert (row["documents"], row["tokens"], row["rounds"]) == (48, 64, 1) and row["blocks"] > 100
        assert row["textbook_s"] > 0 and row["ours_s"] > 0 and 0 < row["lowest"] <= row["ratio"] <= row["highest"]
    assert not are_progress_bars_disabled()


def test_what_is_timed_is_the_data_set_of_the_study(tmp_path: Path) -> None:
    sizes = dict(topics=20, vocab_size=300, block_size=64, stride=32, max_diff_percent=30.0)
    profile = load_profile("smoke", sizes | dict(validation_fraction=0.1, test_fraction=0.1))
    corpus = load_corpus("embedded", topics=20, root=ROOT)
    build_dataset(corpus, profile, tmp_path / "data")
    data = StudyData.load(tmp_path / "data")
    found = bench_dataset.ours(corpus, data.tokenizer, 64, 30.0)
    assert set(found) == {(split, code) for split in SPLITS for code in corpus.languages}
    for (split, code), blocks in found.items():
        np.testing.assert_array_equal(blocks, data.block_array(split, code))


def test_the_textbook_cuts_the_longest_documents_and_leaves_out_no_token_within_a_language() -> None:
    corpus = load_corpus("embedded", topics=20, root=ROOT)
    tokenizer = train_tokenizer([d.text for d in corpus.documents], 300)
    own = {code: corpus.of_language(code) for code in corpus.languages}
    cut = bench_dataset.balanced(own, tokenizer, 30.0)
    sizes = {code: sum(len(ids) + 2 for ids in encode(tokenizer, list(texts.values()))) for code, texts in cut.items()}
    assert max(sizes.values()) <= 1.3 * min(sizes.values())
    for code, texts in cut.items():
        assert all(d.text.startswith(texts[d.id]) for d in own[code])
        blocks = bench_dataset.grouped(list(texts.values()), tokenizer, 64, batched=True)
        assert len(blocks) == sizes[code] // 64 and blocks[0, 0] == tokenizer.bos_token_id


def test_other_blocks_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def other(*arguments: object, **options: object) -> np.ndarray:
        return grouped(*arguments, **options) + 1

    grouped = bench_dataset.grouped
    monkeypatch.setattr(bench_dataset, "grouped", other)
    monkeypatch.setattr(bench_dataset, "alternate", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(MomeError, match="textbook's train blocks of en are others than ours"):
        bench.run_benchmark("dataset", tmp_path / "dataset.json", rounds=1, **TINY)
    assert not list(tmp_path.iterdir())
    with pytest.raises(MomeError, match="one round or more, not 0"):
        bench_dataset.dataset(rounds=0, **TINY)
