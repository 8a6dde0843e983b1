"""``mome bench kd``, ``ce`` and ``large``: a training step of this package next to a textbook's.

The two sides, and why each has a process of its own: :mod:`mome_utils.bench_sides`. All sides of a benchmark stay
warm and take their turns one after the other, A B C A B C …; each round gives one ratio. With one thread, what is
counted is the time that a process computes, whatever else the machine does; with several, the time that passes. No
side validates or saves anything: a benchmark ends before the first validation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mome_utils.bench_sides import Side, Turn, Worker
from mome_utils.compilation import compiler
from mome_utils.config import MomeError, load_profile
from mome_utils.runs import torch_threads
from mome_utils.training import resolve_dtype

__all__ = ["LARGE", "ce", "kd", "large", "matrix_rate"]

#: Vocabulary, tokens of a sequence and sequences of a step at which ``large`` looks at the memory.
LARGE = (32_000, 1024, 8)
#: Nats that the losses of two sides may be apart in their first steps: bfloat16 rounds each side elsewhere.
TOLERANCE = 0.05


def kd(
    *, root: Path | None = None, rounds: int = 5, steps: int = 40, compiled: bool = True, **sizes: Any
) -> list[dict[str, Any]]:
    """A distillation step with a cached teacher against the textbook's, and against our own step without a teacher.

    Args:
        root: not needed; every benchmark takes it.
        rounds: how often each side has its turn. steps: of a turn.
        compiled: also compare both under ``torch.compile``, where there is a C++ compiler.
        sizes: fields of :class:`~mome_utils.bench_sides.Side` to replace; by default the shapes, batch, dtype and
            threads of the profile ``laptop``.

    Returns:
        A row for each comparison: tokens per second of both (medians over the rounds), their ratio (median, lowest
        and highest round), the most memory above the weights (MB; a compiled loop's holds its compiler too), the
        fraction of this machine's rate of matrix products that the step's own products make up, and the largest
        difference between the cross-entropies of both (nats) in their first steps.

    Raises:
        MomeError: a size that cannot be, a side that ended, or losses that are further apart than rounding explains.
    """
    return _training("kd", rounds, steps, compiled, sizes)


def ce(
    *, root: Path | None = None, rounds: int = 5, steps: int = 40, compiled: bool = True, **sizes: Any
) -> list[dict[str, Any]]:
    """A step of plain language modelling against the textbook's; arguments, rows and errors as in :func:`kd`."""
    return _training("ce", rounds, steps, compiled, sizes)


def _training(work: str, rounds: int, steps: int, compiled: bool, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
    _check(rounds, steps)
    ours = Side("ours", work, **_laptop() | dict(sizes))
    book, fast = replace(ours, loop="textbook"), replace(ours, compiled=True)
    pairs = [(ours, book), (ours, replace(book, network="ours"))]
    if compiled and compiler():
        compiled_book = replace(book, compiled=True)
        pairs += [(ours, compiled_book), (fast, compiled_book), (fast, ours)]
    elif compiled:
        print("There is no C++ compiler here: both loops run eagerly only.", file=sys.stderr)
    if work == "kd":  # the teacher's part of a step: how many times faster is a step without it
        pairs.append((replace(ours, work="ce"), ours))
    turns = _in_turn(list(dict.fromkeys(side for pair in pairs for side in pair)), rounds, steps)
    rate = matrix_rate(ours.dtype, ours.threads)
    return [
        _row(first, turns[first], second, turns[second], rate, compare=first.work == second.work)
        for first, second in pairs
    ]


def large(
    *, root: Path | None = None, rounds: int = 1, steps: int = 2, works: Sequence[str] = ("kd", "ce"), **sizes: Any
) -> list[dict[str, Any]]:
    """Memory of a step with a large vocabulary and long sequences, :data:`LARGE`, and its time beside it.

    The models have the shapes of the profile ``laptop``: what is looked at is what grows with the vocabulary. Other
    arguments, rows and errors as in :func:`kd`; ``memory_ratio`` is the textbook's memory over ours.
    """
    _check(rounds, steps)
    vocabulary, block, batch = LARGE
    rows = []
    for work in works:
        settings = _laptop() | dict(vocabulary=vocabulary, block=block, batch=batch) | sizes
        ours = Side("ours", work, **settings)
        book = replace(ours, loop="textbook")
        turns: dict[Side, list[Turn]] = {}
        for side in (ours, book):  # one after the other: together they might not fit
            turns |= _in_turn([side], rounds, steps)
        rows.append(_row(ours, turns[ours], book, turns[book], matrix_rate(ours.dtype, ours.threads)))
    return rows


def _check(rounds: int, steps: int) -> None:
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    if steps < 1:
        raise MomeError(f"A turn needs one step or more, not {steps}.")


def _laptop() -> dict[str, Any]:
    """Sizes of the study's students on a laptop."""
    profile = load_profile("laptop")
    return dict(
        teacher=profile.teacher, student=profile.student, vocabulary=profile.vocab_size, block=profile.block_size,
        batch=profile.student_batch, dtype=resolve_dtype(profile.dtype), threads=profile.threads,
    )


def matrix_rate(dtype: str, threads: int, *, size: int = 1024, seconds: float = 0.5, device: str = "cpu") -> float:
    """Operations per second of a product of two square matrices, the best of several: what the machine could do."""
    with torch_threads(threads), torch.inference_mode():
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
        times: list[float] = []
        a @ b
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not times:
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
    return 2 * size**3 / min(times)


def _in_turn(sides: Sequence[Side], rounds: int, steps: int) -> dict[Side, list[Turn]]:
    """Turns of each side; the first, before the rounds, is to warm up."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(side)) for side in sides]
        turns = {worker.side: [worker.turn(steps)] for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                turns[worker.side].append(worker.turn(steps))
    return turns


def _seconds(side: Side, turns: Sequence[Turn]) -> list[float]:
    """Of each round, without the turn to warm up."""
    return [turn.cpu_seconds if side.threads == 1 else turn.seconds for turn in turns[1:]]


def _row(
    first: Side, turns: Sequence[Turn], second: Side, others: Sequence[Turn], rate: float, *, compare: bool = True
) -> dict[str, Any]:
    """A comparison of two sides' turns; ``ratio`` says how many times faster the first is."""
    times = [_seconds(side, found) for side, found in ((first, turns), (second, others))]
    ratios = [b / a for a, b in zip(*times, strict=True)]
    steps = len(turns[-1].losses)
    seconds = [float(np.median(found)) / steps for found in times]
    peaks = [max(turn.peak for turn in found[1:]) / 1e6 for found in (turns, others)]
    tokens = first.batch * first.block
    return {
        "measured": f"{first.work}, {first.name}", "against": f"{second.work}, {second.name}",
        "tokens_per_s": tokens / seconds[0], "against_tokens_per_s": tokens / seconds[1],
        "ratio": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios),
        "memory_mb": peaks[0], "against_memory_mb": peaks[1], "memory_ratio": peaks[1] / max(peaks[0], 1e-6),
        "matrix_rate": first.flops() / seconds[0] / rate, "against_matrix_rate": second.flops() / seconds[1] / rate,
        "difference": _difference(first, turns, second, others) if compare else 0.0, "rounds": len(times[0]),
    }


def _difference(first: Side, turns: Sequence[Turn], second: Side, others: Sequence[Turn]) -> float:
    """The largest difference between the cross-entropies of the turns to warm up, after a check that it is small."""
    pairs = zip(turns[0].losses, others[0].losses, strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    if not largest <= TOLERANCE:
        raise MomeError(
            f"The losses of '{first.name}' and '{second.name}' are up to {largest:.2g} nats apart in their first "
            "steps: their times mean nothing until that is repaired."
        )
    return largest
