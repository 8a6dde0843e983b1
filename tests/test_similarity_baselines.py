"""Floors, places, folds and the jackknife: known values, coverage, and what happens with few seeds."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from mome_utils.config import MomeError
from mome_utils.intervals import seed_interval
from mome_utils.similarity import MEASURES, Space, compare
from mome_utils.similarity_baselines import ALL, jackknife, permuted, placed, topic_folds


def test_the_floor_is_the_mean_over_permuted_rows() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 30, 5))
    found = permuted(Space(x), Space(y), ["cka", "jaccard"], draws=3, seed=7)
    order = np.random.default_rng(7)
    by_hand = [compare("cka", x, y[order.permutation(30)]) for _ in range(3)]
    assert found["cka"] == pytest.approx(np.mean(by_hand))
    with pytest.raises(MomeError, match="one permutation or more, not 0"):
        permuted(Space(x), Space(y), draws=0)


def test_a_copy_of_a_model_falls_to_the_floor_when_its_rows_are_permuted() -> None:
    x = np.random.default_rng(1).normal(size=(60, 4))
    floors = permuted(Space(x), Space(x))
    for name, entry in MEASURES.items():
        assert abs(floors[name] - entry.identical) > 0.1 * (entry.high - entry.low), name


def test_places_count_from_floor_to_ceiling_for_distances_too() -> None:
    assert placed(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert placed(0.6, 1.0, 0.2) == pytest.approx(0.5)  # a distance: the ceiling of likeness is the smaller number
    assert (placed(0.1, 0.1, 0.7), placed(0.7, 0.1, 0.7)) == (0, 1)
    assert math.isnan(placed(0.5, 0.3, 0.3))


def test_folds_keep_topics_whole_and_are_of_equal_size() -> None:
    topics = [f"t{i % 12}" for i in range(60)]
    folds = topic_folds(topics, 4)
    by_topic = pd.Series(folds).groupby(topics).nunique()
    assert (by_topic == 1).all()
    assert np.bincount(folds).tolist() == [15] * 4
    assert np.array_equal(folds, topic_folds(topics, 4))
    for wrong in (1, 13):
        with pytest.raises(MomeError, match=f"12 topics do not make {wrong} folds"):
            topic_folds(topics, wrong)


def rows_of(values: np.ndarray) -> pd.DataFrame:
    """A table of topic means by seed, values [seeds, topics], with every topic left out in turn."""
    seeds, topics = values.shape
    found = []
    for seed in range(seeds):
        for fold in (ALL, *range(topics)):
            kept = values[seed] if fold == ALL else np.delete(values[seed], fold)
            found.append({"seed": seed, "fold": fold, "value": kept.mean()})
    return pd.DataFrame(found)


def mean(rows: pd.DataFrame) -> float:
    return float(rows["value"].mean())


def test_of_a_mean_the_jackknife_is_the_classical_interval() -> None:
    values = np.random.default_rng(0).normal(size=(1, 20))
    found = jackknife(rows_of(values), mean, [0])
    classical = seed_interval(values[0])  # Student's t over the topics
    assert (found.estimate, found.low, found.high) == pytest.approx((classical.estimate, classical.low, classical.high))
    assert (found.seeds, found.documents) == (1, 20)


def test_seeds_that_differ_widen_the_interval() -> None:
    base = np.random.default_rng(0).normal(size=20) * 0.1
    equal, apart = rows_of(np.tile(base, (3, 1))), rows_of(base + np.array([[-1], [0], [1]]))
    narrow, wide = (jackknife(rows, mean, [0, 1, 2]) for rows in (equal, apart))
    assert narrow.estimate == pytest.approx(wide.estimate)
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)
    # All spread lies between the seeds: their own t interval, up to the small part of the topics.
    of_seeds = seed_interval([base.mean() - 1, base.mean(), base.mean() + 1])
    assert wide.high == pytest.approx(of_seeds.high, rel=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits = np.random.default_rng(0), 0
    for _ in range(50):
        of_seed, of_topic, rest = (generator.normal(size=size) for size in ((3, 1), (1, 10), (3, 10)))
        values = 0.5 * of_seed + 0.5 * of_topic + 0.2 * rest
        found = jackknife(rows_of(values), mean, [0, 1, 2])
        hits += found.low <= 0 <= found.high
    assert hits / 50 >= 0.88


def pair_table(of_seed: dict[int, float], folds: int = 4) -> pd.DataFrame:
    seeds = sorted(of_seed)
    return pd.DataFrame([
        {"seed": a, "seed_b": b, "fold": fold, "value": of_seed[a] + of_seed[b] + 0.01 * max(fold, 0)}
        for fold in (ALL, *range(folds)) for i, a in enumerate(seeds) for b in seeds[i + 1 :]
    ])


def test_pairs_of_seeds_have_pseudo_values_of_seeds() -> None:
    # The statistic, the mean over pairs of u_a + u_b, is twice the mean of u: its pseudo-values are 2 u_s.
    values = {0: 0.1, 1: 0.4, 2: 0.2}
    found = jackknife(pair_table(values, folds=0), mean, [0, 1, 2])
    expected = seed_interval([2 * v for v in values.values()])
    assert found.estimate == pytest.approx(expected.estimate)
    assert found.high - found.low == pytest.approx(expected.high - expected.low)


def test_two_seeds_of_a_pair_statistic_leave_topics_as_the_only_spread() -> None:
    found = jackknife(pair_table({0: 0.1, 1: 0.4}), mean, [0, 1])
    assert found.seeds == 1 and found.documents == 4
    assert 0 < found.high - found.low < math.inf


def test_no_rows_or_no_number_gets_one_sentence() -> None:
    table = rows_of(np.ones((1, 3)))
    for rows in (table.iloc[:0], table[table["fold"] != ALL]):
        with pytest.raises(MomeError, match="no scores to compare"):
            jackknife(rows, mean, [0])
    with pytest.raises(MomeError, match="no scores to compare"):
        jackknife(table, lambda rows: float("nan"), [0])
