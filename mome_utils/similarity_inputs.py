"""Representations as the measures of similarity want them: checked, and brought to a common place and size.

A representation is a matrix with a row for each input and a column for each dimension (unit) of a layer. Two of them
are comparable when row i of both belongs to the same input; their numbers of dimensions may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mome_utils.config import MomeError

__all__ = [
    "FEWEST_ROWS", "PREPROCESSING", "Array", "blocks", "centred", "checked", "paired", "prepared", "unit_norm",
    "unit_rows",
]

Array = NDArray[np.float64]

#: The debiased estimators divide by n (n − 3); below four rows nothing can be said anyway.
FEWEST_ROWS = 4
#: Spread between rows, relative to the size of the values, that is rounding and nothing else.
ROUNDING = 1e-12
#: Numbers that a block of rows of a large matrix may hold at once (2 MiB).
BLOCK = 1 << 18


def centred(x: Array) -> Array:
    """``x`` [n, d] with the mean of each column taken off: where the cloud of rows lies no longer matters."""
    return np.asarray(x - x.mean(0))


def unit_norm(x: Array) -> Array:
    """``x`` [n, d] scaled to a Frobenius norm of one: how large the cloud is no longer matters (zero stays zero)."""
    # The largest entry goes first, so that squares of very large or very small values neither overflow nor vanish.
    scaled = x / (np.abs(x).max() or 1.0)
    return np.asarray(scaled / (np.linalg.norm(scaled) or 1.0))


def unit_rows(x: Array) -> Array:
    """``x`` [n, d] with every row scaled to length one; a row of zeros stays zero, so its cosines are zero."""
    scaled = x / np.maximum(np.abs(x).max(1, keepdims=True), np.finfo(float).tiny)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(np.divide(scaled, lengths, out=np.zeros_like(scaled), where=lengths > 0))


#: What can be done to a representation before it is compared, by name.
PREPROCESSING: Mapping[str, Callable[[Array], Array]] = MappingProxyType({
    "centre": centred, "unit_norm": unit_norm, "unit_rows": unit_rows,
})


def prepared(x: Array, steps: Sequence[str]) -> Array:
    """``x`` [n, d] after the named steps of :data:`PREPROCESSING`, in order.

    Raises:
        MomeError: a step that does not exist.
    """
    for step in steps:
        if step not in PREPROCESSING:
            raise MomeError(f"There is no preprocessing '{step}': choose from {', '.join(PREPROCESSING)}.")
        x = PREPROCESSING[step](x)
    return x


def checked(x: ArrayLike, name: str = "The representation") -> Array:
    """``x`` as a float64 matrix [rows, dimensions].

    Raises:
        MomeError: no matrix of real numbers, too few rows, missing or infinite values, or rows that are all the
            same, for which no similarity is defined.
    """
    values = np.asarray(x)
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype.kind not in "fiu":
        raise MomeError(f"{name} must be a matrix of real numbers [rows, dimensions], not {values.shape} "
                        f"of {values.dtype}.")
    if len(values) < FEWEST_ROWS:
        raise MomeError(f"{name} has {len(values)} rows: a similarity needs {FEWEST_ROWS} inputs or more.")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise MomeError(f"{name} has missing or infinite values: find the layer or the input that they come from.")
    if np.ptp(values, axis=0).max() <= ROUNDING * np.abs(values).max():
        raise MomeError(f"{name} is the same for every input, so its similarity to another is not defined.")
    return values


def paired(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """Two representations of the same inputs, [n, dx] and [n, dy].

    Raises:
        MomeError: as :func:`checked`, or different numbers of rows.
    """
    a, b = checked(x, "The first representation"), checked(y, "The second representation")
    if len(a) != len(b):
        raise MomeError(f"The representations have {len(a)} and {len(b)} rows: row i of both must belong to one input.")
    return a, b


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of consecutive rows, so that a block with ``width`` numbers for each row stays small."""
    size = max(1, BLOCK // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
