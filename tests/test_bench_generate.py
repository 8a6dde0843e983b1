"""The benchmark of generation: both ways write the same tokens, and what it writes has a form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mome_utils import bench, bench_generate
from mome_utils.config import MomeError, Shape
from mome_utils.moe import MomeForCausalLM

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    root=ROOT, prompts=(1, 6), new_tokens=5, shape=Shape(1, 16, 2), vocabulary=300, block=32, topics=12,
    least_seconds=0.0,
)


def test_a_mixed_batch_is_timed_against_one_prompt_after_the_other(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    found = bench.run_benchmark("generate", tmp_path / "generate.json", tell=rows.append, rounds=2, **TINY)
    assert found == rows and [(row["variant"], row["prompts"]) for row in rows] == [
        ("ple", 1), ("ple", 6), ("jeet", 1), ("jeet", 6)
    ]
    for row in rows:
        assert (row["new_tokens"], row["vocabulary"], row["rounds"]) == (5, 300, 2)
        assert row["textbook_ms"] > 0 and row["ours_ms"] > 0 and 0 < row["lowest"] <= row["ratio"] <= row["highest"]
    content = json.loads((tmp_path / "generate.json").read_text(encoding="utf-8"))
    assert [row["prompts"] for row in content["rows"]] == [1, 6, 1, 6]


def test_the_batch_mixes_languages_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    textbook = bench_generate.textbook

    def noted(pipeline, experts, batch, new_tokens):  # type: ignore[no-untyped-def]
        texts = [" ".join(map(str, ids.tolist())) for ids in batch]
        seen.append((tuple(map(len, batch)), tuple(pipeline.predict(texts))))
        return textbook(pipeline, experts, batch, new_tokens)

    monkeypatch.setattr(bench_generate, "textbook", noted)
    list(bench_generate.generate(rounds=1, **TINY | dict(prompts=(6,), variants=("jeet",))))
    lengths, routes = seen[0]
    assert len(set(lengths)) > 2 and max(lengths) <= 27 and len(set(routes)) > 1


def test_other_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = MomeForCausalLM.generate

    def other(model: MomeForCausalLM, ids: torch.Tensor, **options: object) -> torch.Tensor:
        found = generate(model, ids, **options)
        found[0, -1] += 1
        return found

    monkeypatch.setattr(MomeForCausalLM, "generate", other)
    monkeypatch.setattr(bench_generate, "alternate", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(MomeError, match="continues 1 prompts otherwise than its experts do alone"):
        list(bench_generate.generate(rounds=1, **TINY))


def test_wrong_requests_get_one_sentence() -> None:
    with pytest.raises(MomeError, match="one round, one prompt and one new token or more"):
        bench_generate.generate(rounds=0, **TINY)
    with pytest.raises(MomeError, match="A block of 32 tokens has no room for 20 new ones"):
        bench_generate.generate(rounds=1, **TINY | dict(new_tokens=20))
    with pytest.raises(MomeError, match="too few documents for 80 prompts"):
        bench_generate.generate(rounds=1, **TINY | dict(prompts=(80,)))
    with pytest.raises(MomeError, match="choose ple or jeet"):
        list(bench_generate.generate(rounds=1, **TINY | dict(variants=("moe_ce",))))
