"""Calibration and risk of the router's confidence: against independent computations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.config import MomeError
from mome_utils.router_confidence import ece, reliability, risk_coverage


def two_way(confidence: list[float], correct: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of two languages whose larger one is given, and labels that make them right or wrong."""
    chance = np.array([[c, 1 - c] for c in confidence])
    return chance, 1 - np.array(correct)


def test_a_reliability_diagram_by_hand() -> None:
    chance, labels = two_way([0.55, 0.6, 0.61, 0.79, 0.95, 1.0], [1, 0, 1, 1, 1, 0])
    table = reliability(chance, labels, bins=5)
    assert table["sequences"].tolist() == [2, 2, 2]  # (0.4, 0.6], (0.6, 0.8], (0.8, 1]
    assert table["low"].tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert table["confidence"].tolist() == pytest.approx([0.575, 0.7, 0.975])
    assert table["accuracy"].tolist() == [0.5, 1.0, 0.5]
    assert table["gap"].tolist() == pytest.approx([-0.075, 0.3, -0.475])
    assert ece(chance, labels, bins=5) == pytest.approx((0.075 + 0.3 + 0.475) / 3)
    mass = reliability(chance, labels, bins=3, by="mass")
    assert mass["sequences"].tolist() == [2, 2, 2] and mass["high"].tolist() == [0.6, 0.79, 1.0]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 40))
def test_ece_is_the_definition(seed: int, bins: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    chance = generator.dirichlet(np.ones(4), size=n)
    labels = generator.integers(4, size=n)
    for by in ("width", "mass"):
        groups: dict[int, list[int]] = {}
        order = sorted(range(n), key=lambda i: max(chance[i]))
        for i in range(n):
            if by == "width":
                bin_ = next(m for m in range(bins) if max(chance[i]) <= (m + 1) / bins or m == bins - 1)
            else:
                bin_ = order.index(i) * bins // n
            groups.setdefault(bin_, []).append(i)
        hits, sure = (chance.argmax(1) == labels).tolist(), chance.max(1).tolist()
        expected = sum(abs(sum(hits[i] - sure[i] for i in own)) for own in groups.values()) / n
        assert ece(chance, labels, bins, by=by) == pytest.approx(expected)


def test_calibrated_probabilities_have_little_error_and_sharpened_ones_much() -> None:
    generator = np.random.default_rng(0)
    chance = generator.dirichlet(np.ones(4), size=20_000)
    labels = (chance.cumsum(1) < generator.random((20_000, 1))).sum(1)
    sharp = chance**3 / (chance**3).sum(1, keepdims=True)
    for by in ("width", "mass"):
        assert ece(chance, labels, by=by) < 0.015 < 0.1 < ece(sharp, labels, by=by)


def test_equal_confidences_stay_in_one_bin() -> None:
    chance, labels = two_way([0.7] * 9 + [0.9], [1] * 10)
    assert reliability(chance, labels, bins=5, by="mass")["sequences"].tolist() == [9, 1]


@pytest.mark.parametrize(("chance", "labels", "options", "message"), [
    (np.ones((3, 2)) / 2, np.zeros(2), {}, "do not fit"), (np.empty((0, 2)), np.zeros(0), {}, "do not fit"),
    (np.array([[2.0, -1.0]]), np.zeros(1), {}, "are no probabilities"),
    (np.array([[0.5, 0.5]]), np.zeros(1), {"bins": 0}, "cannot be made"),
    (np.array([[0.5, 0.5]]), np.zeros(1), {"by": "count"}, "cannot be made"),
])
def test_what_cannot_be_calibrated(chance: np.ndarray, labels: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(MomeError, match=message):
        reliability(chance, labels, **options)


# ------------------------------------------------------------------------------------- risk and coverage


def naive_area(correct: list[bool]) -> float:
    """Mean selective risk of answers in the given order, surest first."""
    return float(np.mean([1 - np.mean(correct[: k + 1]) for k in range(len(correct))]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([0.3, 0.5, 0.8, 0.9]), st.booleans()), min_size=1, max_size=6))
def test_the_area_is_the_mean_over_the_orders_of_equal_confidences(answers: list[tuple[float, bool]]) -> None:
    confidence, correct = np.array([a[0] for a in answers]), np.array([a[1] for a in answers])
    curve = risk_coverage(confidence, correct)
    orders = [p for p in permutations(range(len(answers))) if all(np.diff(confidence[list(p)]) <= 0)]
    areas = [naive_area([bool(correct[i]) for i in order]) for order in orders]
    assert curve.area == pytest.approx(np.mean(areas))
    assert curve.best_area == pytest.approx(naive_area(sorted(correct.tolist(), reverse=True)))
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        kept = confidence >= threshold
        assert coverage == pytest.approx(kept.mean()) and risk == pytest.approx(1 - correct[kept].mean())
    assert curve.coverage[-1] == 1 and (np.diff(curve.threshold) < 0).all()


def test_a_threshold_for_a_risk() -> None:
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.5])
    correct = np.array([True, True, False, True, True, False])
    curve = risk_coverage(confidence, correct)
    assert curve.abstain_below(0.0) == 0.9
    assert curve.abstain_below(0.2) == 0.6  # 1 error in 5: a larger coverage than 1 in 3 allows
    assert curve.abstain_below(1.0) == 0.5
    with pytest.raises(MomeError, match="ask for 0.333 or more"):
        risk_coverage(confidence, np.array([False, True, True, False, False, False])).abstain_below(0.1)


@pytest.mark.parametrize(("confidence", "correct"), [([], []), ([0.5], [True, False]), ([np.nan], [True])])
def test_what_has_no_risk(confidence: list[float], correct: list[bool]) -> None:
    with pytest.raises(MomeError, match="one finite confidence"):
        risk_coverage(np.array(confidence), np.array(correct, dtype=bool))
