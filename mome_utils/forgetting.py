"""Forgetting: what a model loses of earlier languages while it learns later ones.

Everything derives from one matrix, R[i, j]: bits per byte on language j after stage i, with the languages in
the order in which they are learned. Lower is better, unlike the accuracies of the sources, so signs turn
where that keeps a metric's meaning: *forgetting* is positive when something was lost, *transfer* is positive
when something was won.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd

from mome_utils.config import MomeError
from mome_utils.intervals import Interval, Measure, crossed_interval, cube

__all__ = [
    "METRICS", "ForgettingError", "Metric", "Order", "average_performance", "backward_transfer",
    "first_language_forgetting", "forgetting", "forgetting_by_language", "forward_transfer", "intransigence",
    "learning", "metric_interval", "metric_table", "paired_metric_interval", "r_matrix", "rise_since_best",
    "share_forgotten", "stage_bands",
]  # fmt: skip

Order = Sequence[str] | Mapping[int, Sequence[str]]


class ForgettingError(MomeError):
    """Scores that do not make a matrix of stages and languages; the message says what is missing."""


def average_performance(scores: np.ndarray) -> np.ndarray:
    """Mean over languages after the last stage, R [..., T, L] -> [...]; lower is better.

    Lopez-Paz & Ranzato 2017, equation 2 (ACC): 1/L Σ_j R[T, j].
    """
    return np.asarray(scores[..., -1, :].mean(-1))


def backward_transfer(scores: np.ndarray) -> np.ndarray:
    """What later stages did to languages already learned, R [..., T, T] -> [...]; positive: they helped.

    Lopez-Paz & Ranzato 2017, equation 3 (BWT): 1/(T-1) Σ_{i<T} (R[i, i] - R[T, i]), the sign turned for bits.
    """
    _square(scores)
    learned = np.diagonal(scores, axis1=-2, axis2=-1)
    return np.asarray((learned - scores[..., -1, :])[..., :-1].mean(-1))


def forward_transfer(scores: np.ndarray, untrained: np.ndarray) -> np.ndarray:
    """How far a language is before its own stage, R [..., T, T] and b [..., T] -> [...]; positive: ahead.

    Lopez-Paz & Ranzato 2017, equation 4 (FWT): 1/(T-1) Σ_{i>1} (b[i] - R[i-1, i]) against the untrained
    model's scores b, the sign turned for bits.
    """
    _square(scores)
    before = np.diagonal(scores, offset=1, axis1=-2, axis2=-1)
    return np.asarray((untrained[..., 1:] - before).mean(-1))


def forgetting_by_language(scores: np.ndarray) -> np.ndarray:
    """Final score minus the best after an earlier stage, R [..., T, L] -> [..., L]; positive: forgotten.

    Chaudhry et al. 2018, equation 3: f_j = max_{l<T} a[l, j] - a[T, j] in accuracies; in bits
    R[T, j] - min_{l<T} R[l, j]. A negative value says that the language is at its best at the end.
    """
    if scores.shape[-2] < 2:
        raise ForgettingError("Forgetting compares stages: give at least two.")
    return np.asarray(scores[..., -1, :] - scores[..., :-1, :].min(-2))


def forgetting(scores: np.ndarray) -> np.ndarray:
    """Mean of `forgetting_by_language` over all languages but the last one learned, R [..., T, T] -> [...].

    Chaudhry et al. 2018: F = 1/(T-1) Σ_{j<T} f_j.
    """
    _square(scores)
    return np.asarray(forgetting_by_language(scores)[..., :-1].mean(-1))


def first_language_forgetting(scores: np.ndarray) -> np.ndarray:
    """`forgetting_by_language` of the language learned first, R [..., T, L] -> [...]."""
    return forgetting_by_language(scores)[..., 0]


def rise_since_best(scores: np.ndarray) -> np.ndarray:
    """Mean of `forgetting_by_language` over all languages, R [..., T, L] -> [...], for a single session.

    The rows are then points in time and not stages; every language could have been best before the last one.
    """
    return np.asarray(forgetting_by_language(scores).mean(-1))


def learning(scores: np.ndarray) -> np.ndarray:
    """Mean score of each language right after its own stage, R [..., T, T] -> [...]: plasticity, lower is better.

    Learning accuracy (LA) of Riemer et al. 2019, arXiv 1810.11910: 1/T Σ_i R[i, i].
    """
    _square(scores)
    return np.asarray(np.diagonal(scores, axis1=-2, axis2=-1).mean(-1))


def intransigence(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much worse languages are learned in their own stage than by a reference, R [..., T, T], r [..., T] -> [...].

    Chaudhry et al. 2018, definition 2: I_k = a*_k - a[k, k], where a*_k is of a model trained on the data of all
    tasks up to k; in bits 1/T Σ_k (R[k, k] - r[k]). Positive: the sequence learned less.
    """
    return np.asarray(learning(scores) - reference.mean(-1))


def share_forgotten(scores: np.ndarray, untrained: np.ndarray) -> np.ndarray:
    """Share of what was learned that is lost in the end, R [..., T, T] and b [..., T] -> [...], over all but the last.

    Of a language, (R[T, j] - best) / (b[j] - best): 0 where nothing was forgotten, 1 where the final model knows no
    more than the untrained one, below 0 where it went on improving.
    """
    _square(scores)
    best = scores[..., :-1, :].min(-2)
    return np.asarray(((scores[..., -1, :] - best) / (untrained - best))[..., :-1].mean(-1))


@dataclass(frozen=True)
class Metric:
    """A number derived from R [..., T, T] -> [...], its definition, source, and which direction is better.

    baseline: "" for a function of R alone; "untrained" or "joint" for a function of R and the scores [..., T] of the
    untrained model or of a model trained on all languages together.
    """

    name: str
    definition: str
    source: str
    better: str
    function: Callable[..., np.ndarray]
    baseline: str = ""


_LPR = "Lopez-Paz & Ranzato 2017"
_CHAUDHRY = "Chaudhry et al. 2018"

#: Metrics of a matrix of stages by languages, by name.
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(
                "average performance",
                "mean over languages after the last stage",
                f"{_LPR}, ACC",
                "lower",
                average_performance,
            ),
            Metric(
                "forgetting",
                "final minus best earlier score, mean over all languages but the last",
                f"{_CHAUDHRY}, F",
                "lower",
                forgetting,
            ),
            Metric(
                "forgetting of the first language",
                "final minus best earlier score of the language learned first",
                f"{_CHAUDHRY}, f of language 1",
                "lower",
                first_language_forgetting,
            ),
            Metric(
                "backward transfer",
                "score right after a language's own stage minus final score, mean over all but the last",
                f"{_LPR}, BWT",
                "higher",
                backward_transfer,
            ),
            Metric(
                "learning",
                "score right after a language's own stage, mean over languages",
                "Riemer et al. 2019, LA",
                "lower",
                learning,
            ),
            Metric(
                "forward transfer",
                "untrained score minus score just before a language's own stage, mean over all but the first",
                f"{_LPR}, FWT",
                "higher",
                forward_transfer,
                "untrained",
            ),
            Metric(
                "intransigence",
                "score right after a language's own stage minus that of a joint model, mean over languages",
                f"{_CHAUDHRY}, I",
                "lower",
                intransigence,
                "joint",
            ),
        )
    }
)


def r_matrix(
    rows: pd.DataFrame,
    order: Sequence[str],
    *,
    stages: Sequence[int] | None = None,
    measure: Measure = "bits_per_byte",
) -> np.ndarray:
    """R[stage, language] as the mean over seeds, [stages, len(order)].

    Args:
        rows: long format with `stage` (1 after the first stage; 0, if there, is the untrained model),
            `language`, `document`, `nats`, `bytes`, `tokens` and, with several seeds, `seed`.
        order: the languages, column by column, in the order of learning.
        stages: the rows of R; by default 1 to len(order).
    """
    chosen = list(range(1, len(order) + 1)) if stages is None else list(stages)
    losses, sizes = cube(_tasks(rows, order, chosen), ["stage", "task"], measure)
    scores = (losses.sum(1) / sizes.sum(1)).mean(0)
    return np.asarray(scores.reshape(len(chosen), len(order)))


def metric_interval(
    rows: pd.DataFrame,
    order: Order,
    metric: Callable[..., np.ndarray],
    *,
    baseline: pd.DataFrame | None = None,
    stages: Sequence[int] | None = None,
    measure: Measure = "bits_per_byte",
    draws: int = 2000,
) -> Interval:
    """Interval of a metric of R over seeds and documents (crossed, see `intervals`).

    Args:
        rows: as in `r_matrix`; every seed must hold every stage and language.
        order: one order for all seeds, or seed -> its own order (columns of R are then places in that order).
        metric: R [..., stages, languages] -> [...], recomputed whole in every draw; with a baseline it is also
            given the baseline's scores [..., languages], of the same draw.
        baseline: scores of another model of the same seeds on the same documents (no `stage` is needed).
    """
    chosen = _stages(order, stages)
    statistic = _statistic(metric, len(chosen), _width(order), baseline is not None)
    selected = _with_baseline(rows, order, chosen, baseline)
    return crossed_interval(selected, ["stage", "task"], statistic, measure=measure, draws=draws)


def paired_metric_interval(
    rows_a: pd.DataFrame,
    rows_b: pd.DataFrame,
    order: Order,
    metric: Callable[..., np.ndarray],
    *,
    baseline: pd.DataFrame | None = None,
    measure: Measure = "bits_per_byte",
    draws: int = 2000,
) -> Interval:
    """Interval of a metric of one arm minus the same of another, paired by seed and document.

    Arguments as in `metric_interval`, rows_a and rows_b of the two arms; only seeds that both have are used.

    Raises:
        ForgettingError: the arms share no seed.
    """
    common = set(rows_a["seed"]) & set(rows_b["seed"])
    if not common:
        raise ForgettingError("The two arms share no seed, so they cannot be paired: train both with the same seeds.")
    chosen = _stages(order, None)
    one = _statistic(metric, len(chosen), _width(order), baseline is not None)
    sides = [
        _with_baseline(rows[rows["seed"].isin(common)], order, chosen, _of_seeds(baseline, common)).assign(side=side)
        for side, rows in enumerate((rows_a, rows_b))
    ]

    def difference(cells: np.ndarray) -> np.ndarray:
        half = cells.shape[-1] // 2  # cells are sorted: all of a, then all of b
        return np.asarray(one(cells[..., :half]) - one(cells[..., half:]))

    both = pd.concat(sides, ignore_index=True)
    return crossed_interval(both, ["side", "stage", "task"], difference, measure=measure, draws=draws)


def metric_table(
    arms: Mapping[str, pd.DataFrame],
    order: Order,
    metrics: Mapping[str, Metric] = METRICS,
    *,
    untrained: pd.DataFrame | None = None,
    joint: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Every metric of every arm: arm, metric, estimate, low, high, better, definition, source.

    A metric that needs a baseline (rows of the untrained or of a joint model, of the same seeds) is left out
    without it.
    """
    baselines = {"untrained": untrained, "joint": joint}
    rows = []
    for arm, scores in arms.items():
        for metric in metrics.values():
            baseline = baselines.get(metric.baseline)
            if metric.baseline and baseline is None:
                continue
            own = _of_seeds(baseline, set(scores["seed"])) if baseline is not None else None
            found = metric_interval(scores, order, metric.function, baseline=own)
            rows.append(
                {
                    "arm": arm,
                    "metric": metric.name,
                    "estimate": found.estimate,
                    "low": found.low,
                    "high": found.high,
                    "better": metric.better,
                    "definition": metric.definition,
                    "source": metric.source,
                }
            )
    return pd.DataFrame(rows)


def stage_bands(order: Sequence[str], ends: Sequence[int]) -> list[tuple[int, int, str]]:
    """(first step, last step, language) of each stage, from the steps at which the stages end."""
    if len(order) != len(ends) or list(ends) != sorted(set(ends)) or not ends or ends[0] <= 0:
        raise ForgettingError(f"{len(order)} languages need as many increasing stage ends, not {list(ends)}.")
    starts = [0, *ends[:-1]]
    return list(zip(starts, ends, order, strict=True))


def _square(scores: np.ndarray) -> None:
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < 2:
        raise ForgettingError(
            f"This metric needs one stage per language and two or more, not a matrix {scores.shape[-2:]}."
        )


def _tasks(rows: pd.DataFrame, order: Order, stages: Sequence[int]) -> pd.DataFrame:
    """The rows of the wanted stages and languages; `task` is a language's place in its seed's order."""
    if "stage" not in rows.columns:
        raise ForgettingError("The scores have no column 'stage': score the model after every stage.")
    if isinstance(order, Mapping):
        orders = {seed: {language: i for i, language in enumerate(o)} for seed, o in order.items()}
        if "seed" not in rows.columns or not set(rows["seed"]) <= set(orders):
            raise ForgettingError("An order per seed was given, but not for every seed of the scores.")
        task = [
            orders[s].get(language, -1) for s, language in zip(rows["seed"], rows["language"], strict=True)
        ]
        languages = len(next(iter(orders.values())))
    else:
        places = {language: i for i, language in enumerate(order)}
        task = [places.get(language, -1) for language in rows["language"]]
        languages = len(places)
    chosen = rows.assign(task=task)
    chosen = chosen[(chosen["task"] >= 0) & chosen["stage"].isin(list(stages))]
    if len(chosen[["stage", "task"]].drop_duplicates()) != len(stages) * languages:
        raise ForgettingError(
            f"The scores lack some of the {len(stages)} stages by {languages} languages: score them all."
        )
    return chosen


def _stages(order: Order, stages: Sequence[int] | None) -> list[int]:
    return list(range(1, _width(order) + 1)) if stages is None else list(stages)


def _width(order: Order) -> int:
    """Number of languages."""
    return len(next(iter(order.values())) if isinstance(order, Mapping) else order)


def _statistic(
    metric: Callable[..., np.ndarray], stages: int, languages: int, baseline: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """A metric of R as a statistic of flat cells [..., stages · languages], a baseline's being the first row."""

    def statistic(cells: np.ndarray) -> np.ndarray:
        matrix = cells.reshape(*cells.shape[:-1], stages + baseline, languages)
        return metric(matrix[..., 1:, :], matrix[..., 0, :]) if baseline else metric(matrix)

    return statistic


def _with_baseline(
    rows: pd.DataFrame, order: Order, stages: Sequence[int], baseline: pd.DataFrame | None
) -> pd.DataFrame:
    """The rows of R, and those of a baseline as stage -1."""
    if baseline is None:
        return _tasks(rows, order, stages)
    both = pd.concat([baseline.assign(stage=-1), rows], ignore_index=True)
    return _tasks(both, order, [-1, *stages])


def _of_seeds(rows: pd.DataFrame | None, seeds: set[int]) -> pd.DataFrame | None:
    return None if rows is None else rows[rows["seed"].isin(seeds)]
