"""Benchmarks: what they time is equal, what they write has a form. How fast anything is, is not tested."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path

import pytest
import torch

from mome_utils import bench
from mome_utils.__main__ import main
from mome_utils.config import MomeError

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(root=ROOT, vocabularies=(280, 600), sequences=9, length=64, topics=3, least_seconds=0.0)


def test_two_functions_are_timed_in_turn():
    order, ticks = [], map(float, count())
    times = bench.alternate(
        lambda: order.append("a"), lambda: order.append("b"), rounds=3, least_seconds=0, clock=lambda: next(ticks)
    )
    assert order == ["a", "a", "b", "b", *"ababab"]  # twice to warm up, then in turn
    assert times.first == times.second == (1, 1, 1) and times.ratios == (1, 1, 1)
    assert bench.Alternation((3.0, 8.0), (1.5, 2.0)).ratios == (2.0, 4.0)
    with pytest.raises(MomeError, match="one round or more, not 0"):
        bench.alternate(int, int, rounds=0)


def test_short_calls_are_repeated_until_they_fill_the_time():
    now, calls = [0.0], {"slow": 0, "fast": 0}

    def work(name: str, seconds: float) -> None:
        calls[name] += 1
        now[0] += seconds

    times = bench.alternate(
        lambda: work("slow", 1.0), lambda: work("fast", 0.125), rounds=2, least_seconds=0.5, clock=lambda: now[0]
    )
    assert calls == {"slow": 2 + 2, "fast": 2 + 2 * 4}
    assert times.first == (1, 1) and times.second == (0.125, 0.125) and times.ratios == (8, 8)


def test_threads_are_as_before_after_a_benchmark_and_after_an_error():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with bench.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError), bench.one_thread():
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_router_benchmark_times_equal_decisions():
    rows = bench.router(rounds=2, **TINY)
    assert [row["vocabulary"] for row in rows] == [280, 600]
    for row in rows:
        assert (row["sequences"], row["tokens"], row["rounds"]) == (8, 64, 2)
        assert row["logit_difference"] < 1e-10 and row["published_ms"] > 0 and row["router_ms"] > 0
        assert 0 < row["lowest"] <= row["ratio"] <= row["highest"]


def test_too_little_text_is_one_sentence():
    with pytest.raises(MomeError, match=r"sequences of 64 tokens in \w+, too few for a batch of 4000"):
        bench.router(rounds=1, **TINY | dict(sequences=4000))
    with pytest.raises(MomeError, match="one in each language at least"):
        bench.router(rounds=1, **TINY | dict(sequences=3))


def test_a_router_that_decides_differently_is_not_timed(monkeypatch):
    def other(*arguments: object, **options: object) -> object:
        router = bench_from_sklearn(*arguments, **options)
        router.bias[0] += 100
        return router

    bench_from_sklearn = bench.from_sklearn
    monkeypatch.setattr(bench, "from_sklearn", other)
    monkeypatch.setattr(bench, "alternate", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(MomeError, match=r"differently from the published pipeline on [1-8] of 8 sequences"):
        bench.router(rounds=1, **TINY)


def test_the_machine_is_described_without_names_of_places_or_people():
    facts = bench.machine()
    assert facts["cores"] == os.cpu_count() and facts["torch"] == torch.__version__ and facts["processor"]
    text = json.dumps(facts)
    assert "/" not in text.replace("N/A", "") and os.uname().nodename not in text


def test_a_benchmark_is_written_as_json_and_shown_as_a_table(tmp_path, capsys, monkeypatch):
    small = {"router": lambda root, rounds: bench.router(rounds=rounds, **TINY)}
    monkeypatch.setattr(bench, "BENCHMARKS", small)
    out = tmp_path / "new" / "router.json"
    assert main(["bench", "router", "--rounds", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "vocabulary" and "logit difference" in lines[0] and len(lines) == 3
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["benchmark"] == "router" and content["machine"] == bench.machine()
    assert [row["vocabulary"] for row in content["rows"]] == [280, 600] and content["rows"][0]["rounds"] == 2
    assert f"{content['rows'][1]['ratio']:,}" in lines[2].split()
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_numbers_of_a_table_stand_below_each_other():
    rows = [{"name": "a", "token_count": 32_000, "ratio": 123.456}, {"name": "bb", "token_count": 5, "ratio": 0.5}]
    assert bench.table(rows) == "name  token count  ratio\n   a       32,000  123.5\n  bb            5    0.5"


def test_wrong_requests_get_one_sentence(tmp_path, capsys):
    assert main(["bench", "rooter", "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "mome: There is no benchmark 'rooter': choose one of router, moe, similarity.\n"
    assert main(["bench", "router", "--rounds", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert "one round or more" in capsys.readouterr().err
    assert main(["bench", "router", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_lie_with_the_project_by_default(tmp_path, monkeypatch):
    def noted(root: Path, rounds: int) -> list[dict[str, object]]:
        return [{"rounds": rounds, "there": root == tmp_path}]

    monkeypatch.setattr(bench, "BENCHMARKS", {"router": noted})
    monkeypatch.setattr("mome_utils.places.project_root", lambda: tmp_path)
    assert main(["bench", "router"]) == 0
    content = json.loads((tmp_path / "data/benchmarks/router.json").read_text(encoding="utf-8"))
    assert content["rows"] == [{"rounds": 7, "there": True}]
