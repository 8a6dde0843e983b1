"""Forgetting metrics against hand-computed matrices and against plain loops on random ones."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mome_utils.config import MomeError
from mome_utils.forgetting import (
    METRICS,
    ForgettingError,
    average_performance,
    backward_transfer,
    first_language_forgetting,
    forgetting,
    forgetting_by_language,
    forward_transfer,
    intransigence,
    learning,
    metric_interval,
    metric_table,
    paired_metric_interval,
    r_matrix,
    rise_since_best,
    share_forgotten,
    stage_bands,
)
from mome_utils.relearning import savings, steps_to

# Three languages: the first is learned to 1.0 and ends at 3.0; the second was best before its own stage.
R = np.array([[1.0, 4.0, 6.0], [2.0, 5.0, 5.5], [3.0, 4.5, 2.0]])


def test_hand_computed_matrix():
    assert average_performance(R) == pytest.approx((3.0 + 4.5 + 2.0) / 3)
    assert forgetting_by_language(R) == pytest.approx([2.0, 0.5, -3.5])
    assert forgetting(R) == pytest.approx(1.25)
    assert first_language_forgetting(R) == pytest.approx(2.0)
    assert rise_since_best(R) == pytest.approx(-1 / 3)
    assert backward_transfer(R) == pytest.approx(((1.0 - 3.0) + (5.0 - 4.5)) / 2)
    assert forward_transfer(R, np.array([8.0, 8.0, 8.0])) == pytest.approx(((8 - 4.0) + (8 - 5.5)) / 2)
    assert learning(R) == pytest.approx((1.0 + 5.0 + 2.0) / 3)
    assert intransigence(R, np.array([1.5, 3.0, 1.5])) == pytest.approx((-0.5 + 2.0 + 0.5) / 3)
    # of 8 - 1 = 7 learned bits 2 are lost, of 8 - 4 = 4 (best before its own stage) half a bit
    assert share_forgotten(R, np.array([8.0, 8.0, 8.0])) == pytest.approx((2 / 7 + 0.5 / 4) / 2)


def test_experts_that_never_change_forget_nothing():
    frozen = np.array([[1.0, 9.0, 9.0], [1.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    assert forgetting(frozen) == 0 and backward_transfer(frozen) == 0


def loops(scores: list[list[float]], untrained: list[float]) -> dict[str, float]:
    """The metrics once more, from their definitions, without arrays."""
    stages = len(scores)
    last = scores[stages - 1]
    forgotten, backward, forward = 0.0, 0.0, 0.0
    for j in range(stages - 1):
        best = math.inf
        for stage in range(stages - 1):
            if scores[stage][j] < best:
                best = scores[stage][j]
        forgotten += last[j] - best
        backward -= last[j] - scores[j][j]
    for j in range(1, stages):
        forward += untrained[j] - scores[j - 1][j]
    total = 0.0
    for value in last:
        total += value
    count = stages - 1
    own, shares = 0.0, 0.0
    for j in range(stages):
        own += scores[j][j] / stages
    for j in range(count):
        best = min(scores[stage][j] for stage in range(stages - 1))
        shares += (last[j] - best) / (untrained[j] - best) / count if untrained[j] != best else math.nan
    return {
        "learning": own,
        "share": shares,
        "average": total / stages,
        "forgetting": forgotten / count,
        "backward": backward / count,
        "forward": forward / count,
    }


@given(st.integers(2, 6).flatmap(lambda n: arrays(float, (n + 1, n), elements=st.floats(0.1, 20))))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_metrics_agree_with_loops_on_random_matrices(values):
    untrained, scores = values[0] + 20, values[1:]  # nobody is worse than untrained
    expected = loops(scores.tolist(), untrained.tolist())
    assert average_performance(scores) == pytest.approx(expected["average"])
    assert forgetting(scores) == pytest.approx(expected["forgetting"])
    assert backward_transfer(scores) == pytest.approx(expected["backward"])
    assert forward_transfer(scores, untrained) == pytest.approx(expected["forward"])
    assert learning(scores) == pytest.approx(expected["learning"])
    assert intransigence(scores, untrained) == pytest.approx(expected["learning"] - np.mean(untrained))
    if math.isfinite(expected["share"]):
        assert share_forgotten(scores, untrained) == pytest.approx(expected["share"])
    # The best earlier score is no worse than the one right after the language's own stage.
    assert forgetting(scores) >= -backward_transfer(scores) - 1e-9
    stacked = np.stack([scores, scores + 1])
    for metric in METRICS.values():
        more = ([untrained, untrained],) if metric.baseline else ()
        found = metric.function(stacked, *map(np.stack, more))
        assert found.shape == (2,)
        assert found[0] == pytest.approx(float(metric.function(scores, *([untrained] if more else []))))


def rows_of(matrices: dict[int, np.ndarray], languages: dict[int, list[str]], noise=0.0) -> pd.DataFrame:
    """Rows whose scores are the matrices (plus noise between documents): 10 documents of 50 bytes."""
    generator = np.random.default_rng(0)
    rows = []
    for seed, matrix in matrices.items():
        for i, stage in enumerate(matrix):
            for language, value in zip(languages[seed], stage, strict=True):
                for name in range(10):
                    nats = (value + generator.normal(0, noise)) * 50 * math.log(2)
                    rows.append((seed, i + 1, language, f"d{name}", nats, 50, 20))
    return pd.DataFrame(rows, columns=["seed", "stage", "language", "document", "nats", "bytes", "tokens"])


def test_the_matrix_is_read_from_rows_in_the_order_of_learning():
    order = ["fr", "en", "py"]  # not alphabetic
    rows = rows_of({0: R, 1: R + 2}, {0: order, 1: order})
    np.testing.assert_allclose(r_matrix(rows, order), R + 1)
    np.testing.assert_allclose(r_matrix(rows, order, stages=[1, 3]), (R + 1)[[0, 2]])
    np.testing.assert_allclose(r_matrix(rows.sample(frac=1, random_state=1), order), R + 1)
    np.testing.assert_allclose(r_matrix(rows, ["en", "py"], stages=[1, 2, 3]), (R + 1)[:, 1:])
    other = r_matrix(rows, order, measure="nats_per_token")
    np.testing.assert_allclose(other, (R + 1) * 50 * math.log(2) / 20)


def test_intervals_of_metrics_with_an_order_of_each_seeds_own():
    orders = {0: ["fr", "en", "py"], 1: ["py", "fr", "en"], 2: ["en", "py", "fr"]}
    rows = rows_of(dict.fromkeys(orders, R), orders)
    found = metric_interval(rows, orders, first_language_forgetting)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (found.seeds, found.documents) == (3, 10)
    noisy = metric_interval(rows_of(dict.fromkeys(orders, R), orders, noise=0.3), orders, forgetting)
    assert noisy.low < noisy.estimate < noisy.high


def test_the_table_holds_every_metric_of_every_arm():
    order = ["fr", "en", "py"]
    rows = rows_of({0: R, 1: R, 2: R}, dict.fromkeys(range(3), order))
    table = metric_table({"sequential": rows, "single session": rows}, order)
    assert len(table) == 2 * sum(not metric.baseline for metric in METRICS.values())
    estimates = table.set_index(["arm", "metric"])["estimate"]
    assert estimates["sequential", "forgetting"] == pytest.approx(1.25)


def test_metrics_against_a_baseline_use_its_own_draws():
    order = ["fr", "en", "py"]
    rows = rows_of({0: R, 1: R + 1}, {0: order, 1: order}, noise=0.1)
    base = {seed: np.array([[8.0, 8.0, 9.0]]) for seed in (0, 1)}
    untrained = rows_of(base, {0: order, 1: order}).drop(columns="stage")
    found = metric_interval(rows, order, forward_transfer, baseline=untrained)
    exact = np.mean([float(forward_transfer(R + seed, base[seed][0])) for seed in (0, 1)])
    assert found.estimate == pytest.approx(exact, abs=0.1) and found.low < found.estimate < found.high
    # Scored on itself a model is no worse than itself, in every draw.
    own = rows[rows["stage"] == 3]
    same = metric_interval(rows, order, lambda r, b: (r[..., -1, :] - b).mean(-1), baseline=own)
    assert (same.estimate, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-12)
    table = metric_table({"one": rows}, order, untrained=untrained, joint=own).set_index("metric")["estimate"]
    assert set(table.index) == set(METRICS)
    assert table["forward transfer"] == pytest.approx(found.estimate)


def test_a_paired_interval_drops_what_the_arms_share():
    order = ["fr", "en", "py"]
    orders = dict.fromkeys(range(3), order)
    a = rows_of(dict.fromkeys(range(3), R), orders, noise=0.5)
    worse = R + np.array([[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0]])
    b = a.assign(nats=a["nats"] + 50 * math.log(2) * np.where((a["stage"] == 3) & (a["language"] != "py"), 0.5, 0))
    found = paired_metric_interval(b, a, order, backward_transfer)
    expected = float(backward_transfer(worse) - backward_transfer(R))
    assert (found.estimate, found.low, found.high) == pytest.approx((expected,) * 3)
    alone = metric_interval(a, order, backward_transfer)
    assert alone.high - alone.low > 0.1
    fewer = paired_metric_interval(b[b["seed"] < 2], a, order, forgetting, baseline=None)
    assert fewer.seeds == 2
    with pytest.raises(ForgettingError, match="share no seed"):
        paired_metric_interval(a[a["seed"] == 0], a[a["seed"] == 1], order, forgetting)


def test_steps_to_a_score_are_read_between_the_points():
    curve = pd.DataFrame({"step": [20, 10, 30], "value": [3.0, 5.0, 2.0]})
    assert steps_to(curve, 4.0) == pytest.approx(15)
    assert steps_to(curve, 2.0) == 30
    assert steps_to(curve, 6.0) == 10  # reached before the first point: where is not known
    assert steps_to(curve, 6.0, start=7.0) == pytest.approx(5)
    assert steps_to(curve, 6.0, start=5.5) == 0
    assert math.isinf(steps_to(curve, 1.0))
    assert savings(30, 15) == 0.5 and savings(30, 0) == 1 and savings(10, 20) == -1
    with pytest.raises(MomeError, match="reached the target"):
        savings(math.inf, 3)


def test_stage_bands_follow_one_another():
    assert stage_bands(["en", "fr"], [10, 25]) == [(0, 10, "en"), (10, 25, "fr")]
    for ends in ([10], [25, 10], [0, 10]):
        with pytest.raises(ForgettingError, match="stage ends"):
            stage_bands(["en", "fr"], ends)


def test_incomplete_scores_are_refused_in_one_sentence():
    order = ["fr", "en", "py"]
    rows = rows_of({0: R}, {0: order})
    with pytest.raises(ForgettingError, match="no column 'stage'"):
        r_matrix(rows.drop(columns="stage"), order)
    with pytest.raises(ForgettingError, match="lack some"):
        r_matrix(rows[rows["stage"] != 2], order)
    with pytest.raises(ForgettingError, match="order per seed"):
        metric_interval(rows, {1: order}, forgetting)
    with pytest.raises(ForgettingError, match="one stage per language"):
        forgetting(R[:2])
    with pytest.raises(ForgettingError, match="at least two"):
        forgetting_by_language(R[:1])
