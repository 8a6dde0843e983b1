"""``mome bench similarity``: what the measures of similarity cost, in time and in memory.

Two models of equally many layers are compared layer by layer by every measure; each layer's view is computed once,
as :func:`mome_utils.similarity.compare_layers` does it. A last row compares far more inputs than a matrix of pairs
could hold, by CKA in minibatches that are made as they are needed.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mome_utils.bench import one_thread
from mome_utils.config import MomeError
from mome_utils.similarity import MEASURES, compare, compare_layers, minibatch_cka
from mome_utils.similarity_inputs import Array

__all__ = ["batches", "similarity"]


def similarity(
    *, root: Path, rounds: int = 3, inputs: int = 1000, dimensions: int = 256, layers: int = 4,
    many_inputs: int = 100_000, batch: int = 1000, seed: int = 0,
) -> list[dict[str, Any]]:
    """Every measure on all layer pairs of two models, and CKA of many inputs in minibatches.

    Args:
        root: the project's folder (not read: the representations are random).
        rounds: how often each measure is timed; the measures take turns.
        inputs, dimensions, layers: of each model. many_inputs, batch: of the minibatches. seed: of the numbers.

    Returns:
        For each measure: milliseconds (medians over the rounds) of one pair of layers by itself and, with views shared,
        of each of the layers² pairs; the peak of allocated memory in one comparison, the inputs apart, in megabytes and
        in n × n matrices of float64; and the difference from the exact value, which minibatches only come near to.

    Raises:
        MomeError: fewer rounds than one, or a batch that does not divide the inputs.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    if many_inputs % batch:
        raise MomeError(f"Batches of {batch} do not divide {many_inputs} inputs: give sizes that do.")
    generator = np.random.default_rng(seed)
    models = [[generator.normal(size=(inputs, dimensions)) for _ in range(layers)] for _ in range(2)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURES}
    with one_thread(), threadpool_limits(1):
        for _ in range(rounds):
            for name, found in times.items():
                single = _seconds(lambda name=name: compare(name, models[0][0], models[1][0]))  # type: ignore[misc]
                whole = _seconds(lambda name=name: compare_layers(name, *models))  # type: ignore[misc]
                found.append((single, whole / layers**2))
        rows = []
        for name, found in times.items():
            peak = _peak(lambda name=name: compare(name, models[0][0], models[1][0]))  # type: ignore[misc]
            single, shared = (1000 * float(np.median(column)) for column in zip(*found, strict=True))
            rows.append(_row(name, inputs, dimensions, single, shared, peak, 0.0))
        rows.append(_minibatches(many_inputs, dimensions, batch, rounds, seed))
    return rows


def _row(
    name: str, inputs: int, dimensions: int, single: float, shared: float, peak: int, difference: float
) -> dict[str, Any]:
    return {
        "measure": name, "inputs": inputs, "dimensions": dimensions, "pair_ms": single, "of_all_layers_ms": shared,
        "peak_mb": peak / 1e6, "square_matrices": peak / (8 * inputs**2), "difference": difference,
    }


def batches(inputs: int, dimensions: int, size: int, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """Pairs of related random representations [size, dimensions], made one at a time, ``inputs`` rows in all."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    for _ in range(inputs // size):
        first = generator.normal(size=(size, dimensions))
        yield first, first @ mix + generator.normal(size=(size, dimensions))


def _minibatches(inputs: int, dimensions: int, size: int, rounds: int, seed: int) -> dict[str, Any]:
    """CKA in minibatches: its time, its memory with the batches, and how far it is from all rows at once."""
    seconds = [_seconds(lambda: minibatch_cka(batches(inputs, dimensions, size, seed))) for _ in range(rounds)]
    value = minibatch_cka(batches(inputs, dimensions, size, seed))
    peak = _peak(lambda: minibatch_cka(batches(inputs, dimensions, size, seed)))
    whole = [np.concatenate(side) for side in zip(*batches(inputs, dimensions, size, seed), strict=True)]
    difference = value - compare("debiased_cka", *whole)
    milliseconds = 1000 * float(np.median(seconds))
    return _row("minibatch_cka", inputs, dimensions, milliseconds, milliseconds, peak, difference)


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _peak(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once during the call, counted from its beginning."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
