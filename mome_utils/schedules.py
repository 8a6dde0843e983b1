"""In which order a training run sees its blocks.

A schedule is made before training starts, as plain numbers, so that two runs can be compared batch by batch
and a resumed run sees what the unbroken one would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mome_utils.config import MomeError

ScheduleKind = Literal["balanced", "random", "sequential", "one_language"]


class ScheduleError(MomeError):
    """A schedule that cannot be made."""


def schedule(
    kind: ScheduleKind, lengths: Mapping[str, int], *, steps: int, batch_size: int, seed: int
) -> NDArray[np.int64]:
    """Which block each place of each batch holds.

    Parameters
    ----------
    kind :
        "balanced": every batch has the same number of blocks of each language (the MoME teacher's rule);
        "random": one shuffled pool of all languages;
        "sequential": the languages one after the other in the mapping's order, an equal share of the steps
        each; "one_language": every batch has one language; each round visits all of them in a new random
        order (JEET). Whatever runs out is shuffled anew and starts again.
    lengths : language -> number of blocks (at least 1).
    steps, batch_size : number of batches, blocks in a batch.
    seed : the same seed gives the same schedule; languages are shuffled independently of each other.

    Returns
    -------
    int64 array [steps, batch_size, 2] of (language index in the mapping's order, block index in that
    language).
    """
    languages = list(lengths)
    if not languages or min(lengths.values()) < 1:
        raise ScheduleError(
            "Every language of a schedule needs at least one block; use a smaller block_size."
        )
    if steps < 1 or batch_size < 1:
        raise ScheduleError(
            f"A schedule needs at least one step and one block a batch, not {steps} and {batch_size}."
        )
    sizes = [lengths[code] for code in languages]
    count = len(sizes)
    if kind == "random":
        pool = np.concatenate([_pairs(index, np.arange(size)) for index, size in enumerate(sizes)])
        return pool[_endless(len(pool), steps * batch_size, seed, count)].reshape(steps, batch_size, 2)
    if kind == "balanced":
        if batch_size % count:
            raise ScheduleError(
                f"A balanced batch of {batch_size} cannot hold {count} languages equally; "
                f"use a multiple of {count}."
            )
        share = batch_size // count
        parts = [
            _pairs(i, _endless(size, steps * share, seed, i)).reshape(steps, share, 2)
            for i, size in enumerate(sizes)
        ]
        return np.concatenate(parts, axis=1)
    if kind == "sequential":
        if steps < count:
            raise ScheduleError(
                f"{steps} steps are too few for {count} languages in turn; use at least {count}."
            )
        turns = np.arange(steps) * count // steps
    elif kind == "one_language":
        rng = np.random.default_rng([seed, count + 1])
        rounds = [rng.permutation(count) for _ in range(-(-steps // count))]
        turns = np.concatenate(rounds)[:steps]
    else:
        raise ScheduleError(
            f"There is no schedule {kind!r}; use balanced, random, sequential or one_language."
        )
    result = np.empty((steps, batch_size, 2), dtype=np.int64)
    for index, size in enumerate(sizes):
        mine = turns == index
        blocks = _endless(size, int(mine.sum()) * batch_size, seed, index)
        result[mine] = _pairs(index, blocks).reshape(-1, batch_size, 2)
    return result


def _pairs(language: int, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([np.full(len(blocks), language, dtype=np.int64), blocks.astype(np.int64)], axis=-1)


def _endless(size: int, wanted: int, seed: int, stream: int) -> NDArray[np.int64]:
    """The first `wanted` items of 0..size-1 shuffled again and again: [wanted]."""
    rng = np.random.default_rng([seed, stream])
    rounds = [rng.permutation(size) for _ in range(-(-wanted // size))]
    return np.concatenate([*rounds, np.empty(0, dtype=np.int64)])[:wanted]
