"""What a raw score of similarity is worth: its floor, its ceiling, its place between them, and its uncertainty.

- *Floor*: the score when row i of one model no longer belongs to row i of the other (rows permuted, as published in
  arXiv 2312.02730), and the score of an untrained network. Either says what is left when nothing was learned alike.
- *Ceiling*: the score of two trainings that differ in their seed alone. Nothing that is compared can be asked to be
  more alike than that.
- *Place*: (score − floor) / (ceiling − floor), 0 at the floor and 1 at the ceiling, for similarities and distances.
- *Uncertainty*: a jackknife over topics and seeds. A bootstrap would put the same input twice into a sample; the copies
  are each other's nearest neighbours, and raise every score. Leaving topics out repeats none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, sqrt

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mome_utils.config import MomeError
from mome_utils.intervals import Interval, combine
from mome_utils.similarity import Space, compare_all

__all__ = ["ALL", "Statistic", "jackknife", "permuted", "placed", "topic_folds"]

Statistic = Callable[[pd.DataFrame], float]
#: The ``fold`` of rows in which no topic is left out.
ALL = -1


def permuted(
    x: Space, y: Space, names: Sequence[str] | None = None, *, draws: int = 4, seed: int = 0
) -> dict[str, float]:
    """The floor: mean scores of x and of y with its rows permuted, over ``draws`` permutations.

    Every measure (by default all) sees the same permutations. Some rows may keep their place, as published.
    """
    if draws < 1:
        raise MomeError(f"A floor needs one permutation or more, not {draws}.")
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(draws):
        other = Space(y.values[generator.permutation(len(y))], neighbours=y.neighbours, preprocessing=())
        scores.append(compare_all(x, other, names))
    return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}


def placed(score: float, floor: float, ceiling: float) -> float:
    """Where a score lies between floor (0) and ceiling (1); beyond them it is negative or above one.

    Nan where floor and ceiling are equal: the measure then tells nothing apart.
    """
    return (score - floor) / (ceiling - floor) if ceiling != floor else float("nan")


def topic_folds(topics: Sequence[str], folds: int, seed: int = 0) -> NDArray[np.int64]:
    """A fold for each row [rows], topics dealt out at random and whole: all rows of a topic are left out together.

    Raises:
        MomeError: fewer than two folds, or fewer topics than folds.
    """
    names, places = np.unique(np.asarray(topics), return_inverse=True)
    if folds < 2 or len(names) < folds:
        raise MomeError(f"{len(names)} topics do not make {folds} folds: use 2 folds or more, each with a topic.")
    dealt = np.random.default_rng(seed).permutation(len(names)) % folds
    return np.asarray(dealt[places], dtype=np.int64)


def jackknife(rows: pd.DataFrame, statistic: Statistic, seeds: Sequence[int], *, level: float = 0.95) -> Interval:
    """The interval of any statistic of a table of scores, over topics and seeds (crossed).

    The statistic is computed again without each fold of topics, and without each seed: without a seed, no row that
    involves it. Seeds enter through their pseudo-values S·θ − (S − 1)·θ₍₋ₛ₎, which are the seeds' own values where
    every row belongs to one seed, and which also serve for pairs of seeds (Efron & Stein 1981, The Annals of
    Statistics 9). Topics and seeds are put together as everywhere (:func:`mome_utils.intervals.combine`).

    Args:
        rows: scores; ``fold`` (the fold left out, or ALL for none), ``seed`` and, where a score belongs to two
            trainings, ``seed_b``.
        statistic: maps such a table, of one fold, to a number.
        seeds: all seeds of the study. The statistic may be nan without one of two seeds (a ceiling needs two): seeds
            are then not resampled.

    Raises:
        MomeError: no rows, or a statistic that is not a number on all of them.
    """
    by_fold = {int(fold): part for fold, part in rows.groupby("fold")} if len(rows) else {}
    whole = statistic(by_fold[ALL]) if ALL in by_fold else float("nan")
    if not isfinite(whole):
        raise MomeError("There are no scores to compare: the models, seeds or layers asked for match no rows.")
    folds = sorted(set(by_fold) - {ALL})
    table = [_pseudo_values(by_fold[fold], statistic, seeds) for fold in (ALL, *folds)]
    if any(len(values) != len(seeds) for values in table):
        table = [np.array([statistic(by_fold[fold])]) for fold in (ALL, *folds)]
    point, left_out = table[0], np.array(table[1:])
    count = len(folds)
    if count > 1:
        # combine() expects draws of a bootstrap, whose variance is multiplied by G / (G − 1); the jackknife's is the
        # replicates' sum of squares times (G − 1) / G. So the replicates are spread by (G − 1) / √G.
        left_out = left_out.mean(0) + (left_out - left_out.mean(0)) * (count - 1) / sqrt(count)
    found = combine(point, left_out.reshape(count, len(point)), documents=count, level=level)
    return Interval(whole, found.low - found.estimate + whole, found.high - found.estimate + whole, len(point), count)


def _pseudo_values(rows: pd.DataFrame, statistic: Statistic, seeds: Sequence[int]) -> NDArray[np.float64]:
    """One value for each seed, or none where the statistic needs more seeds than are left."""
    whole, count = statistic(rows), len(seeds)
    if count == 1:
        return np.array([whole])
    second = rows["seed_b"] if "seed_b" in rows.columns else rows["seed"]
    left = [rows[(rows["seed"] != seed) & (second != seed)] for seed in seeds]
    without = np.array([statistic(part) if len(part) else np.nan for part in left])
    return count * whole - (count - 1) * without if np.isfinite(without).all() else np.array([])
