"""Similarity through products of the two representations: CKA and the Procrustes family.

None of these functions forms an n × n matrix: with a linear kernel, all that CKA needs of two Gram matrices is in
the product of the representations, which has one entry for each pair of dimensions.

All measures here take two matrices [n, dx] and [n, dy] of unit norm whose rows belong to the same inputs: the view
``scaled`` of :class:`mome_utils.similarity.Space`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import acos, sqrt

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from mome_utils.config import MomeError
from mome_utils.similarity_inputs import ROUNDING, Array, centred, paired

__all__ = ["aligned_cosine", "angular", "cka", "debiased_cka", "hsic1", "minibatch_cka", "procrustes"]


def cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment of centred representations: ‖xᵀy‖² / (‖xᵀx‖ ‖yᵀy‖), Frobenius norms.

    Kornblith et al. 2019 (arXiv 1905.00414, section 3). With few rows it is far above zero for unrelated
    representations: the bias is of the order of d / n.
    """
    shared, own_x, own_y = (float(np.linalg.norm(product)) for product in (x.T @ y, x.T @ x, y.T @ y))
    return min(1.0, shared**2 / (own_x * own_y))


def hsic1(x: Array, y: Array) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels.

    HSIC₁ of Song et al. 2012 (JMLR 13, section 2.2): with the diagonals of K = xxᵀ and L = yyᵀ set to zero,
    [tr(KL) + 1ᵀK1 · 1ᵀL1 / ((n−1)(n−2)) − 2 · 1ᵀKL1 / (n−2)] / (n (n−3)).
    Every term follows from xᵀy and from sums over rows, so neither K nor L is formed.
    """
    n = len(x)
    squares_x, squares_y = np.einsum("nd,nd->n", x, x), np.einsum("nd,nd->n", y, y)
    sums_x, sums_y = x @ x.sum(0) - squares_x, y @ y.sum(0) - squares_y  # the row sums of K and L
    trace = np.linalg.norm(x.T @ y) ** 2 - squares_x @ squares_y
    product = sums_x.sum() * sums_y.sum() / ((n - 1) * (n - 2))
    terms = np.array([trace, product, -2 * (sums_x @ sums_y) / (n - 2)])
    # Terms that cancel leave rounding, which is no independence and no dependence: zero.
    total = 0.0 if abs(terms.sum()) <= ROUNDING * np.abs(terms).sum() else terms.sum()
    return float(total / (n * (n - 3)))


def debiased_cka(x: Array, y: Array) -> float:
    """Linear CKA with every HSIC estimated without bias (:func:`hsic1`): near zero for unrelated representations.

    The form in which Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327) use it. It may be negative.

    Raises:
        MomeError: a representation in which every pair of rows is equally far apart, as far as n rows can tell:
            its own HSIC is zero.
    """
    return _ratio(hsic1(x, y), hsic1(x, x), hsic1(y, y))


def minibatch_cka(batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> float:
    """Debiased linear CKA of more rows than fit in memory.

    Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327): each HSIC is the mean of :func:`hsic1` over the
    batches. Because that estimator has no bias, the result does not depend on the size of the batches, up to noise;
    one batch of all rows gives :func:`debiased_cka` exactly.

    Args:
        batches: pairs of representations [n, dx] and [n, dy], each of four rows or more, rows in random order and
            batches of one size. One pair is held at a time.

    Raises:
        MomeError: no batch, or a batch that :func:`mome_utils.similarity_inputs.paired` refuses.
    """
    sums, count = np.zeros(3), 0
    for first, second in batches:
        x, y = (centred(part) for part in paired(first, second))  # not scaled: one scale must hold for all batches
        sums += hsic1(x, y), hsic1(x, x), hsic1(y, y)
        count += 1
    if not count:
        raise MomeError("There is no batch to compare: give pairs of representations of the same inputs.")
    shared, own_x, own_y = (sums / count).tolist()
    return _ratio(shared, own_x, own_y)


def _ratio(shared: float, own_x: float, own_y: float) -> float:
    if own_x <= 0 or own_y <= 0:
        raise MomeError("The rows of a representation are all equally far apart, so its debiased CKA is not defined: "
                        "use more inputs.")
    return shared / sqrt(own_x * own_y)


# ------------------------------------------------------------------------------------------------------ alignment


def _overlap(x: Array, y: Array) -> float:
    """‖xᵀy‖_*, the nuclear norm: the largest tr(Qᵀxᵀy) over orthogonal maps Q, dimensions padded with zeros."""
    # The singular values of xᵀy are those of Rx Ryᵀ where xᵀ = Qx Rx: cheaper with fewer rows than dimensions.
    factors = [np.asarray(np.linalg.qr(part.T, mode="r")).T if part.shape[1] > len(part) else part for part in (x, y)]
    return float(scipy.linalg.svdvals(factors[0].T @ factors[1]).sum())


def procrustes(x: Array, y: Array) -> float:
    """Orthogonal Procrustes distance min_Q ‖xQ − y‖ (Frobenius), Q orthogonal.

    Schönemann 1966, and Ding, Denain & Steinhardt 2021 (arXiv 2108.01661) for representations: the minimum is
    √(‖x‖² + ‖y‖² − 2 ‖xᵀy‖_*), with unit norms between 0 and √2. The smaller of two representations of different
    dimensions is padded with zeros.
    """
    return sqrt(max(0.0, 2 - 2 * _overlap(x, y)))


def angular(x: Array, y: Array) -> float:
    """Angular shape metric of representations of unit norm: arccos ‖xᵀy‖_*, in radians from 0 to π/2.

    Williams et al. 2021 (arXiv 2110.14739). A metric: it satisfies the triangle inequality.
    """
    return float(acos(min(1.0, _overlap(x, y))))


def aligned_cosine(x: Array, y: Array) -> float:
    """Mean cosine between corresponding rows after the best orthogonal map of x onto y, between −1 and 1.

    Hamilton, Leskovec & Jurafsky 2016 (arXiv 1605.09096). Every row weighs the same, however short.
    """
    left, _, right = scipy.linalg.svd(x.T @ y, full_matrices=False)
    # The best map turns direction left_i into direction right_i. What x has outside of them (it may have more
    # dimensions than y) goes where y has nothing: into no product, but into the length of the row.
    products = np.einsum("nd,nd->n", x @ left, y @ right.T)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0).mean())
