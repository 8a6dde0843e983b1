"""Intervals over crossed seeds and documents hold the truth as often as they say, and are no wider than that takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from mome_utils.crossed import half_width, variance_parts
from mome_utils.intervals import IntervalError, combine

STUDIES, DOCUMENTS, DRAWS = 2000, 40, 300

#: Standard deviations of the mean that come from seeds (were there one), from documents, and from their pairs.
SPREADS = {
    "seeds": (1.0, 0.15, 0.05),
    "seeds, then documents": (1.0, 0.25, 0.1),
    "documents": (0.02, 1.0, 0.1),
    "interaction": (0.0, 0.0, 1.0),
    "all alike": (1.0, 0.7, 0.7),
}


def studies(seeds: int, spread: tuple[float, float, float]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Studies of normal crossed effects around 0: the seeds' values, and those with documents drawn anew."""
    chance = np.random.default_rng(5)
    of_seed, of_document, of_both = spread
    draws = chance.multinomial(DOCUMENTS, np.full(DOCUMENTS, 1 / DOCUMENTS), size=DRAWS) / DOCUMENTS
    for _ in range(STUDIES):
        y = of_seed * chance.standard_normal((1, seeds)) + DOCUMENTS**0.5 * (
            of_document * chance.standard_normal((DOCUMENTS, 1)) + of_both * chance.standard_normal((DOCUMENTS, seeds))
        )
        yield y.mean(0), draws @ y


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("name", SPREADS)
def test_intervals_cover_whatever_dominates(name: str, seeds: int) -> None:
    """Satterthwaite's freedom, estimated from three seeds, would cover only 92 to 93 % of the first two."""
    spread = SPREADS[name]
    found = [combine(point, sampled, documents=DOCUMENTS) for point, sampled in studies(seeds, spread)]
    held = np.mean([one.low <= 0 <= one.high for one in found])
    assert held >= 0.945
    if name == "documents":  # as narrow as if the exact standard error were known, but for the quantile's 3 %
        exact = 1.96 * np.hypot(spread[0] / seeds**0.5, np.hypot(spread[1], spread[2] / seeds**0.5))
        assert np.mean([one.high - one.low for one in found]) / 2 < 1.06 * exact
    if name == "seeds":  # Student's t of the seeds alone covers this nearly as well: no wider than 10 % beyond it
        alone = [combine(p, s, documents=DOCUMENTS, by="seed") for p, s in studies(seeds, spread)]
        assert sum(one.high - one.low for one in found) < 1.1 * sum(one.high - one.low for one in alone)


def test_each_source_keeps_its_own_quantile() -> None:
    chance = np.random.default_rng(0)
    point = np.array([0.1, 0.5, 0.3])
    sampled = point + chance.normal(0, 0.2, (500, 1)) + chance.normal(0, 0.1, (500, 3))
    of_seeds, of_documents, shared = variance_parts(point, sampled, 40)
    assert of_seeds == pytest.approx(0.04 / 3) and 0 < shared < of_documents
    t_seeds, t_documents = stats.t.ppf(0.95, [2, 39])
    both, seed, document = (combine(point, sampled, documents=40, by=by, level=0.9) for by in
                            ("both", "seed", "document"))
    assert (seed.high - seed.estimate) ** 2 == pytest.approx(t_seeds**2 * of_seeds)
    assert (document.high - document.estimate) ** 2 == pytest.approx(t_documents**2 * of_documents)
    assert (both.high - both.estimate) ** 2 == pytest.approx(
        t_seeds**2 * of_seeds + t_documents**2 * (of_documents - shared))


def test_what_nothing_shows_has_no_limits() -> None:
    one, many = np.array([1.0]), np.array([1.0, 2.0])
    none = np.empty((0, 1))
    assert half_width(one, none, 0) == half_width(one, none, 0, "document") == np.inf
    assert half_width(many, np.empty((0, 2)), 0) == half_width(many, np.empty((0, 2)), 0, "seed")
    assert combine(many, np.empty((0, 2)), documents=0, by="document").high == np.inf
    with pytest.raises(IntervalError, match="choose both, seed or document"):
        combine(many, np.empty((0, 2)), documents=0, by="language")  # type: ignore[arg-type]
