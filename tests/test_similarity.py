"""Measures of similarity: against naive second implementations, what each ignores and what not, and strange input."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import spearmanr
from sklearn.cross_decomposition import CCA

from mome_utils import similarity
from mome_utils.config import MomeError
from mome_utils.similarity import INVARIANCES, MEASURES, Space, compare, compare_all, compare_layers, minibatch_cka
from mome_utils.similarity_inputs import blocks, unit_norm, unit_rows

Matrix = np.ndarray
K = 6


def clouds(seed: int = 0, n: int = 40, a: int = 7, b: int = 9) -> tuple[Matrix, Matrix]:
    """Two representations that share some of what they hold, off-centre and of different scales."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(n, 5)) * [3, 2, 1, 1, 0.5]
    first = shared @ generator.normal(size=(5, a)) + generator.normal(size=(n, a)) + 2
    second = shared @ generator.normal(size=(5, b)) + generator.normal(size=(n, b)) - 1
    return first, 30 * second


# --------------------------------------------------------------------------- second implementations, as naive as can be


def centre(x: Matrix) -> Matrix:
    return np.array([row - sum(x) / len(x) for row in x])


def cosine(u: Matrix, v: Matrix) -> float:
    return float(u @ v / math.sqrt((u @ u) * (v @ v)))


def naive_cka(x: Matrix, y: Matrix) -> float:
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.trace(k @ m) / math.sqrt(np.trace(k @ k) * np.trace(m @ m))


def naive_hsic1(x: Matrix, y: Matrix) -> float:
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def naive_debiased_cka(x: Matrix, y: Matrix) -> float:
    return naive_hsic1(x, y) / math.sqrt(naive_hsic1(x, x) * naive_hsic1(y, y))


def rotated(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Both of unit norm and padded to one width, x turned onto y by scipy."""
    wide = max(x.shape[1], y.shape[1])
    a, b = (np.hstack([z, np.zeros((len(z), wide - z.shape[1]))]) for z in (centre(x), centre(y)))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    turn, _ = scipy.linalg.orthogonal_procrustes(a, b)
    return a @ turn, b


def naive_procrustes(x: Matrix, y: Matrix) -> float:
    a, b = rotated(x, y)
    return float(np.linalg.norm(a - b))


def naive_angular(x: Matrix, y: Matrix) -> float:
    a, b = rotated(x, y)
    return math.acos(float((a * b).sum()))


def naive_aligned_cosine(x: Matrix, y: Matrix) -> float:
    return float(np.mean([cosine(u, v) for u, v in zip(*rotated(x, y), strict=True)]))


def naive_rsa(x: Matrix, y: Matrix) -> float:
    distances = [
        [1 - np.corrcoef(z[i], z[j])[0, 1] for i in range(len(z)) for j in range(i)] for z in (centre(x), centre(y))
    ]
    return float(spearmanr(*distances).statistic)


def cosines(x: Matrix) -> Matrix:
    return np.array([[cosine(u, v) for v in centre(x)] for u in centre(x)])


def naive_rsm_difference(x: Matrix, y: Matrix) -> float:
    return float(np.linalg.norm(cosines(x) - cosines(y)) / len(x))


def lists(x: Matrix) -> list[list[int]]:
    table = cosines(x)
    return [sorted((j for j in range(len(x)) if j != i), key=lambda j, i=i: -table[i, j])[:K] for i in range(len(x))]


def naive_jaccard(x: Matrix, y: Matrix) -> float:
    pairs = zip(lists(x), lists(y), strict=True)
    return float(np.mean([len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs]))


def naive_second_order(x: Matrix, y: Matrix) -> float:
    sx, sy = cosines(x), cosines(y)
    found = []
    for i, (a, b) in enumerate(zip(lists(x), lists(y), strict=True)):
        union = sorted({*a} | {*b})
        found.append(cosine(sx[i, union], sy[i, union]))
    return float(np.mean(found))


def naive_rank(x: Matrix, y: Matrix) -> float:
    found = []
    for a, b in zip(lists(x), lists(y), strict=True):
        both = {*a} & {*b}
        ranks = [(a.index(j) + 1, b.index(j) + 1) for j in both]
        most = sum(1 / i for i in range(1, len(both) + 1))
        found.append(sum(2 / ((1 + abs(r - s)) * (r + s)) for r, s in ranks) / most if both else 0.0)
    return float(np.mean(found))


def correlations(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Canonical correlations and directions of x, from the covariance matrices."""
    x, y = centre(x), centre(y)
    xx, yy, xy = x.T @ x, y.T @ y, x.T @ y
    values, vectors = np.linalg.eig(np.linalg.inv(xx) @ xy @ np.linalg.inv(yy) @ xy.T)
    order = np.argsort(-values.real)[: min(x.shape[1], y.shape[1])]
    return np.sqrt(values.real[order]), vectors.real[:, order]


def naive_cca(x: Matrix, y: Matrix) -> float:
    return float(correlations(x, y)[0].mean())


def naive_svcca(x: Matrix, y: Matrix) -> float:
    kept = []
    for z in (centre(x), centre(y)):
        values, vectors = np.linalg.eigh(z.T @ z)
        share, parts = 0.0, []
        for i in np.argsort(-values):
            parts.append(vectors[:, i])
            share += values[i] / values.sum()
            if share >= 0.99:
                break
        kept.append(z @ np.array(parts).T)
    return naive_cca(*kept)


def naive_pwcca(x: Matrix, y: Matrix) -> float:
    values, directions = correlations(x, y)
    x = centre(x)
    variates = x @ directions
    variates /= np.linalg.norm(variates, axis=0)
    weights = np.array([sum(abs(h @ column) for column in x.T) for h in variates.T])
    return float(values @ weights / weights.sum())


NAIVE: dict[str, Callable[[Matrix, Matrix], float]] = {
    "cka": naive_cka, "debiased_cka": naive_debiased_cka, "procrustes": naive_procrustes, "angular": naive_angular,
    "aligned_cosine": naive_aligned_cosine, "rsa": naive_rsa, "rsm_difference": naive_rsm_difference,
    "jaccard": naive_jaccard, "second_order_cosine": naive_second_order, "rank_similarity": naive_rank,
    "cca": naive_cca, "svcca": naive_svcca, "pwcca": naive_pwcca,
}
each_measure = pytest.mark.parametrize("name", MEASURES)


@each_measure
@pytest.mark.parametrize("widths", [(7, 9), (9, 7), (6, 6)])
def test_every_measure_agrees_with_a_second_implementation(name: str, widths: tuple[int, int]) -> None:
    x, y = clouds(3, a=widths[0], b=widths[1])
    assert compare(name, x, y, neighbours=K) == pytest.approx(NAIVE[name](x, y), abs=1e-9)


def test_libraries_that_have_a_measure_agree() -> None:
    x, y = clouds(5, a=6, b=6)
    # scipy's disparity allows a scale too: 1 − ‖xᵀy‖_*², where the distance squared is 2 − 2 ‖xᵀy‖_*.
    disparity = scipy_procrustes(x, y)[2]
    assert 1 - (1 - compare("procrustes", x, y) ** 2 / 2) ** 2 == pytest.approx(disparity, abs=1e-9)
    a, b = CCA(n_components=6, scale=False, max_iter=5000, tol=1e-12).fit_transform(x, y)
    found = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(6)])
    assert compare("cca", x, y) == pytest.approx(found, abs=1e-3)


# -------------------------------------------------------------------------------- what a measure ignores, or not


def image(x: Matrix, change: str, seed: int) -> Matrix:
    generator = np.random.default_rng(seed)
    d = x.shape[1]
    if change == "permutation":
        return x[:, generator.permutation(d)]
    if change == "orthogonal":
        return x @ np.linalg.qr(generator.normal(size=(d, d)))[0]
    if change == "invertible":
        return x @ (generator.normal(size=(d, d)) + 2 * np.eye(d))
    return x * 7.5 if change == "scaling" else x + generator.normal(size=d) * 5


@each_measure
@pytest.mark.parametrize("change", INVARIANCES)
def test_claimed_invariances_hold_and_no_other(name: str, change: str) -> None:
    x, y = clouds(1)
    before = compare(name, x, y, neighbours=K)
    both = [abs(compare(name, image(x, change, 9), y, neighbours=K) - before),
            abs(compare(name, x, image(y, change, 9), neighbours=K) - before)]
    if change in MEASURES[name].invariances:
        assert max(both) < 1e-9
    else:
        assert max(both) > 1e-4


@each_measure
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), n=st.integers(12, 30), widths=st.tuples(st.integers(2, 20), st.integers(2, 20)))
def test_identity_symmetry_and_range(name: str, seed: int, n: int, widths: tuple[int, int]) -> None:
    entry = MEASURES[name]
    x, y = clouds(seed, n, *widths)
    assert compare(name, x, 3 * x + 1, neighbours=K) == pytest.approx(entry.identical, abs=1e-6)
    score = compare(name, x, y, neighbours=K)
    assert entry.low - 1e-9 <= score <= entry.high + 1e-9
    if entry.symmetric:
        assert compare(name, y, x, neighbours=K) == pytest.approx(score, abs=1e-9)


def test_projection_weights_come_from_the_first_representation() -> None:
    x, y = clouds(2)
    assert not MEASURES["pwcca"].symmetric
    assert abs(compare("pwcca", x, y) - compare("pwcca", y, x)) > 1e-3


def test_the_angular_metric_obeys_the_triangle_inequality() -> None:
    for seed in range(20):
        x, y = clouds(seed)
        z, _ = clouds(seed + 100)
        sides = [compare("angular", *pair) for pair in ((x, y), (y, z), (x, z))]
        assert max(sides) <= sum(sides) - max(sides) + 1e-12


# ------------------------------------------------------------------------------------------ known values


def test_known_values_of_orthogonal_representations() -> None:
    # Columns of a Hadamard matrix: centred, and orthogonal to each other.
    h = scipy.linalg.hadamard(16).astype(float)
    x, y = h[:, 1:4], h[:, 4:7]
    known = {"cka": 0, "procrustes": math.sqrt(2), "angular": math.pi / 2, "cca": 0, "svcca": 0, "pwcca": 0,
             "aligned_cosine": 0}
    for name, value in known.items():
        assert compare(name, x, y) == pytest.approx(value, abs=1e-7), name
    # Two of four directions in common, all of one size: CKA 2/4, nuclear norm 2/4, mean correlation 2/4.
    x, y = h[:, 1:5], h[:, 3:7]
    assert compare("cka", x, y) == pytest.approx(0.5)
    assert compare("angular", x, y) == pytest.approx(math.pi / 3)
    assert compare("procrustes", x, y) == pytest.approx(1.0)
    assert compare("cca", x, y) == pytest.approx(0.5)


def test_neighbours_of_a_circle_are_known() -> None:
    angles = np.arange(12) * math.tau / 12 + np.linspace(0, 0.02, 12)  # no two pairs equally near
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    found = similarity.nearest(circle, 2).indices
    assert [set(row) for row in found.tolist()] == [{(i - 1) % 12, (i + 1) % 12} for i in range(12)]
    # Every second point moves to the other side of the circle: neighbours in one are never neighbours in the other.
    turned = circle * np.where(np.arange(12) % 2, -1, 1)[:, None]
    assert compare("jaccard", circle, turned, neighbours=2, preprocessing=()) == 0
    assert compare("rank_similarity", circle, turned, neighbours=2, preprocessing=()) == 0
    assert compare("second_order_cosine", circle, turned, neighbours=2, preprocessing=()) < 0


def test_swapped_ranks_score_as_the_formula_says() -> None:
    # Two neighbours in common, ranks 1 and 2 swapped: (2/(2·3) + 2/(2·3)) / (1 + 1/2) = 4/9.
    a = similarity.nearest(np.random.default_rng(0).normal(size=(5, 3)), 2)
    b = a._replace(indices=a.indices[:, ::-1])
    assert MEASURES["rank_similarity"].function(a, b) == pytest.approx(4 / 9)
    assert MEASURES["jaccard"].function(a, b) == 1


def test_the_debiased_estimator_has_no_bias_and_the_plain_one_much() -> None:
    generator = np.random.default_rng(0)
    scores = [compare_all(generator.normal(size=(30, 60)), generator.normal(size=(30, 60)), ["cka", "debiased_cka"])
              for _ in range(60)]
    plain, debiased = (np.array([row[name] for row in scores]) for name in ("cka", "debiased_cka"))
    assert abs(debiased.mean()) < 3 * debiased.std() / math.sqrt(60)
    assert plain.min() > 0.5


# ------------------------------------------------------------------------------------------ minibatches


def test_one_batch_of_all_rows_is_the_exact_value() -> None:
    x, y = clouds(4, 100)
    assert minibatch_cka([(x, y)]) == pytest.approx(compare("debiased_cka", x, y), abs=1e-12)


def test_minibatches_estimate_the_same_whatever_their_size() -> None:
    x, y = clouds(4, 6000)
    exact = compare("debiased_cka", x, y)
    for size in (20, 100, 1000):
        parts = ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))
        assert minibatch_cka(parts) == pytest.approx(exact, abs=0.02)
    with pytest.raises(MomeError, match="no batch"):
        minibatch_cka([])
    with pytest.raises(MomeError, match="4 inputs or more"):
        minibatch_cka([(x[:3], y[:3])])


# ------------------------------------------------------------------------------------------ memory and many layers


def test_no_measure_needs_more_than_one_square_matrix_beside_its_views() -> None:
    """1,000 rows of 256 dimensions; a square matrix is 8 MB. Beside it: rows, and one side's ranks in RSA."""
    x, y = np.random.default_rng(0).normal(size=(2, 1000, 256))
    square = 8 * 1000 * 1000
    for name, entry in MEASURES.items():
        spaces = [Space(x), Space(y)]
        tracemalloc.start()
        compare(name, *spaces)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (1.9 if entry.view == "ranks" else 1.3) * square, f"{name}: {peak / square:.2f}"


def test_all_layer_pairs_are_the_single_comparisons() -> None:
    first, second = [clouds(i, a=5)[0] for i in range(2)], [clouds(i, b=4)[1] for i in range(3)]
    for name in ("cka", "jaccard", "pwcca"):
        found = compare_layers(name, first, second, neighbours=3)
        assert found.shape == (2, 3)
        assert found[1, 2] == compare(name, first[1], second[2], neighbours=3)


@pytest.mark.parametrize(("n", "a", "b"), [(40, 7, 9), (12, 30, 20)])
def test_measures_that_share_work_score_as_each_alone(n: int, a: int, b: int) -> None:
    x, y = (Space(z, neighbours=K) for z in clouds(11, n, a, b))
    together = compare_all(x, y)
    assert together == pytest.approx({name: compare(name, x.values, y.values, neighbours=K) for name in MEASURES})
    for name in ("cka", "procrustes", "svcca", "pwcca"):
        assert together[name] == pytest.approx(NAIVE[name](x.values, y.values), abs=1e-9) or n < a
    assert compare_all(x, y) == together  # the spaces keep their views, and nothing of the other


def test_a_product_is_computed_once_for_all_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    known = scipy.linalg.svdvals
    monkeypatch.setattr(scipy.linalg, "svdvals", lambda x: calls.append(1) or known(x))
    compare_all(*clouds(), ["procrustes", "angular", "cka", "debiased_cka"])
    assert len(calls) == 1


def test_a_space_computes_each_view_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    known = similarity.distance_ranks
    monkeypatch.setattr(similarity, "distance_ranks", lambda x: calls.append(1) or known(x))
    x, y = (Space(z) for z in clouds())
    assert compare("rsa", x, y) == compare("rsa", y, x)
    assert len(calls) == 2


def test_blocks_cover_all_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mome_utils.similarity_inputs.BLOCK", 100)
    assert [(p.start, p.stop) for p in blocks(25, 10)] == [(0, 10), (10, 20), (20, 25)]
    x, y = clouds(6)
    for name in ("rsa", "rsm_difference", "second_order_cosine"):
        assert compare(name, x, y, neighbours=K) == pytest.approx(NAIVE[name](x, y), abs=1e-9)


# ------------------------------------------------------------------------------------------ strange input


@each_measure
def test_fewer_rows_than_dimensions_have_an_answer(name: str) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 12, 40))
    score = compare(name, x, y, neighbours=4)
    assert MEASURES[name].low <= score <= MEASURES[name].high
    if name in ("cca", "pwcca"):  # both span all directions that twelve centred rows can: nothing is left to tell apart
        assert score == pytest.approx(1)


@each_measure
def test_repeated_and_zero_rows_have_an_answer(name: str) -> None:
    x, y = clouds(7)
    x[3:9] = x[3]
    x[10:14] = x.mean(0)
    assert math.isfinite(compare(name, x, y, neighbours=K))


@each_measure
def test_very_large_and_very_small_values_change_nothing(name: str) -> None:
    x, y = clouds(8)
    before = compare(name, x, y, neighbours=K)
    assert compare(name, x * 1e150, y * 1e-150, neighbours=K) == pytest.approx(before, abs=1e-6)


@each_measure
@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda x: np.ones_like(x), "same for every input"),
    (lambda x: np.where(np.arange(len(x))[:, None] == 2, np.nan, x), "missing or infinite"),
    (lambda x: x * np.inf, "missing or infinite"),
    (lambda x: x[:-1], "row i of both must belong to one input"),
    (lambda x: x[:3], "4 inputs or more"),
    (lambda x: x[0], "must be a matrix"),
    (lambda x: x.astype(complex), "must be a matrix of real numbers"),
    (lambda x: x.astype(str), "must be a matrix of real numbers"),
])
def test_what_cannot_be_compared_gets_one_sentence(
    name: str, spoil: Callable[[Matrix], Matrix], sentence: str
) -> None:
    x, y = clouds()
    for pair in ((spoil(x), y), (x, spoil(y))):
        with pytest.raises(MomeError, match=sentence) as failure:
            compare(name, *pair, neighbours=K)
        assert str(failure.value).count(". ") == 0


def test_wrong_names_and_settings_get_one_sentence() -> None:
    x, y = clouds()
    with pytest.raises(MomeError, match="no similarity measure 'ckaa': choose from cka, "):
        compare("ckaa", x, y)
    with pytest.raises(MomeError, match="no preprocessing 'whiten': choose from centre"):
        compare("cka", x, y, preprocessing=["whiten"])
    with pytest.raises(MomeError, match="40 nearest neighbours cannot be found among 40 inputs: use 1 to 39"):
        compare("jaccard", x, y, neighbours=40)
    with pytest.raises(MomeError, match="different numbers of neighbours"):
        compare("jaccard", Space(x, neighbours=3), Space(y, neighbours=4))
    with pytest.raises(MomeError, match="equally far apart"):
        compare("rsa", np.eye(6), y[:6])
    with pytest.raises(MomeError, match="equally far apart, so its debiased CKA"):
        compare("debiased_cka", np.eye(6), y[:6])


def test_preprocessing_is_what_its_name_says() -> None:
    x, _ = clouds()
    assert np.linalg.norm(unit_norm(x)) == pytest.approx(1)
    assert np.linalg.norm(unit_rows(x), axis=1) == pytest.approx(np.ones(len(x)))
    assert not unit_rows(np.zeros((2, 3))).any() and not unit_norm(np.zeros((2, 3))).any()
    moved = compare("jaccard", x, x + 50, neighbours=K, preprocessing=())
    assert moved < compare("jaccard", x, x + 50, neighbours=K) == 1  # without centring the common offset rules cosines


def test_every_measure_is_described() -> None:
    for name, entry in MEASURES.items():
        assert entry.name == name and entry.label and len(entry.source) > 10
        assert entry.identical in (entry.low, entry.high) and entry.low < entry.high
        assert entry.is_distance == (entry.identical == 0)
        assert entry.invariances <= set(INVARIANCES)
