"""Numbers of a table of similarities: means, places between floor and ceiling, shares, agreement of measures.

The functions take rows of :func:`mome_utils.similarity_study.pair_rows`, or make a *statistic* of such rows, which
:func:`mome_utils.similarity_baselines.jackknife` gives an interval. Every mean gives each language the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from mome_utils.config import MomeError
from mome_utils.intervals import Interval
from mome_utils.similarity import MEASURES, measure
from mome_utils.similarity_baselines import ALL, Statistic, jackknife, placed

__all__ = [
    "between", "difference", "flips", "kind_matrix", "mean_of", "measure_agreement", "placed_rows", "share_below",
    "with_ceiling",
]


def mean_of(kind: str, kind_b: str | None = None, same_seed: bool | None = None) -> Statistic:
    """The mean over languages of the scores between two kinds, all rows of a language weighing the same.

    kind, kind_b: of the first and of the second model (None: any). same_seed: only pairs of one seed, or of two.
    Nan where no row matches.
    """

    def statistic(rows: pd.DataFrame) -> float:
        # Plain arrays: an interval asks this of some forty small tables, and pandas would take most of the time.
        chosen = rows["kind"].to_numpy(dtype=object) == kind
        if kind_b is not None:
            chosen = chosen & (rows["kind_b"].to_numpy(dtype=object) == kind_b)
        if same_seed is not None:
            chosen = chosen & ((rows["seed"].to_numpy() == rows["seed_b"].to_numpy()) == same_seed)
        if not chosen.any():
            return float("nan")
        names = rows["language"].to_numpy(dtype=object)[chosen]
        values = rows["value"].to_numpy()[chosen]
        return float(np.mean([values[names == name].mean() for name in dict.fromkeys(names)]))

    return statistic


def difference(first: Statistic, second: Statistic) -> Statistic:
    """One statistic minus another, of the same rows."""
    return lambda rows: first(rows) - second(rows)


def between(score: Statistic, floor: float, ceiling: Statistic) -> Statistic:
    """Where a statistic lies between a floor and a ceiling (:func:`mome_utils.similarity_baselines.placed`)."""
    return lambda rows: placed(score(rows), floor, ceiling(rows))


def with_ceiling(name: str, kind: str = "teacher", seeds: int = 2) -> Statistic:
    """The seed-to-seed similarity of a kind; with a single seed what the measure gives two identical models."""
    if seeds > 1:
        return mean_of(kind, kind, same_seed=False)
    identical = float(measure(name).identical)
    return lambda rows: identical


def placed_rows(
    rows: pd.DataFrame, floors: pd.DataFrame, kinds: Sequence[str], seeds: Sequence[int], *, versus: str = ""
) -> pd.DataFrame:
    """Each kind's similarity to its own teacher between floor and ceiling, by measure and aggregation.

    Args:
        rows: kinds beside their own teachers, and teachers beside those of other seeds, with folds.
        floors: the same pairs with permuted rows. kinds: to place. seeds: of the study.
        versus: a kind: then each row is the difference of the places from it, paired.

    Returns:
        ``measure, label, aggregation, kind, raw, floor, ceiling, value, low, high``; ``value`` is the place (or the
        difference), ``raw`` the mean score. Where floor and ceiling are equal (mean CCA of few inputs), there is no
        place: nan.
    """
    found = []
    rows = rows[rows["kind"].isin({*kinds, versus, "teacher"})]
    rows = rows.astype(dict.fromkeys(("kind", "kind_b", "language"), object))
    for (name, aggregation), part in rows.groupby(["measure", "aggregation"], sort=False):
        own = (floors["measure"] == name) & (floors["aggregation"] == aggregation)
        floor = float(floors.loc[own].groupby("language")["value"].mean().mean())
        ceiling = with_ceiling(name, seeds=len(seeds))
        for kind in kinds:
            place = between(mean_of(kind, "teacher", True), floor, ceiling)
            if versus:
                place = difference(place, between(mean_of(versus, "teacher", True), floor, ceiling))
            part_of = part[part["kind"].isin({kind, versus, "teacher"})]
            whole = part_of[part_of["fold"] == ALL]
            known = abs(floor - ceiling(whole)) > 1e-9
            interval = jackknife(part_of, place, seeds) if known else Interval(nan, nan, nan, len(seeds), 0)
            found.append({
                "measure": name, "label": MEASURES[name].label, "aggregation": aggregation, "kind": kind,
                "raw": mean_of(kind, "teacher", True)(whole), "floor": floor, "ceiling": ceiling(whole),
                "value": interval.estimate, "low": interval.low, "high": interval.high,
            })
    return pd.DataFrame(found)


def share_below(name: str) -> Statistic:
    """The share of pairs of kinds that are less alike than two seeds of either kind.

    A pair of kinds in a language counts as below when its mean score, over models of different seeds, is less alike
    than the mean seed-to-seed score of either kind. (Their average would be no test: a positive definite similarity
    between two groups is never above the average of those within them, were each model compared with itself too.)
    Models of one seed share their start and the order of their
    data, which no two published models do. Nan where a kind has a single seed.
    """
    sign = -1 if measure(name).is_distance else 1

    def statistic(rows: pd.DataFrame) -> float:
        apart = rows[rows["seed"] != rows["seed_b"]]
        means = apart.groupby(["language", "kind", "kind_b"])["value"].mean()
        own = {key[:2]: value for key, value in means.items() if key[1] == key[2]}
        cross = [(key, value) for key, value in means.items() if key[1] != key[2]]
        if not cross or any((key[0], kind) not in own for key, _ in cross for kind in key[1:]):
            return float("nan")
        below = [all(sign * value < sign * own[key[0], kind] for kind in key[1:]) for key, value in cross]
        return float(np.mean(below))

    return statistic


def kind_matrix(rows: pd.DataFrame, kinds: Sequence[str], *, same_seed: bool = False) -> pd.DataFrame:
    """Mean scores between kinds [kinds, kinds], languages weighing the same; seed to seed on the diagonal.

    same_seed: pairs of one seed instead of two; the diagonal still compares seeds.

    Raises:
        MomeError: a pair of kinds without rows.
    """
    matrix = pd.DataFrame(np.nan, index=list(kinds), columns=list(kinds))
    whole = rows[rows["fold"] == ALL]
    for i, first in enumerate(kinds):
        for second in kinds[i:]:
            chosen = same_seed and first != second
            value = mean_of(first, second, chosen)(whole)
            value = mean_of(second, first, chosen)(whole) if np.isnan(value) else value
            matrix.loc[first, second] = matrix.loc[second, first] = value
    if matrix.isna().to_numpy().any():
        raise MomeError("Some pairs of kinds were not compared: add the rows of seed_pairs and kind_pairs.")
    return matrix


def measure_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation between measures over pairs of models [measures, measures], distances negated.

    Pairs are ranked within each language and aggregation, and the correlations averaged: measures should agree on which
    models are alike, not on which language is. A measure that gives all pairs one score (mean CCA of few inputs) ranks
    nothing, and is left out.
    """
    keys = ["kind", "made_for", "seed", "kind_b", "made_for_b", "seed_b"]
    names, parts = list(rows["measure"].unique()), []
    for _, part in rows[rows["fold"] == ALL].groupby(["language", "aggregation"], sort=False):
        wide = part.pivot(index=keys, columns="measure", values="value")[names].round(9)
        signs = [-1 if MEASURES[name].is_distance else 1 for name in names]
        ranks = np.apply_along_axis(rankdata, 0, wide.to_numpy() * signs)
        ranks -= ranks.mean(0)
        lengths = np.linalg.norm(ranks, axis=0)
        ranks = np.divide(ranks, lengths, out=np.full_like(ranks, np.nan), where=lengths > 0)
        parts.append(ranks.T @ ranks)
    matrix = pd.DataFrame(np.mean(parts, axis=0), index=names, columns=names)
    kept = np.isfinite(np.diag(matrix))
    return matrix.loc[kept, kept]


def flips(effects: pd.DataFrame) -> pd.DataFrame:
    """What each measure and aggregation concludes from an effect: more alike, less alike, or undecided.

    Args:
        effects: ``measure, aggregation, question, low, high``; above zero means more alike.

    Returns:
        A row for each question: how many settings say ``more``, ``less`` and ``undecided``, which say the rarer of
        the first two (``minority``), and ``flips``: whether both occur.
    """
    said = np.select([effects["low"] > 0, effects["high"] < 0], ["more", "less"], default="undecided")
    table, found = effects.assign(said=said), []
    for question, part in table.groupby("question", sort=False):
        counts = {answer: int((part["said"] == answer).sum()) for answer in ("more", "less", "undecided")}
        rarer = "less" if counts["less"] <= counts["more"] else "more"
        names = [f"{MEASURES[row.measure].label} ({row.aggregation})" for row in part.itertuples() if row.said == rarer]
        found.append({"question": question, **counts, "minority": ", ".join(names) or "–",
                      "flips": counts["more"] > 0 and counts["less"] > 0})
    return pd.DataFrame(found)
