"""Similarity through canonical correlations: CCA, SVCCA and PWCCA.

Canonical correlations are the cosines of the principal angles between the spaces that the columns of two centred
representations span (Björck & Golub 1973). They do not change under any invertible map of the dimensions, and that
is also their weakness: with n rows and n − 1 dimensions or more, the spaces coincide and every correlation is
one, whatever the representations hold. That is the answer then, and no error; SVCCA is the usual way out of it.

Each measure takes the :class:`Canonical` correlations of two views of :class:`mome_utils.similarity.Space`, each a
:class:`Basis`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg

from mome_utils.similarity_inputs import Array

__all__ = ["VARIANCE", "Basis", "Canonical", "basis", "canonical", "cca", "principal", "pwcca", "svcca"]

#: Share of the variance that SVCCA keeps, as published.
VARIANCE = 0.99


class Basis(NamedTuple):
    """An orthonormal basis of the space of a representation's columns, [n, r], by falling share of the variance, and
    the columns in it, [r, d]."""

    vectors: Array
    columns: Array


def basis(x: Array) -> Basis:
    """The basis of a centred representation [n, d], without directions that are rounding."""
    vectors, values, rotation = scipy.linalg.svd(x, full_matrices=False)
    rank = int((values > values[0] * max(x.shape) * np.finfo(float).eps).sum())
    return Basis(vectors[:, :rank], values[:rank, None] * rotation[:rank])


def principal(whole: Basis) -> Basis:
    """The first directions of a basis, as many as hold 99 % of the variance."""
    share = np.cumsum((whole.columns**2).sum(1))
    rank = int(np.searchsorted(share, VARIANCE * share[-1])) + 1
    return Basis(whole.vectors[:, :rank], whole.columns[:rank])


class Canonical(NamedTuple):
    """The canonical correlations of x and y, falling, [r], the directions of x in its basis, [rank of x, r], and that
    basis."""

    correlations: Array
    directions: Array
    x: Basis


def canonical(x: Basis, y: Basis) -> Canonical:
    """The canonical correlations of two bases, as many as the smaller rank (Björck & Golub 1973)."""
    directions, correlations, _ = scipy.linalg.svd(x.vectors.T @ y.vectors, full_matrices=False)
    return Canonical(np.clip(correlations, 0, 1), directions, x)


def cca(both: Canonical) -> float:
    """Mean of the canonical correlations, as many as the smaller rank; from 0 to 1.

    Kornblith et al. 2019 (arXiv 1905.00414) discuss it beside CKA; without SVCCA's first step it ignores any
    invertible linear map.
    """
    return float(both.correlations.mean())


def svcca(both: Canonical) -> float:
    """Mean canonical correlation, where both bases are their :func:`principal` directions; from 0 to 1.

    Raghu et al. 2017 (arXiv 1706.05806): a singular value decomposition, then CCA.
    """
    return cca(both)


def pwcca(both: Canonical) -> float:
    """Projection-weighted CCA: canonical correlations weighted by how much of x their directions account for; 0 to 1.

    Morcos, Raghu & Bengio 2018 (arXiv 1806.05759): direction h_i weighs Σ_j |⟨h_i, x_j⟩| over the columns x_j. It is
    not symmetric: weights come from the first representation.
    """
    weights = np.abs(both.directions.T @ both.x.columns).sum(1)  # h_i is the i-th column of vectors · directions
    return float(both.correlations @ weights / weights.sum())
