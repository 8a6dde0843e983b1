"""The benchmark of similarity: its rows, and CKA of a hundred thousand inputs in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from mome_utils import bench
from mome_utils.__main__ import main
from mome_utils.bench_similarity import batches, similarity
from mome_utils.config import MomeError
from mome_utils.similarity import MEASURES, compare, minibatch_cka

TINY = dict(root=Path("."), inputs=30, dimensions=5, layers=2, many_inputs=400, batch=100)


def test_every_measure_has_a_row_and_minibatches_have_one() -> None:
    rows = similarity(rounds=1, **TINY)
    assert [row["measure"] for row in rows] == [*MEASURES, "minibatch_cka"]
    assert all(row["pair_ms"] >= 0 and row["peak_mb"] > 0 for row in rows)
    assert rows[-1]["inputs"] == 400 and abs(rows[-1]["difference"]) < 0.02


def test_the_batches_are_the_rows_of_one_representation() -> None:
    parts = list(batches(60, 4, 20))
    assert [x.shape for x, _ in parts] == [(20, 4)] * 3
    assert minibatch_cka(parts[:1]) == pytest.approx(compare("debiased_cka", *parts[0]))


def test_a_hundred_thousand_inputs_fit_in_a_gigabyte() -> None:
    tracemalloc.start()
    value = minibatch_cka(batches(100_000, 16, 2000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # a square matrix would take 80 GB
    assert value == pytest.approx(minibatch_cka(batches(20_000, 16, 2000)), abs=0.02)


def test_it_is_a_command_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench, "BENCHMARKS", {"similarity": lambda root, rounds: similarity(rounds=rounds, **TINY)})
    out = tmp_path / "similarity.json"
    assert main(["bench", "similarity", "--rounds", "1", "--out", str(out)]) == 0
    assert "square matrices" in capsys.readouterr().out.splitlines()[0]
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["benchmark"] == "similarity" and len(content["rows"]) == len(MEASURES) + 1


def test_wrong_requests_get_one_sentence() -> None:
    with pytest.raises(MomeError, match="one round or more, not 0"):
        similarity(rounds=0, **TINY)
    with pytest.raises(MomeError, match="Batches of 7 do not divide 400 inputs"):
        similarity(rounds=1, **TINY | dict(batch=7))
