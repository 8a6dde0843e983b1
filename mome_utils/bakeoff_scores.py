"""Scores, intervals and costs of a bake-off, computed from its rows (see :mod:`mome_utils.bakeoff`).

Scores are precision, recall and F1, weighted by the size of each class as published (MoME, arXiv 2407.19610)
and unweighted ("macro"). Their intervals resample topics and, where a bake-off is repeated with other folds,
count those seeds too (see :mod:`mome_utils.intervals`). An *entry* is a classifier with a set of features.

Shapes: ``L`` languages, ``S`` seeds, ``D`` topics, ``C`` entries. Scores are in points, 0 to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from mome_utils.config import MomeError
from mome_utils.intervals import Interval, combine

__all__ = [
    "FEATURE_NAMES", "NAMES", "confusion_counts", "cost_table", "f1_interval", "lead_interval", "macro_scores",
    "relative_cost", "score_table", "weighted_scores",
]

DRAWS = 2000
#: What tells entries apart, and the features of rows that do not name any.
ENTRY, TOKENS = ["features", "classifier"], "tokens"
#: What a reader sees for each classifier, and for each set of features.
NAMES: Mapping[str, str] = MappingProxyType({
    "logistic_regression": "logistic regression", "sgd": "SGD", "linear_svm": "linear SVM",
    "naive_bayes": "naive Bayes", "complement_naive_bayes": "complement naive Bayes",
    "random_forest": "random forest", "gradient_boosting": "gradient boosting", "knn": "k-NN", "mlp": "MLP",
    "transformer": "transformer", "experts": "experts",
    "lingua": "lingua", "py3langid": "py3langid", "fasttext": "fastText",
})
FEATURE_NAMES: Mapping[str, str] = MappingProxyType({
    "tokens": "token ids", "tokens_as_released": "token ids as released", "token_pairs": "token ids and pairs",
    "characters": "character n-grams", "token_sequence": "ids in order",
    "text": "text", "text_any": "text, any language",
})


def confusion_counts(rows: pd.DataFrame, languages: Sequence[str], by: Sequence[str] = ()) -> np.ndarray:
    """Number of sequences by true and predicted language.

    Args:
        rows: with columns language, predicted and those of ``by``.
        languages: the order of rows and columns.
        by: columns to count apart.

    Returns:
        [*number of values of each column of ``by`` (sorted), L (true), L (predicted)], int64.
    """
    columns = [pd.factorize(rows[column], sort=True) for column in by]
    place = {language: index for index, language in enumerate(languages)}
    truth = rows["language"].map(place).to_numpy(dtype=np.int64)
    guess = rows["predicted"].map(place).to_numpy(dtype=np.int64)
    counts = np.zeros((*(len(values) for _, values in columns), len(place), len(place)), dtype=np.int64)
    np.add.at(counts, (*(codes for codes, _ in columns), truth, guess), 1)
    return counts


def _class_scores(counts: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Precision, recall and F1 of each class [..., L] as shares (0 where undefined), and class sizes."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    true, guessed = counts.sum(-1), counts.sum(-2)

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)

    scores = {"precision": ratio(hits, guessed), "recall": ratio(hits, true), "f1": ratio(2 * hits, true + guessed)}
    return scores, true


def weighted_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of confusion counts, weighted by the size of each true class.

    Args:
        counts: [..., L, L], true by predicted.

    Returns:
        ``precision``, ``recall``, ``f1``, each [...], in points; a class never predicted has precision 0, as
        in scikit-learn's ``average="weighted", zero_division=0``.
    """
    scores, true = _class_scores(counts)
    total = np.maximum(true.sum(-1), 1)
    return {name: np.asarray(100 * (values * true).sum(-1) / total) for name, values in scores.items()}


def macro_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """As :func:`weighted_scores`, but every class counts alike that occurs among the true ones.

    A label that is only ever predicted (``other``) therefore lowers its victims' recall, but is no class.
    """
    scores, true = _class_scores(counts)
    occurs = true > 0
    total = np.maximum(occurs.sum(-1), 1)
    return {name: np.asarray(100 * (values * occurs).sum(-1) / total) for name, values in scores.items()}


def f1_interval(rows: pd.DataFrame, classifier: str, features: str | None = None) -> Interval:
    """Weighted F1 of one entry, in points, with a 95 % interval over topics and seeds.

    Where not one sequence is wrong, resampling finds no spread although another sample could hold an error.
    The lower limit is then the rule of three (Hanley & Lippman-Hand 1983), 3 errors among as many *topics*:
    the sequences of a topic err together, so they are not independent trials.

    Args:
        rows: of :func:`cross_validate`. classifier: its name. features: their name; when absent, the only
            ones that the classifier has in these rows, or else "tokens".
    """
    point, sampled, at, topics = _resampled_f1(rows, classifier, features)
    return _limited(point[:, at], sampled[:, :, at], topics)


def _limited(point: np.ndarray, sampled: np.ndarray, topics: int) -> Interval:
    """Interval of a score [S] and its resamples [draws, S], within 0 and 100, by the rule of three if faultless."""
    found = combine(point, sampled, documents=topics)
    low = found.estimate - _rule_of_three(topics) if found.low == found.high else found.low
    return replace(found, low=max(low, 0.0), high=min(found.high, 100.0))


def lead_interval(rows: pd.DataFrame, classifier: str, features: str | None = None) -> Interval:
    """F1 of an entry minus that of the best other, in points, with a 95 % interval over topics and seeds.

    Which of the others is best over all seeds is decided anew in every resample, since that choice is uncertain
    too. Where the two never differ the limits are the rule of three's, as in :func:`f1_interval`. Arguments as there.

    Raises:
        MomeError: only one entry, or entries that were not tested on the same sequences with the same seeds.
    """
    point, sampled, at, topics = _resampled_f1(rows, classifier, features)
    if point.shape[-1] < 2:
        raise MomeError("A lead needs two classifiers or more: add another one to the bake-off.")

    def lead(scores: np.ndarray) -> np.ndarray:
        others = np.delete(scores, at, axis=-1)
        best = others.mean(axis=-2, keepdims=True).argmax(-1, keepdims=True)
        return np.asarray(scores[..., at] - np.take_along_axis(others, best, axis=-1)[..., 0])

    found = combine(lead(point), lead(sampled), documents=topics)
    half = _rule_of_three(topics) if found.low == found.high else 0.0
    return replace(found, low=found.low - half, high=found.high + half)


def _rule_of_three(topics: int) -> float:
    """Upper 95 % limit of the share of topics with an error when none was seen, in points."""
    return min(300 / topics, 100.0)


def _with_entries(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if "features" in rows.columns else rows.assign(features=TOKENS)


def _position(entries: Sequence[tuple[str, str]], classifier: str, features: str | None) -> int:
    """Place of an entry (features, classifier) in a list; f1_interval says what absent features mean."""
    own = [held for held, name in entries if name == classifier]
    wanted = features or (own[0] if len(own) == 1 else TOKENS)
    if wanted not in own:
        held = ", ".join(f"{name} of {kind}" for kind, name in entries)
        raise MomeError(f"The bake-off holds no classifier '{classifier}' of {wanted}: it has {held}.")
    return list(entries).index((wanted, classifier))


def _resampled_f1(
    rows: pd.DataFrame, classifier: str, features: str | None
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """F1 [S, C], F1 with topics drawn with replacement [draws, S, C], the entry's place in C, and D."""
    rows = _with_entries(rows)
    entry = rows.groupby(ENTRY, sort=True)
    entries = sorted({(str(kind), str(name)) for kind, name in entry.groups})
    at = _position(entries, classifier, features)
    counts = confusion_counts(rows.assign(entry=entry.ngroup()), _labels(rows), ["topic", "seed", "entry"])
    tested = counts.sum(-1)
    if (tested != tested[:, :, :1]).any():
        raise MomeError(
            "The entries were not tested on the same sequences with the same seeds: select those that were."
        )
    drawn = _resampled(counts)
    return weighted_scores(counts.sum(0))["f1"], weighted_scores(drawn)["f1"], at, len(counts)


def _labels(rows: pd.DataFrame) -> list[str]:
    return sorted({*rows["language"].unique(), *rows["predicted"].unique()})


def _resampled(counts: np.ndarray) -> np.ndarray:
    """Counts [D, ...] summed over topics drawn with replacement: [draws, ...]."""
    topics = len(counts)
    weights = np.random.default_rng(0).multinomial(topics, np.full(topics, 1 / topics), size=DRAWS)
    return (weights.astype(float) @ counts.reshape(topics, -1)).reshape(DRAWS, *counts.shape[1:])


def score_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per entry, best weighted F1 first, all in points.

    Returns:
        Rows (features, classifier, precision, recall, f1, low, high, macro_precision, macro_recall, macro_f1),
        and for each of those six scores its 95 % limits ``…_low`` and ``…_high`` over topics and seeds
        (``low`` and ``high`` are those of f1). An entry's rows may cover topics and seeds of its own.
    """
    table = []
    for (features, name), own in _with_entries(rows).groupby(ENTRY, sort=False):
        counts = confusion_counts(own, _labels(own), ["topic", "seed"])
        resampled = _resampled(counts)
        entry: dict[str, Any] = {"features": features, "classifier": name}
        limits: dict[str, float] = {}
        for prefix, average in (("", weighted_scores), ("macro_", macro_scores)):
            point, drawn = average(counts.sum(0)), average(resampled)
            for score in point:
                found = _limited(point[score], drawn[score], len(counts))
                entry[prefix + score] = found.estimate
                limits |= {f"{prefix}{score}_low": found.low, f"{prefix}{score}_high": found.high}
        table.append(entry | {"low": limits["f1_low"], "high": limits["f1_high"]} | limits)
    return pd.DataFrame(table).sort_values("f1", ascending=False, kind="stable", ignore_index=True)


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What each entry costs on this machine; compare between machines only the ratios of :func:`relative_cost`.

    Returns:
        Rows (features, classifier, fit_seconds, microseconds, size_bytes, settings): medians over folds of the
        time to fit, of the time per sequence from token ids to decision (asked in a batch), and of the size.
    """
    folds = _with_entries(rows).drop_duplicates(["seed", "fold", *ENTRY])
    by = folds.assign(microseconds=1e6 * folds["predict_seconds"]).groupby(ENTRY, sort=False)
    costs = by[["fit_seconds", "microseconds", "size_bytes"]].median()
    return costs.assign(settings=by["settings"].first()).reset_index()


def relative_cost(
    rows: pd.DataFrame, baseline: str = "logistic_regression", features: str | None = None
) -> pd.DataFrame:
    """Fit and predict time of each entry as ratios to ``baseline`` in the same fold (median over folds).

    Args:
        rows: of :func:`cross_validate`. baseline, features: the entry with ratio 1, as in :func:`f1_interval`.

    Returns:
        Rows (features, classifier, fit_ratio, predict_ratio). Ratios travel between machines, seconds do not.
        An entry that shares no fold with the baseline, or has no such time, has a missing ratio.
    """
    folds = _with_entries(rows).drop_duplicates(["seed", "fold", *ENTRY])
    ratios = {}
    for name in ("fit", "predict"):
        table = folds.set_index(["seed", "fold", *ENTRY])[f"{name}_seconds"].unstack(ENTRY)
        entries = [(str(kind), str(classifier)) for kind, classifier in table.columns]
        own = table.iloc[:, _position(entries, baseline, features)]
        ratios[f"{name}_ratio"] = table.div(own, axis=0).median()
    return pd.DataFrame(ratios).reset_index()
