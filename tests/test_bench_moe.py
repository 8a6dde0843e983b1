"""The benchmark of the mixture: what it times is equal, what it writes has a form."""

from __future__ import annotations

import pytest
import torch

from mome_utils import bench, bench_moe
from mome_utils.config import MomeError, Shape
from mome_utils.moe_config import VARIANTS

torch.set_num_threads(1)
TINY = dict(sizes=((Shape(1, 16, 2), 64, 24),), sequences=8, new_tokens=4, least_seconds=0.0)


def test_every_variant_and_work_is_timed_against_equal_work():
    rows = list(bench_moe.moe(rounds=2, **TINY))
    assert [(row["variant"], row["work"]) for row in rows] == [("none", "forward"), ("none", "training")] + [
        (variant, work) for variant in VARIANTS for work in ("forward", "training", "token")
    ] + [("moe_ce", "token, one expert")]
    for row in rows:
        assert (row["layers"], row["width"], row["vocabulary"], row["rounds"]) == (1, 16, 64, 2)
        assert row["difference"] < 1e-4 and row["moe_ms"] > 0 and row["without_ms"] > 0
        assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]


def test_the_benchmark_is_known_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_moe, "moe", lambda **options: [options])
    [row] = bench.run_benchmark("moe", tmp_path / "moe.json", root=tmp_path.name, rounds=3)
    assert row == {"root": tmp_path.name, "rounds": 3} and (tmp_path / "moe.json").is_file()


def test_rows_come_as_soon_as_they_are_measured(monkeypatch, tmp_path):
    def stopped(*arguments):
        assert [row["work"] for row in told] == ["forward"]
        raise KeyboardInterrupt

    told = []
    monkeypatch.setattr(bench_moe, "_training", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run_benchmark("moe", tmp_path / "moe.json", tell=told.append, rounds=1, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_what_computes_something_else_is_not_timed(monkeypatch):
    plain = bench_moe.expert_alone

    def other(*arguments, **options):
        model = plain(*arguments, **options)
        model.transformer.ln_f.bias.data += 1
        return model

    monkeypatch.setattr(bench_moe, "expert_alone", other)
    with pytest.raises(MomeError, match="computes something else than what it is compared with"):
        list(bench_moe.moe(rounds=1, **TINY))


def test_wrong_numbers_get_one_sentence():
    with pytest.raises(MomeError, match="one round or more"):
        bench_moe.moe(rounds=0, **TINY)
    with pytest.raises(MomeError, match="multiple of 4 sequences, not 9"):
        bench_moe.moe(rounds=1, **TINY | dict(sequences=9))
