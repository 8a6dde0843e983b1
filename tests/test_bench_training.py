"""The benchmarks of training: both sides take the same steps, and the rows say what the turns were."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mome_utils import bench_gpu, bench_kd, bench_sides, bench_sweep
from mome_utils.bench_sides import Side, Turn, Worker
from mome_utils.config import MomeError, Shape
from mome_utils.models import build_gpt2

TINY = dict(teacher=Shape(2, 16, 2), student=Shape(1, 8, 2), vocabulary=40, block=12, batch=2)


def losses_of(side: Side, folder, steps: int = 30) -> list[float]:
    """Cross-entropies of a side's first steps, taken in this process."""
    answers = io.StringIO()

    def gate() -> bench_sides._Gate:
        return bench_sides._Gate(io.StringIO(f"{steps}\n"), answers)

    with pytest.raises(SystemExit):  # nobody asks for a second turn
        if side.loop == "ours":
            bench_sides._run_ours(side, gate, folder)
        else:
            bench_sides._run_textbook(side, gate)
    found: list[float] = json.loads(answers.getvalue())["losses"]
    return found


@pytest.mark.parametrize("work", ["kd", "ce"])
@pytest.mark.parametrize("network", ["library", "ours"])
def test_the_textbook_takes_the_steps_that_our_trainer_takes(work, network, tmp_path):
    ours = losses_of(Side("ours", work, **TINY), tmp_path)
    book = losses_of(Side("textbook", work, network=network, **TINY), tmp_path)
    assert ours == pytest.approx(book, abs=2e-3)  # the cache is rounded to bfloat16
    assert min(ours) < ours[0] - 0.1 and len(ours) == 30  # they learned: equal gradients, not only equal starts


def test_operations_are_those_that_torch_counts():
    side = Side("textbook", "kd", **TINY)
    counted = []
    for shape in (side.student, side.teacher):
        model = build_gpt2(shape, vocab_size=side.vocabulary, block_size=side.block, seed=0, bos=1, eos=2)
        ids = torch.zeros(side.batch, side.block, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(ids)
        counted.append(counter.get_total_flops())
    assert side.flops() == 3 * counted[0] + counted[1]
    head = 2 * side.vocabulary * side.teacher.width * side.batch * side.block
    assert replace(side, loop="ours").flops() == 3 * counted[0] + head
    assert replace(side, work="ce").flops() == 3 * counted[0]


def test_a_worker_works_when_told_to_and_says_why_it_ended():
    with Worker(Side("textbook", "ce", **TINY)) as worker:
        first, second = worker.turn(2), worker.turn(3)
        assert len(first.losses) == 2 and len(second.losses) == 3
        assert min(second.seconds, second.cpu_seconds) > 0
    with Worker(Side("ours", "kd", divergence="none", **TINY)) as worker:
        with pytest.raises(MomeError, match="The process of 'ours, eager' ended: .*Unknown divergence 'none'"):
            worker.turn(1)


class Scripted:
    """A worker that takes prescribed times."""

    seconds = {"ours, eager": (9.0, 1.0, 2.0, 1.0), "textbook, eager": (9.0, 4.0, 4.0, 4.0)}
    shift = 0.0

    def __init__(self, side: Side) -> None:
        self.side = side
        self.left = iter(self.seconds.get(side.name, (9.0, 3.0, 3.0, 3.0)))

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def turn(self, steps: int) -> Turn:
        seconds = next(self.left)
        loss = 1.0 + (self.shift if self.side.loop == "ours" else 0)
        peak = 10**6 * (2 if self.side.loop == "ours" else 6)
        return Turn(100 * seconds, seconds, (loss,) * steps, peak)


def test_rows_are_medians_without_the_turn_to_warm_up(monkeypatch):
    monkeypatch.setattr(bench_kd, "Worker", Scripted)
    monkeypatch.setattr(bench_kd, "matrix_rate", lambda *_: 1e3)
    rows = bench_kd.kd(rounds=3, steps=5, compiled=False, **TINY)
    others = [row["against"] for row in rows]
    assert others == ["kd, textbook, eager", "kd, textbook, eager, our network", "kd, ours, eager"]
    first = rows[0]
    assert (first["ratio"], first["lowest"], first["highest"], first["rounds"]) == (4, 2, 4, 3)
    assert first["tokens_per_s"] == 5 * 2 * 12 and first["against_tokens_per_s"] == 5 * 2 * 12 / 4
    assert (first["memory_mb"], first["against_memory_mb"], first["memory_ratio"]) == (2, 6, 3)
    assert first["matrix_rate"] == pytest.approx(Side("ours", "kd", **TINY).flops() * 5 / 1e3)
    assert rows[1]["ratio"] == 3 and rows[2]["measured"] == "ce, ours, eager"
    assert bench_kd.large(rounds=3, works=["ce"])[0]["memory_ratio"] == 3
    Scripted.seconds, seconds = {}, Scripted.seconds
    # Several threads: the time that passes counts.
    assert bench_kd.ce(rounds=1, steps=1, compiled=False, threads=2, **TINY)[0]["tokens_per_s"] == 24 / 300
    Scripted.seconds = seconds


def test_sides_that_compute_something_else_are_not_compared(monkeypatch):
    monkeypatch.setattr(bench_kd, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "shift", 0.2)
    with pytest.raises(MomeError, match="up to 0.2 nats apart"):
        bench_kd.kd(rounds=1, compiled=False, **TINY)
    for wrong in (dict(rounds=0), dict(steps=0)):
        with pytest.raises(MomeError, match="one (round|step) or more, not 0"):
            bench_kd.kd(**wrong)


def test_without_a_compiler_both_run_eagerly_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(bench_kd, "Worker", Scripted)
    monkeypatch.setattr(bench_kd, "compiler", lambda: False)
    rows = bench_kd.ce(rounds=1, steps=1, **TINY)
    assert not any("compiled" in row["against"] for row in rows)
    assert capsys.readouterr().err == "There is no C++ compiler here: both loops run eagerly only.\n"


SMOKE = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "student_batch": 4, "teacher_batch": 4, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
    "evaluations": 1,
}


def test_both_sides_of_a_sweep_train_the_same_students(tmp_path, monkeypatch):
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    request = {"profile": "smoke", "overrides": SMOKE, "steps": 12, "workers": 1, "arms": ["fixed"], "seeds": [0, 1]}
    assert bench_sweep._prepare(request) == []
    ours, book = bench_sweep._ours(request), bench_sweep._textbook(request)
    assert len(ours) == 2 and ours == pytest.approx(book, abs=2e-3)
    assert ours == bench_sweep._ours(request)  # nothing of the first round is left


def test_a_sweep_is_timed_in_turn(monkeypatch):
    now, order = [0.0], []

    def side(name, request, folder):
        order.append(name)
        now[0] += {"prepare": 100.0, "ours": 2.0, "textbook": 12.0}[name]
        return [3.0, 4.0] if name == "ours" else [3.0, 4.25]

    monkeypatch.setattr(bench_sweep, "_side", side)
    monkeypatch.setattr(bench_sweep.time, "perf_counter", lambda: now[0])
    (row,) = bench_sweep.sweep(rounds=2, steps=10)
    assert order == ["prepare", "ours", "textbook", "ours", "textbook"]
    assert (row["runs"], row["ratio"], row["difference"], row["ours_s"]) == (6, 6.0, 0.25, 2.0)
    assert row["tokens_per_s"] == 6 * 10 * 4 * 128 / 2
    with pytest.raises(MomeError, match="one round and one step"):
        bench_sweep.sweep(rounds=0)


def test_the_benchmark_of_a_gpu_runs_on_small_sizes():
    small = {"teacher": [2, 32, 2], "student": [1, 16, 2], "expert": [1, 16, 2], "vocab_size": 64, "block_size": 16,
             "stride": 8, "compile": False}
    rows = bench_gpu.gpu(rounds=2, device="cpu", sequences=4, matrix=64, least_seconds=0.01, overrides=small)
    assert [row["measured"] for row in rows] == [
        "teacher training", "distillation, cached teacher", "ple, mixed batch", "jeet, mixed batch",
        "moe_ce, mixed batch",
    ]
    assert all(row["tokens_per_s"] > 0 and row["lowest"] <= row["ratio"] <= row["highest"] for row in rows)
    assert rows[0]["matrix_rate"] > 0 and rows[1]["matrix_rate"] > 0 and rows[1]["against"] == "teacher in each step"
    with pytest.raises(MomeError, match="multiple of 4 sequences"):
        bench_gpu.gpu(sequences=6)
