"""Similarity through the relations between inputs: who is near whom, in one representation and in the other.

Representational similarity matrices are compared block by block of rows, or as their upper triangles, so that no
measure holds more than one n × n matrix's worth of similarities. Each measure takes a *view* of both representations
(see :class:`mome_utils.similarity.Space`), which is computed once however often the representation is compared.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from mome_utils.config import MomeError
from mome_utils.similarity_inputs import Array, blocks, unit_rows

__all__ = [
    "Neighbours", "correlation_distances", "distance_ranks", "jaccard", "nearest", "rank_similarity", "rsa",
    "rsm_difference", "second_order_cosine",
]

#: Distances that differ by less are equal: the difference is rounding, and ranks must not depend on it.
DECIMALS = 12


def correlation_distances(x: Array) -> Array:
    """1 − Pearson's correlation of every pair of rows over the dimensions, [n (n−1) / 2], in the order of scipy's
    ``pdist``. A row whose values are all equal correlates with nothing: its distances are one."""
    rows = unit_rows(x - x.mean(1, keepdims=True))
    found, start = np.empty(len(x) * (len(x) - 1) // 2), 0
    for part in blocks(len(x), len(x)):
        for offset, similarities in enumerate(rows[part] @ rows.T):
            after = similarities[part.start + offset + 1 :]
            found[start : start + len(after)] = 1 - after
            start += len(after)
    return np.round(found, DECIMALS, out=found)


def distance_ranks(x: Array) -> Array:
    """Ranks of the :func:`correlation_distances`, ties averaged, with mean zero and length one, [n (n−1) / 2].

    Raises:
        MomeError: all pairs of rows are equally far apart.
    """
    values = correlation_distances(x)
    order = np.argsort(values)
    values.sort()  # in its place: each of these arrays is half of an n × n matrix
    tied = values[1:] == values[:-1]
    ranks = values
    if tied.all():
        raise MomeError("All pairs of inputs are equally far apart in a representation: RSA has nothing to rank.")
    for part in blocks(len(order), 1):
        ranks[order[part]] = np.arange(part.start, part.stop)
    if tied.any():  # a run of equal distances shares the mean of its ranks
        edge = np.zeros(1, np.int8)  # bytes: eight times as much would be one matrix more
        edges = np.diff(tied.view(np.int8), prepend=edge, append=edge)
        firsts, lasts = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        lengths = lasts - firsts + 1
        members = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        ranks[order[members]] = np.repeat((firsts + lasts) / 2, lengths)
    ranks -= ranks.mean()
    ranks /= np.linalg.norm(ranks)
    return ranks


def rsa(x: Array, y: Array) -> float:
    """Representational similarity analysis: Spearman's correlation of the distances between inputs, −1 to 1.

    Kriegeskorte, Mur & Bandettini 2008 (Frontiers in Systems Neuroscience 2:4): a distance is one minus Pearson's
    correlation of two rows over the dimensions, which takes the mean over the dimensions off every row; no rotation
    leaves that alone.

    Args:
        x, y: :func:`distance_ranks` of the representations.
    """
    return float(np.clip(x @ y, -1, 1))


def rsm_difference(x: Array, y: Array) -> float:
    """Norm of the difference of the matrices of cosines between rows, divided by n: ‖S − S'‖ / n, from 0 to 2.

    The measure of Yin & Shen 2018 (arXiv 1812.04224) with cosines for inner products, as in Klabunde et al. 2023
    (arXiv 2312.02730). The published norm grows with n; divided by n it is a root mean square over pairs of inputs.

    Args:
        x, y: representations with rows of length one.
    """
    squares = (float(np.linalg.norm(x[part] @ x.T - y[part] @ y.T)) ** 2 for part in blocks(len(x), len(x)))
    return sqrt(sum(squares)) / len(x)


# ----------------------------------------------------------------------------------------------------- neighbours


class Neighbours(NamedTuple):
    """The nearest other inputs of each input, nearest first, [n, k], and the rows that were searched, of length one."""

    indices: NDArray[np.int64]
    rows: Array


def nearest(x: Array, k: int) -> Neighbours:
    """The k nearest rows of each row by cosine, never the row itself.

    Raises:
        MomeError: k is not between 1 and n − 1.
    """
    if not 1 <= k < len(x):
        raise MomeError(f"{k} nearest neighbours cannot be found among {len(x)} inputs: use 1 to {len(x) - 1}.")
    rows = unit_rows(x)  # on the unit sphere the Euclidean distance orders pairs as the cosine does
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows)
    return Neighbours(np.asarray(search.kneighbors(return_distance=False), dtype=np.int64), rows)


def _shared(x: Neighbours, y: Neighbours) -> NDArray[np.bool_]:
    """[n, k, k]: whether neighbour a in the first list of a row is neighbour b in the second."""
    return np.asarray(x.indices[:, :, None] == y.indices[:, None, :])


def jaccard(x: Neighbours, y: Neighbours) -> float:
    """Mean over inputs of |A ∩ B| / |A ∪ B|, A and B the k nearest neighbours in x and in y; from 0 to 1.

    As in Klabunde et al. 2023 (arXiv 2312.02730), with k = 10. Two unrelated representations score about k / (2n).
    """
    k, both = x.indices.shape[1], _shared(x, y).sum((1, 2))
    return float((both / (2 * k - both)).mean())


def second_order_cosine(x: Neighbours, y: Neighbours) -> float:
    """Mean over inputs of the cosine between their similarities to their neighbours, in x and in y; from −1 to 1.

    Hamilton, Leskovec & Jurafsky 2016 (arXiv 1606.02821): the k nearest neighbours in either representation, taken
    together; their cosines to the input in x, and those in y, are the two vectors.
    """
    union = np.concatenate([x.indices, y.indices], axis=1)
    once = np.concatenate([np.ones_like(x.indices, dtype=bool), ~_shared(x, y).any(1)], axis=1)
    found = []
    for part in blocks(len(union), union.shape[1] * max(x.rows.shape[1], y.rows.shape[1])):
        cosines = [np.matmul(side.rows[union[part]], side.rows[part][:, :, None])[:, :, 0] * once[part]
                   for side in (x, y)]
        found.append(np.einsum("nk,nk->n", *map(unit_rows, cosines)))
    return float(np.concatenate(found).mean())


def rank_similarity(x: Neighbours, y: Neighbours) -> float:
    """Mean over inputs of how alike the common neighbours are ranked; from 0 to 1, 0 for an input without any.

    Wang et al. 2022 (IEEE TKDE, on unstable embeddings), as the survey of Klabunde et al. gives it (arXiv
    2305.06329): with r and r' the ranks (1: nearest) of the K common neighbours among the k nearest in x and y, the
    sum of 2 / ((1 + |r − r'|)(r + r')), divided by its largest value Σ 1/i, i = 1 … K.
    """
    same, ranks = _shared(x, y), np.arange(1, x.indices.shape[1] + 1)
    values = 2 / ((1 + np.abs(ranks[:, None] - ranks)) * (ranks[:, None] + ranks))
    largest = np.concatenate([[1.0], np.cumsum(1 / ranks)])  # of no common neighbour: the sum is zero anyway
    return float(((same * values).sum((1, 2)) / largest[same.sum((1, 2))]).mean())
