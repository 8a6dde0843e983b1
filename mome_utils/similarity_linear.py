"""Similarity through products of the two representations: CKA and the Procrustes family.

None of these functions forms an n × n matrix: with a linear kernel, all that CKA needs of two Gram matrices is in
the product of the representations, which has one entry for each pair of dimensions.

A representation of unit norm, the view ``scaled`` of :class:`mome_utils.similarity.Space`, is a :class:`Cloud`; it
keeps what CKA needs of it alone. All measures here take an :class:`Overlap` of two clouds whose rows belong to the same
inputs, which keeps what the measures need of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import acos, sqrt

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from mome_utils.config import MomeError
from mome_utils.similarity_inputs import ROUNDING, Array, centred, paired

__all__ = [
    "Cloud", "Overlap", "aligned_cosine", "angular", "cka", "debiased_cka", "minibatch_cka", "procrustes",
]


class Cloud:
    """A centred representation [n, d], and what CKA needs of it alone, each computed once.

    With K = xxᵀ, which is never formed.
    """

    def __init__(self, points: Array) -> None:
        self.points = points

    @cached_property
    def norm(self) -> float:
        """‖K‖ = ‖xᵀx‖, Frobenius."""
        return float(np.linalg.norm(self.points.T @ self.points))

    @cached_property
    def squares(self) -> Array:
        """The diagonal of K, [n]."""
        return np.asarray(np.einsum("nd,nd->n", self.points, self.points))

    @cached_property
    def sums(self) -> Array:
        """The row sums of K with a diagonal of zeros, [n]."""
        return np.asarray(self.points @ self.points.sum(0) - self.squares)

    @cached_property
    def hsic1(self) -> float:
        """The unbiased HSIC with itself (:meth:`Overlap.hsic1`)."""
        return _hsic1(self, self, self.norm)


class Overlap:
    """Two clouds beside each other, and what several measures need of both, each computed once."""

    def __init__(self, x: Cloud, y: Cloud) -> None:
        self.x, self.y = x, y

    @cached_property
    def product(self) -> Array:
        """xᵀy, [dx, dy]."""
        return np.asarray(self.x.points.T @ self.y.points)

    @cached_property
    def norm(self) -> float:
        """‖xᵀy‖, Frobenius."""
        return float(np.linalg.norm(self.product))

    @cached_property
    def nuclear(self) -> float:
        """‖xᵀy‖_*, the nuclear norm: the largest tr(Qᵀxᵀy) over orthogonal maps Q, dimensions padded with zeros."""
        sides = self.x.points, self.y.points
        if all(points.shape[1] <= len(points) for points in sides):
            return float(scipy.linalg.svdvals(self.product).sum())
        # The singular values of xᵀy are those of Rx Ryᵀ where xᵀ = Qx Rx: cheaper with fewer rows than dimensions.
        first, second = (np.asarray(np.linalg.qr(p.T, mode="r")).T if p.shape[1] > len(p) else p for p in sides)
        return float(scipy.linalg.svdvals(first.T @ second).sum())

    def hsic1(self) -> float:
        """Unbiased estimate of the Hilbert-Schmidt independence criterion with linear kernels.

        HSIC₁ of Song et al. 2012 (JMLR 13, section 2.2): with the diagonals of K = xxᵀ and L = yyᵀ set to zero,
        [tr(KL) + 1ᵀK1 · 1ᵀL1 / ((n−1)(n−2)) − 2 · 1ᵀKL1 / (n−2)] / (n (n−3)).
        Every term follows from xᵀy and from sums over rows, so neither K nor L is formed.
        """
        return _hsic1(self.x, self.y, self.norm)


def _hsic1(x: Cloud, y: Cloud, norm: float) -> float:
    """:meth:`Overlap.hsic1`; norm: ‖xᵀy‖."""
    n = len(x.points)
    trace = norm**2 - x.squares @ y.squares
    product = x.sums.sum() * y.sums.sum() / ((n - 1) * (n - 2))
    terms = np.array([trace, product, -2 * (x.sums @ y.sums) / (n - 2)])
    # Terms that cancel leave rounding, which is no independence and no dependence: zero.
    total = 0.0 if abs(terms.sum()) <= ROUNDING * np.abs(terms).sum() else terms.sum()
    return float(total / (n * (n - 3)))


def cka(both: Overlap) -> float:
    """Linear centred kernel alignment of centred representations: ‖xᵀy‖² / (‖xᵀx‖ ‖yᵀy‖), Frobenius norms.

    Kornblith et al. 2019 (arXiv 1905.00414, section 3). With few rows it is far above zero for unrelated
    representations: the bias is of the order of d / n.
    """
    return min(1.0, both.norm**2 / (both.x.norm * both.y.norm))


def debiased_cka(both: Overlap) -> float:
    """Linear CKA with every HSIC estimated without bias (:meth:`Overlap.hsic1`), near zero for unrelated clouds.

    The form in which Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327) use it. It may be negative.

    Raises:
        MomeError: a representation in which every pair of rows is equally far apart, as far as n rows can tell:
            its own HSIC is zero.
    """
    return _ratio(both.hsic1(), both.x.hsic1, both.y.hsic1)


def minibatch_cka(batches: Iterable[tuple[ArrayLike, ArrayLike]]) -> float:
    """Debiased linear CKA of more rows than fit in memory.

    Nguyen, Raghu & Kornblith 2021 (arXiv 2010.15327): each HSIC is the mean of :meth:`Overlap.hsic1` over the
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
        # Not scaled: one scale must hold for all batches.
        x, y = (Cloud(centred(part)) for part in paired(first, second))
        sums += Overlap(x, y).hsic1(), x.hsic1, y.hsic1
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


def procrustes(both: Overlap) -> float:
    """Orthogonal Procrustes distance min_Q ‖xQ − y‖ (Frobenius), Q orthogonal.

    Schönemann 1966, and Ding, Denain & Steinhardt 2021 (arXiv 2108.01661) for representations: the minimum is
    √(‖x‖² + ‖y‖² − 2 ‖xᵀy‖_*), with unit norms between 0 and √2. The smaller of two representations of different
    dimensions is padded with zeros.
    """
    return sqrt(max(0.0, 2 - 2 * both.nuclear))


def angular(both: Overlap) -> float:
    """Angular shape metric of representations of unit norm: arccos ‖xᵀy‖_*, in radians from 0 to π/2.

    Williams et al. 2021 (arXiv 2110.14739). A metric: it satisfies the triangle inequality.
    """
    return float(acos(min(1.0, both.nuclear)))


def aligned_cosine(both: Overlap) -> float:
    """Mean cosine between corresponding rows after the best orthogonal map of x onto y, between −1 and 1.

    Hamilton, Leskovec & Jurafsky 2016 (arXiv 1605.09096). Every row weighs the same, however short.
    """
    x, y = both.x.points, both.y.points
    left, _, right = scipy.linalg.svd(both.product, full_matrices=False)
    # The best map turns direction left_i into direction right_i. What x has outside of them (it may have more
    # dimensions than y) goes where y has nothing: into no product, but into the length of the row.
    products = np.einsum("nd,nd->n", x @ left, y @ right.T)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0).mean())
