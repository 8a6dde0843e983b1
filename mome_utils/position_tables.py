"""F1 by position, its drop and what a cure wins back, with crossed intervals over seeds and documents.

F1 is a ratio of sums over documents, 2·TP / (2·TP + FP + FN), so documents can be resampled as they are for bits per
byte (:mod:`mome_utils.intervals`). Over several labels it is their mean (macro F1), over spans there is one (micro F1).
All values are in points: per cent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mome_utils.intervals import Interval, IntervalError, crossed_interval

__all__ = ["difference_interval", "drop_interval", "drop_table", "f1_interval", "f1_table", "gain_interval"]


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Counts in the columns that intervals read; labels that the test sentences have."""
    true = rows.groupby(["task", "label"])[["tp", "fn"]].sum().sum(axis=1)
    there = pd.MultiIndex.from_frame(rows[["task", "label"]]).isin(true[true > 0].index)
    rows = rows[there]
    size = 2 * rows["tp"] + rows["fp"] + rows["fn"]
    return rows.assign(nats=2.0 * rows["tp"], tokens=size, bytes=size)


def f1_interval(rows: pd.DataFrame) -> Interval:
    """F1 in points: the mean over labels (and over models and tasks, where there are several).

    Args:
        rows: counts of :func:`mome_utils.position_scores.score_places` with ``task, model, seed``, one arm, measure and
            place.

    Raises:
        IntervalError: no rows, or seeds that were scored differently.
    """
    return crossed_interval(_cells(rows), ["task", "model", "label"], measure="nats_per_token").scaled(100)


def difference_interval(rows_a: pd.DataFrame, rows_b: pd.DataFrame) -> Interval:
    """F1 of a minus F1 of b in points, paired by seed and document, on the seeds that both have.

    Raises:
        IntervalError: no common seed, or another set of labels or models on one side.
    """
    common = set(rows_a["seed"]) & set(rows_b["seed"])
    if not common:
        raise IntervalError("The two arms share no seed, so they cannot be paired: train both with the same seeds.")
    both = pd.concat([rows_a.assign(side=0), rows_b.assign(side=1)], ignore_index=True)
    cells = _cells(both[both["seed"].isin(common)])
    sides = [set(map(tuple, part[["task", "model", "label"]].to_numpy())) for _, part in cells.groupby("side")]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise IntervalError("The two sides hold other models, tasks or labels: score both alike.")

    def difference(values: np.ndarray) -> np.ndarray:
        half = values.shape[-1] // 2  # cells are sorted: all of a, then all of b
        return np.asarray(values[..., :half].mean(-1) - values[..., half:].mean(-1))

    columns = ["side", "task", "model", "label"]
    return crossed_interval(cells, columns, difference, measure="nats_per_token").scaled(100)


def drop_interval(rows: pd.DataFrame, first: int = 1, last: int | None = None) -> Interval:
    """F1 at the first place minus F1 at the last one: what the position costs, in points.

    Args:
        rows: as for :func:`f1_interval`, at all places.
        first, last: the places ``k`` (default: 1 and the largest).
    """
    last = int(rows["k"].max()) if last is None else last
    return difference_interval(rows[rows["k"] == first], rows[rows["k"] == last])


def gain_interval(rows: pd.DataFrame, arms: Sequence[str], control: str, k: int) -> Interval:
    """F1 at place ``k`` under some arms (their mean) minus F1 there under their control, in points."""
    place = rows[rows["k"] == k]
    # Each arm's models are cells of their own; opposite each stands the control's model under the same name.
    with_arm, without = (
        pd.concat([place[place["arm"] == (own or arm)].assign(model=lambda t, arm=arm: t["model"] + " " + arm)
                   for arm in arms])
        for own in ("", control)
    )
    return difference_interval(with_arm, without)


def _row(found: Interval, **names: object) -> dict[str, object]:
    return {**names, "estimate": found.estimate, "low": found.low, "high": found.high}


def f1_table(rows: pd.DataFrame, by: Sequence[str] = ("task", "model", "arm", "measure")) -> pd.DataFrame:
    """F1 at each place: the columns of ``by``, ``k``, ``estimate``, ``low``, ``high``, in order of appearance."""
    return pd.DataFrame([
        _row(f1_interval(part), **dict(zip([*by, "k"], names, strict=True)))
        for names, part in rows.groupby([*by, "k"], sort=False)
    ])


def drop_table(rows: pd.DataFrame, by: Sequence[str] = ("task", "model", "arm", "measure")) -> pd.DataFrame:
    """The drop from the first to the last place, as :func:`f1_table`, with ``first``, the F1 that it falls from."""
    found = []
    for names, part in rows.groupby(list(by), sort=False):
        top = f1_interval(part[part["k"] == 1]).estimate
        found.append(_row(drop_interval(part), **dict(zip(by, names, strict=True)), first=top))
    return pd.DataFrame(found)
