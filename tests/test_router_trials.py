"""How the study trains its router: what it learns from, and that the examination keeps topics apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mome_utils.bakeoff import assign_folds, document_blocks
from mome_utils.config import MomeError
from mome_utils.corpus import Corpus, load_corpus
from mome_utils.router_fit import Crops, fit_router
from mome_utils.router_trials import PUBLISHED, Training, examine, for_short_prompts, train_router
from mome_utils.router_windows import document_windows, window_rows
from mome_utils.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus("embedded", topics=20, root=ROOT)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([document.text for document in corpus.documents], 400)


def _nothing_runs(function, jobs):
    pytest.fail("a fold ran before its input was checked")


def test_the_published_training_is_the_published_router(corpus, tokenizer):
    router = train_router(tokenizer, corpus.documents, 64, PUBLISHED)
    blocks = {g: document_blocks(tokenizer, corpus.of_language(g), 64)[0] for g in corpus.languages}
    plain = fit_router(blocks, len(tokenizer))
    assert router.languages == corpus.languages
    torch.testing.assert_close(router.weight, plain.weight, atol=1e-3, rtol=0)


def test_the_study_learns_from_pieces_and_beginnings():
    training = for_short_prompts(10, {"en": 2.0})
    assert training.crops == (Crops(10, 4, 64), Crops(3, 16, 256, from_start=True))
    assert training.emphasis == {"en": 2.0}
    with pytest.raises(MomeError, match="one piece of each document or more, not 0"):
        for_short_prompts(0)


def test_emphasis_on_languages_that_are_not_there_is_passed_over(corpus, tokenizer):
    with_more, without = (
        train_router(tokenizer, corpus.documents, 64, Training(emphasis=weights)).weight
        for weights in ({"xx": 9.0}, {})
    )
    assert torch.equal(with_more, without)


def test_pieces_help_short_windows_and_cost_nothing_at_full_length(corpus, tokenizer):
    ways = {"published": (tokenizer, PUBLISHED), "ours": (tokenizer, for_short_prompts(8))}
    rows = examine(ways, corpus.documents, 64, [8, 64], folds=2)
    assert rows["trial"].unique().tolist() == list(ways)  # in the order asked for, though the longer one runs first
    scores = rows.groupby(["trial", "size"])["correct"].mean()
    assert scores["ours", 8] > scores["published", 8] + 0.01
    assert scores["ours", 64] > scores["published", 64] - 0.005 and scores["ours", 64] > 0.97


def test_a_fold_without_a_document_as_long_as_a_window_is_passed_over(corpus, tokenizer):
    count = {d.id: len(tokenizer(d.text, add_special_tokens=False)["input_ids"]) for d in corpus.documents}
    longest = max(count.values())
    rows = examine({"": (tokenizer, PUBLISHED)}, corpus.documents, 64, [16, longest], folds=3)
    assert rows[rows["size"] == longest]["fold"].nunique() == 1 and rows[rows["size"] == 16]["fold"].nunique() == 3
    with pytest.raises(MomeError, match=f"No document has {10 * longest} tokens"):
        examine({"": (tokenizer, PUBLISHED)}, corpus.documents, 64, [10 * longest], folds=3, spread=_nothing_runs)


def test_each_window_is_decided_once_by_a_router_that_never_saw_its_topic(corpus, tokenizer):
    training = for_short_prompts(2)
    rows = examine({"": (tokenizer, training)}, corpus.documents, 64, [16], folds=3, seed=4)
    windows = document_windows(tokenizer, corpus.documents, 16)
    assert len(rows) == len(windows) and not rows.duplicated(["topic", "language", "start"]).any()
    assert not any(column.startswith("p_") for column in rows)
    fold_of = assign_folds([document.id for document in corpus.documents], 3, 4)
    assert (rows["fold"] == rows["topic"].map(fold_of)).all()
    seen = [document for document in corpus.documents if fold_of[document.id] != 1]
    router = train_router(tokenizer, seen, 64, training, seed=4)
    own = windows.select(np.array([fold_of[topic] == 1 for topic in windows.topic]))
    again = window_rows(router, own)
    held_out = rows[rows["fold"] == 1]
    assert (held_out["predicted"].to_numpy() == again["predicted"].to_numpy()).all()


def test_the_published_run_reaches_the_goals_at_4096_tokens():
    """The goals of notebook 04 were set for this size; its table is of a full cross-validation of the corpus."""
    table = pd.read_parquet(ROOT / "data" / "results" / "laptop" / "04_router_bakeoff" / "goals.parquet")
    assert table.set_index("windows")["goal"].to_dict() == {
        "16 tokens, prose": 99.3, "16 tokens, all": 98.0, "8 tokens, prose": 97.5, "8 tokens, all": 94.5,
        "128 tokens, F1": 99.95,
    }
    assert (table["4,096 tokens"] >= table["goal"]).all()
