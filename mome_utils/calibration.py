"""Do the ledger's intervals cover, and do its verdicts err as rarely as they say? Simulated studies with known truth.

A simulated study has the design of the real one: its seeds, its number of test documents with their sizes, and
chance of the same size. The model of a paired effect y in bits per byte is that of two crossed random factors,

    y[seed, document, language] = truth + S[seed] + D[document, language] + E[seed, document, language]

``S`` is normal; a document brings its whole row of ``D`` and its sizes, drawn with replacement from the real documents
(tails and correlations between the translations of a topic are real ones); ``E`` is normal with a variance per
language. Their variances are estimated from the rows of a published comparison by the analysis of variance (Searle,
Casella & McCulloch 1992, ch. 4). The truth is the effect on the population of documents drawn from, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import pandas as pd

from mome_utils.config import MomeError
from mome_utils.evidence import Sampled
from mome_utils.intervals import LN2

__all__ = ["Design", "coverage", "design_of", "percentile_limits", "simulate"]

#: Redraws of documents per simulated study: the variance they estimate is then good to 7 %.
DRAWS = 400


@dataclass(frozen=True)
class Design:
    """How a comparison is measured, and how much chance is in it.

    Attributes:
        seeds: number of seeds.
        sizes: bytes of each document, [documents, languages]; 0 where a document has no text in a language.
        documents: effects of the documents around the truth in bits per byte, [documents, languages]; their means
            weighted by bytes are zero, and so is their share of the effect.
        seed_sd: standard deviation between seeds, bits per byte.
        rest_sd: standard deviation of what is left, per language, of one document of mean size, [languages].
    """

    seeds: int
    sizes: np.ndarray
    documents: np.ndarray
    seed_sd: float
    rest_sd: np.ndarray

    def louder(self, factor: float) -> Design:
        """The same design with every source of chance ``factor`` times as large."""
        return replace(self, documents=factor * self.documents, seed_sd=factor * self.seed_sd,
                       rest_sd=factor * self.rest_sd)

    def share_of_seeds(self) -> float:
        """The part of the variance of the estimate that comes from the seeds, from 0 to 1."""
        weights = self.sizes / self.sizes.sum(0) / self.sizes.shape[1]
        count = len(self.sizes)
        of_documents = count / (count - 1) * float(((weights * self.documents).sum(1) ** 2).sum())
        of_rest = float((weights**2 * self._rest_variance()).sum()) / self.seeds
        of_seeds = self.seed_sd**2 / self.seeds
        total = of_seeds + of_documents + of_rest
        return of_seeds / total if total > 0 else 0.0

    def _rest_variance(self) -> np.ndarray:
        """Variance of E for each document and language: larger documents average over more."""
        return np.asarray(self.rest_sd**2 * _mean_size(self.sizes) * _inverse(self.sizes))


def design_of(rows: pd.DataFrame) -> Design:
    """The design of a published paired comparison, its chance estimated from its rows.

    Args:
        rows: :func:`mome_utils.evidence.evidence_rows` of a comparison of two sides: ``cell, seed, document, nats,
            bytes``; both sides and all seeds on the same documents.

    Raises:
        MomeError: fewer than two seeds, or documents that a side or a seed lacks.
    """
    table = rows.pivot_table(index=["seed", "document"], columns="cell", values=["nats", "bytes"], aggfunc="sum",
                             fill_value=0)
    seeds, documents = (len(table.index.levels[i]) for i in (0, 1))
    half = rows["cell"].nunique() // 2
    alike = len(table) == seeds * documents
    if alike:
        nats, size = (table[name].to_numpy().reshape(seeds, documents, -1) for name in ("nats", "bytes"))
        alike = bool((size[..., :half] == size[..., half:]).all() and (size == size[0]).all())
    if seeds < 2 or not alike:
        raise MomeError("A design needs two seeds or more, all on the same documents, as both sides: pass whole rows.")
    sizes = size[0, :, :half].astype(float)
    effects = (nats[..., :half] - nats[..., half:]) / LN2 * _inverse(sizes)
    weights = sizes / sizes.sum(0)
    held = (sizes > 0).sum(0)  # documents with text in each language
    of_seed = (weights * effects).sum(1)  # [seeds, languages]
    rest = effects - effects.mean(0) - (of_seed - of_seed.mean(0))[:, None, :]
    # Each document takes part in its own means: their degrees of freedom are gone.
    rest_variance = (weights * rest**2).sum((0, 1)) * held / ((seeds - 1) * np.maximum(held - 1, 1))
    middle = effects.mean(0)
    mean = (weights * middle).sum(0)
    around = np.where(sizes > 0, middle - mean, 0.0)
    # A document's mean over seeds holds 1/S of the rest's variance: shrunk so that what is left is its own.
    spread = (weights * around**2).sum(0)
    own = np.clip(1 - rest_variance / seeds / np.where(spread > 0, spread, 1), 0, 1)
    of_rest = (rest_variance * _mean_size(sizes) * _inverse(sizes) * weights**2).sum() / half**2
    between = float(of_seed.mean(1).var(ddof=1))
    return Design(seeds, sizes, around * np.sqrt(own), sqrt(max(0.0, between - of_rest)), np.sqrt(rest_variance))


def _mean_size(sizes: np.ndarray) -> np.ndarray:
    """Mean size of the documents that a language has, [languages]."""
    return np.asarray(sizes.sum(0) / np.maximum((sizes > 0).sum(0), 1))


def _inverse(sizes: np.ndarray) -> np.ndarray:
    """1 / size, and 0 where there is no text."""
    return np.asarray(np.divide(1.0, sizes, out=np.zeros_like(sizes, dtype=float), where=sizes > 0))


def simulate(design: Design, truth: float, studies: int, seed: int = 0, draws: int = DRAWS) -> Iterator[Sampled]:
    """The evidence of ``studies`` simulated studies in which the effect is ``truth`` bits per byte.

    Each is resampled like real evidence, by redrawing its documents; many at once, so that a thousand take a second.

    Args:
        design: design and chance.
        truth: the effect on the population of documents and seeds.
        studies: how many.
        seed: of the simulation.
        draws: redraws of documents in each study.
    """
    generator = np.random.default_rng(seed)
    count, languages = design.sizes.shape
    redraws = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
    chunk = 100
    rest = np.sqrt(design._rest_variance())
    for first in range(0, studies, chunk):
        n = min(chunk, studies - first)
        drawn = generator.integers(count, size=(n, count))
        sizes = design.sizes[drawn]  # [n, documents, languages]
        of_seeds = design.seed_sd * generator.standard_normal((n, design.seeds, 1, 1))
        chance = generator.standard_normal((n, design.seeds, count, languages)) * rest[drawn][:, None]
        effects = truth + of_seeds + design.documents[drawn][:, None] + chance
        losses = effects * sizes[:, None]
        point = (losses.sum(2) / np.maximum(sizes.sum(1), 1)[:, None]).mean(-1)  # [n, seeds]
        flat = losses.transpose(2, 0, 1, 3).reshape(count, -1)
        top = (redraws @ flat).reshape(draws, n, design.seeds, languages)
        bottom = (redraws @ sizes.transpose(1, 0, 2).reshape(count, -1)).reshape(draws, n, 1, languages)
        sampled = (top / np.maximum(bottom, 1)).mean(-1)  # [draws, n, seeds]
        for i in range(n):
            yield Sampled(point[i], sampled[:, i], count)


def coverage(design: Design, studies: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """How often intervals of simulated studies hold the truth: the ledger's, and two plain percentile bootstraps.

    Returns:
        Shares from 0 to 1 by kind: ``crossed`` (the ledger's), ``percentile, seeds`` and
        ``percentile, seeds and documents`` (:func:`percentile_limits`).
    """
    held = {"crossed": 0, "percentile, seeds": 0, "percentile, seeds and documents": 0}
    for evidence in simulate(design, 0.0, studies, seed):
        found = evidence.at(level)
        held["crossed"] += found.low <= 0.0 <= found.high
        for by, name in ((False, "percentile, seeds"), (True, "percentile, seeds and documents")):
            low, high = percentile_limits(evidence, level, documents=by)
            held[name] += low <= 0.0 <= high
    return {name: count / studies for name, count in held.items()}


def percentile_limits(evidence: Sampled, level: float = 0.95, *, documents: bool = True) -> tuple[float, float]:
    """Limits of the plain percentile bootstrap: quantiles of the effect when seeds are redrawn with replacement.

    Args:
        evidence: an effect with its redraws.
        level: of the interval.
        documents: whether documents are redrawn, too; without it there are only S^S ways to redraw S seeds.
    """
    seeds = len(evidence.point)
    every = np.stack(np.meshgrid(*[np.arange(seeds)] * seeds, indexing="ij"), -1).reshape(-1, seeds)
    if documents:
        picks = every[np.arange(len(evidence.sampled)) % len(every)]
        means = np.take_along_axis(evidence.sampled, picks, 1).mean(1)
    else:
        means = evidence.point[every].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
