"""Confidence intervals over crossed seeds and documents.

Every seed of an arm scores the same test documents, so the two sources of chance are *crossed*: a seed's
effect is shared by all documents, a document's effect by all seeds. A bootstrap over the three seeds alone
is far too narrow (three values can only be redrawn in ten ways), and one over all rows pretends that they are
independent. Here each source has a variance of its own (:mod:`mome_utils.crossed`):

- ``V_documents``: the variance of the estimate when documents are resampled, seeds held (a bootstrap by
  topic, so that the translations of one article stay together);
- ``V_seeds``: the variance of the seeds' own values over S, what resampling seeds gives after its S/(S-1)
  correction;
- ``V_interaction``: the part that both of them contain, taken off once (Cameron, Gelbach & Miller 2011,
  two-way clustering), here from the same draws.

Each source keeps its own quantile of Student's t, since three seeds say little about how much seeds matter:

    half² = t(S - 1)² V_seeds + t(D - 1)² (V_documents - V_interaction)

(Graybill & Wang 1980). In simulated studies intervals of 95 % cover 95 to 98 %, those of one dominant source exactly
(``tests/test_intervals.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Literal

import numpy as np
import pandas as pd

from mome_utils.config import MomeError
from mome_utils.crossed import By, half_width

LN2 = float(np.log(2.0))
DRAWS = 2000
Measure = Literal["bits_per_byte", "nats_per_token"]
Statistic = Callable[[np.ndarray], np.ndarray]


class IntervalError(MomeError):
    """Rows from which no interval can be computed; the message says what is missing."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits, and how many seeds and documents it rests on.

    Limits are infinite where nothing shows the spread (a single seed or a single document).
    """

    estimate: float
    low: float
    high: float
    seeds: int
    documents: int

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit: all values times `factor` (negative factors swap the limits)."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.estimate * factor, low, high, self.seeds, self.documents)

    def shifted(self, offset: float) -> Interval:
        """The interval of the same effect counted from another origin, for example a ratio minus one."""
        return Interval(
            self.estimate + offset, self.low + offset, self.high + offset, self.seeds, self.documents
        )

    def exponential(self) -> Interval:
        """The interval of exp(value): a difference of nats per token becomes a ratio of perplexities."""
        high = exp(self.high) if self.high < 700 else inf
        return Interval(exp(self.estimate), exp(self.low), high, self.seeds, self.documents)

    def text(self, digits: int = 3) -> str:
        """Readable form, for sentences that are computed: ``0.123 (95 % interval 0.1 to 0.15)``."""
        return f"{self.estimate:.{digits}f} (95 % interval {self.low:.{digits}f} to {self.high:.{digits}f})"


def interval(
    rows: pd.DataFrame,
    by: By = "both",
    *,
    measure: Measure = "bits_per_byte",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Interval of one arm's score: the mean over languages of sum(loss) / sum(size), averaged over seeds.

    Args:
        rows: long format, one row per seed, language and document: `seed` (optional), `language`, `document`,
            `nats`, `bytes`, `tokens`. One arm, one setting, one stage.
        by: what is resampled: "both" (crossed, the default), "seed" or "document" alone.
        measure: "bits_per_byte", or "nats_per_token" (its exponential is the perplexity, as a geometric mean
            over languages).
    """
    return crossed_interval(rows, ["language"], mean_of_cells, by, measure=measure, level=level, draws=draws)


def paired_interval(
    rows_a: pd.DataFrame,
    rows_b: pd.DataFrame,
    by: By = "both",
    *,
    measure: Measure = "bits_per_byte",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Interval of the difference a - b, paired by seed and by document (below zero: a is better).

    Only seeds that both arms have are used; documents must be the same. Arguments as in `interval`. With
    ``measure="nats_per_token"`` the difference is the logarithm of the ratio of perplexities.
    """
    a, b = _with_seed(rows_a), _with_seed(rows_b)
    common = sorted(set(a["seed"]) & set(b["seed"]))
    if not common:
        raise IntervalError(
            "The two arms share no seed, so they cannot be paired: train both with the same seeds."
        )
    if set(zip(a["language"], a["document"], strict=True)) != set(
        zip(b["language"], b["document"], strict=True)
    ):
        raise IntervalError("The two arms were scored on different documents: score both on the same split.")
    both = pd.concat([a.assign(side=0), b.assign(side=1)], ignore_index=True)
    both = both[both["seed"].isin(common)]

    def difference(values: np.ndarray) -> np.ndarray:
        half = values.shape[-1] // 2  # cells are sorted: all languages of a, then all of b
        return np.asarray(values[..., :half].mean(-1) - values[..., half:].mean(-1))

    return crossed_interval(
        both, ["side", "language"], difference, by, measure=measure, level=level, draws=draws
    )


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of one value per seed, for what is measured once per run.

    No documents are resampled: `Interval.documents` is 0. A single value has no limits.
    """
    point = np.asarray(values, dtype=float)
    if point.ndim != 1 or len(point) == 0 or not np.isfinite(point).all():
        raise IntervalError("An interval over seeds needs one finite value per seed.")
    return combine(point, np.empty((0, len(point))), documents=0, by="seed", level=level)


def mean_of_cells(values: np.ndarray) -> np.ndarray:
    """The study's summary of several languages: their unweighted mean, [..., cells] -> [...]."""
    return np.asarray(values.mean(-1))


def crossed_interval(
    rows: pd.DataFrame,
    cells: Sequence[str],
    statistic: Statistic = mean_of_cells,
    by: By = "both",
    *,
    measure: Measure = "bits_per_byte",
    level: float = 0.95,
    draws: int = DRAWS,
) -> Interval:
    """Interval of any statistic of a table of scores, for example of a matrix R[stage, language].

    Args:
        rows: long format with `document`, `nats`, `bytes`, `tokens`, the columns of `cells`, and `seed` (one
            seed is assumed without it). Every seed must hold every cell and the same documents.
        cells: columns whose combinations are the cells of the table, sorted; each cell's score is
            sum(loss) / sum(size) over its documents.
        statistic: maps scores [..., cells] to [...]; called once for the seeds' own values and once for each
            chunk of resampled ones, so that a best value is chosen anew in every draw.
    """
    losses, sizes = cube(rows, cells, measure)
    point = statistic(losses.sum(1) / sizes.sum(1))
    sampled = np.concatenate([statistic(part) for part in resample(losses, sizes, draws)])
    return combine(point, sampled, documents=losses.shape[1], by=by, level=level)


def cube(
    rows: pd.DataFrame, cells: Sequence[str], measure: Measure = "bits_per_byte"
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and sizes [seeds, documents, cells]; a document absent from a cell counts zero in both.

    Raises:
        IntervalError: missing columns, no rows, repeated rows, or seeds that lack a cell or a document.
    """
    if measure not in ("bits_per_byte", "nats_per_token"):
        raise IntervalError(f"Unknown measure {measure!r}: choose bits_per_byte or nats_per_token.")
    rows = _with_seed(rows)
    missing = {"document", "nats", "bytes", "tokens", *cells} - set(rows.columns)
    if missing:
        raise IntervalError(
            f"The rows of scores lack the columns {sorted(missing)}: pass rows of score_documents."
        )
    if rows.empty:
        raise IntervalError(
            "There are no scores to compare: the arms, seeds or stages asked for match no rows."
        )
    if rows.duplicated(["seed", "document", *cells]).any():
        raise IntervalError(
            f"A document is scored twice for one seed and {', '.join(cells)}: select one arm and setting."
        )
    seed, seeds = pd.factorize(rows["seed"], sort=True)
    document, documents = pd.factorize(rows["document"], sort=True)
    cell = rows.groupby(list(cells), sort=True).ngroup().to_numpy()
    shape = (len(seeds), len(documents), int(cell.max()) + 1)
    losses, sizes, held = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    at = (seed, document, cell)
    losses[at] = rows["nats"] / LN2 if measure == "bits_per_byte" else rows["nats"]
    sizes[at] = rows["bytes"] if measure == "bits_per_byte" else rows["tokens"]
    held[at] = True
    if (sizes.sum(1) <= 0).any() or not held.any(2).all():
        raise IntervalError(
            "Not every seed has scores for the same documents and cells: score all seeds alike."
        )
    return losses, sizes


def resample(losses: np.ndarray, sizes: np.ndarray, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Scores [draw, seed, cell] with documents drawn with replacement, in chunks that bound memory.

    The same draw serves all seeds and cells, which keeps a topic's translations and both sides of a pair
    together. A draw that leaves a cell without any document is dropped.
    """
    documents = losses.shape[1]
    generator = np.random.default_rng(seed)
    chunk = max(1, min(draws, 4_000_000 // documents))
    flat = (len(losses), documents, -1)
    parts = []
    for first in range(0, draws, chunk):
        size = min(chunk, draws - first)
        weights = generator.multinomial(documents, np.full(documents, 1 / documents), size=size).astype(float)
        top = np.einsum("nd,sdc->nsc", weights, losses.reshape(flat), optimize=True)
        bottom = np.einsum("nd,sdc->nsc", weights, sizes.reshape(flat), optimize=True)
        valid = (bottom > 0).all((1, 2))
        parts.append(top[valid] / bottom[valid])
    return parts


def combine(
    point: np.ndarray, sampled: np.ndarray, *, documents: int, by: By = "both", level: float = 0.95
) -> Interval:
    """The interval of an effect from its value for each seed and its resamples; the module says how.

    Args:
        point: the effect of each seed, [seeds].
        sampled: the effect of each seed with documents drawn anew, [draws, seeds].
        documents: how many documents were drawn from; 0 for values measured once per run.
        by: what is chance: "both" (crossed, the default), "seed" or "document" alone.
        level: share of such intervals that shall hold the truth.

    Raises:
        IntervalError: an unknown ``by``.
    """
    if by not in ("both", "seed", "document"):
        raise IntervalError(f"Cannot resample by {by!r}: choose both, seed or document.")
    estimate, half = float(point.mean()), half_width(point, sampled, documents, by, level)
    return Interval(estimate, estimate - half, estimate + half, len(point), documents)


def _with_seed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if "seed" in rows.columns else rows.assign(seed=0)
