"""Texts that occur twice, word for word or nearly, on both sides of a split.

Near duplicates are pairs whose sets of word 5-shingles overlap (Broder 1997, "On the resemblance and
containment of documents"). The overlaps of all pairs are counted through an inverted index, a sparse matrix
product, so nothing is estimated and no pair is missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from mome_utils.config import MomeError
from mome_utils.corpus import Document

__all__ = ["duplicates_across", "jaccard", "near_duplicates", "shingles"]

COLUMNS = ["language_a", "a", "language_b", "b", "jaccard", "exact"]
#: Documents of one side compared at a time: bounds the memory that the overlaps take.
CHUNK = 2048


def shingles(text: str, words: int = 5) -> frozenset[str]:
    """The set of runs of `words` neighbouring words, in lower case; a shorter text is one shingle."""
    tokens = text.lower().split()
    return frozenset(" ".join(tokens[i : i + words]) for i in range(max(1, len(tokens) - words + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Size of the intersection over size of the union, in [0, 1]."""
    return len(a & b) / len(a | b)


def near_duplicates(
    a_documents: Sequence[Document], b_documents: Sequence[Document], threshold: float = 0.5
) -> pd.DataFrame:
    """Pairs, one of each side, whose shingles overlap by at least `threshold`; exact copies are marked.

    Parameters
    ----------
    a_documents, b_documents : usually two splits. A document is never paired with itself (same language and
        id), and when both documents are on both sides their pair is reported once.
    threshold : Jaccard similarity in (0, 1].

    Returns
    -------
    DataFrame: language_a, a, language_b, b (ids), jaccard, exact (equal but for case and white space), the
    most similar first.
    """
    if not 0 < threshold <= 1:
        raise MomeError(f"threshold is {threshold} but a similarity lies above 0 and at most 1.")
    index: dict[str, int] = {}
    a_matrix = _incidence([shingles(d.text) for d in a_documents], index)
    b_matrix = _incidence([shingles(d.text) for d in b_documents], index)
    b_transposed = sparse.csr_array(
        (b_matrix.data, b_matrix.indices, b_matrix.indptr), (len(b_documents), len(index))
    ).T
    b_sizes = np.diff(b_matrix.indptr)
    rows: dict[tuple[tuple[str, str], ...], tuple[str, str, str, str, float, bool]] = {}
    for start in range(0, len(a_documents), CHUNK):
        part = a_matrix[start : start + CHUNK]
        part = sparse.csr_array((part.data, part.indices, part.indptr), (part.shape[0], len(index)))
        shared = sparse.coo_array(part @ b_transposed)
        union = np.diff(part.indptr)[shared.row] + b_sizes[shared.col] - shared.data
        similarity = shared.data / union
        for hit in np.flatnonzero(similarity >= threshold):
            a, b = a_documents[start + shared.row[hit]], b_documents[shared.col[hit]]
            ends = tuple(sorted([(a.language, a.id), (b.language, b.id)]))
            if ends[0] != ends[1] and ends not in rows:
                exact = a.text.lower().split() == b.text.lower().split()
                rows[ends] = (a.language, a.id, b.language, b.id, float(similarity[hit]), exact)
    found = sorted(rows.values(), key=lambda row: (-row[4], row[:4]))
    return pd.DataFrame(found, columns=COLUMNS)


def duplicates_across(splits: Mapping[str, Sequence[Document]], threshold: float = 0.5) -> pd.DataFrame:
    """`near_duplicates` between every two splits, with a first column `splits` such as "train, test"."""
    names = list(splits)
    parts = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            part = near_duplicates(splits[first], splits[second], threshold)
            part.insert(0, "splits", f"{first}, {second}")
            parts.append(part)
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else parts[0]


def _incidence(sets: Sequence[frozenset[str]], index: dict[str, int]) -> sparse.csr_array:
    """Documents by shingles, 1 where a document has a shingle; `index` (shingle -> column) grows as
    needed.
    """
    columns = [index.setdefault(shingle, len(index)) for members in sets for shingle in sorted(members)]
    pointers = np.cumsum([0, *(len(members) for members in sets)])
    data = np.ones(len(columns), dtype=np.int64)
    return sparse.csr_array((data, columns, pointers), shape=(len(sets), len(index)))
