"""How far the router's confidence can be trusted: reliability diagrams, calibration error, risk against coverage.

Calibration follows Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), and Naeini et al.,
"Obtaining Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015); the risk-coverage curve is that of
Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks" (arXiv 1705.08500), its area that of Geifman,
Uziel & El-Yaniv (arXiv 1805.08206).

Shapes: ``n`` windows or sequences, ``L`` languages. Probabilities, risks and calibration errors are shares, 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mome_utils.config import MomeError

__all__ = ["RiskCoverage", "ece", "reliability", "risk_coverage"]


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, *, by: str = "width") -> pd.DataFrame:
    """The reliability diagram of the most probable language: is it right as often as its probability says?

    Args:
        probabilities: [n, L]. labels: index of the true language [n].
        bins: how many. by: ``width``, bins (m-1)/M < p ≤ m/M (Guo et al., eq. 3; Naeini et al. 2015), or ``mass``,
            bins that hold the same number of sequences, as near as equal confidences, which stay together, allow.

    Returns:
        Rows (low, high, sequences, confidence, accuracy, gap), one per bin that is not empty: the limits of the bin
        (for ``mass`` the smallest and largest confidence in it), the means of confidence and of correctness, and
        accuracy minus confidence.

    Raises:
        MomeError: shapes that do not fit, nothing to bin, rows that are no probabilities, or an unknown ``by``.
    """
    chance, truth = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if chance.ndim != 2 or truth.shape != chance.shape[:1] or not chance.size:
        raise MomeError(f"Probabilities {chance.shape} and labels {truth.shape} do not fit: give [n, L] and [n].")
    if not (chance >= 0).all() or not np.allclose(chance.sum(1), 1, atol=1e-4):
        raise MomeError("Rows that do not add up to 1 are no probabilities: use router.probabilities.")
    if bins < 1 or by not in ("width", "mass"):
        raise MomeError(f"{bins} bins by '{by}' cannot be made: use one bin or more, by 'width' or 'mass'.")
    confidence, correct = chance.max(1), chance.argmax(1) == truth
    if by == "width":
        at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    else:
        rank = np.searchsorted(np.sort(confidence), confidence)  # how many are less sure
        at = rank * bins // len(confidence)
    rows = pd.DataFrame({"bin": at, "confidence": confidence, "correct": correct})
    table = rows.groupby("bin").agg(
        low=("confidence", "min"), high=("confidence", "max"), sequences=("correct", "size"),
        confidence=("confidence", "mean"), accuracy=("correct", "mean"),
    )
    if by == "width":
        table["low"], table["high"] = table.index / bins, (table.index + 1) / bins
    return table.assign(gap=table["accuracy"] - table["confidence"]).reset_index(drop=True)


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, *, by: str = "width") -> float:
    """Expected calibration error, 0 to 1: the mean over sequences of their bin's |accuracy - confidence|.

    Equation 3 of Guo et al. (arXiv 1706.04599) after Naeini et al. (2015) with bins of equal width; with equal mass
    it does not depend on a few crowded bins. Few sequences per bin bias it upwards. Arguments and errors are those
    of :func:`reliability`.
    """
    table = reliability(probabilities, labels, bins, by=by)
    return float(np.average(table["gap"].abs(), weights=table["sequences"]))


@dataclass(frozen=True)
class RiskCoverage:
    """What a threshold on the confidence buys.

    Attributes:
        threshold: every confidence that occurs, falling [m]. Sequences at or above it are answered.
        coverage: share of the sequences answered [m], rising to 1. risk: share of errors among those [m].
        area: mean risk over the coverages 1/n, 2/n … 1 (AURC). Where confidences are equal, the expectation over
            their random order.
        best_area: the area if every error were less sure than every correct answer (Geifman et al., 2019): the
            rest of ``area`` is what a better confidence could save.
    """

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray
    area: float
    best_area: float

    def abstain_below(self, risk: float) -> float:
        """The smallest threshold, so the largest coverage, at which the risk is at most ``risk``.

        For ``router.abstain_below``. An estimate from these sequences, without the guarantee of Geifman &
        El-Yaniv's bound: check it on others.

        Raises:
            MomeError: no threshold reaches the risk.
        """
        allowed = np.flatnonzero(self.risk <= risk)
        if not len(allowed):
            raise MomeError(f"No threshold has a risk of {risk:g}: ask for {self.risk.min():.3g} or more.")
        return float(self.threshold[allowed[-1]])


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> RiskCoverage:
    """Risk against coverage when the least sure sequences are not answered (Geifman & El-Yaniv 2017).

    Args:
        confidence: [n], larger is surer. correct: [n] bool.

    Raises:
        MomeError: different lengths or nothing at all.
    """
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if sure.ndim != 1 or sure.shape != right.shape or not len(sure) or not np.isfinite(sure).all():
        raise MomeError("A risk-coverage curve needs one finite confidence and one result per sequence.")
    levels, group = np.unique(-sure, return_inverse=True)
    size = np.bincount(group).astype(float)
    errors = np.bincount(group, weights=~right)
    answered, wrong = size.cumsum(), errors.cumsum()
    n = len(sure)
    each = np.arange(1, n + 1)
    of = np.repeat(np.arange(len(levels)), size.astype(int))
    # Inside a group of equal confidence errors come evenly, in expectation.
    expected = (wrong - errors)[of] + (each - (answered - size)[of]) * (errors / size)[of]
    best = np.maximum(each - right.sum(), 0)
    return RiskCoverage(-levels, answered / n, wrong / answered, float((expected / each).mean()),
                        float((best / each).mean()))
