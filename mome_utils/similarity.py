"""How alike are two representations? The measures by name, with what each ignores, where it ends and who proposed it.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(50, 8))
    >>> rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> round(compare("cka", x, 3 * x @ rotation + 1), 6)
    1.0

A *representation* is a matrix with one row for each input and one column for each dimension of a layer; two of them
are compared row by row, so row i of both must belong to the same input, while their dimensions may differ in number
and meaning. What a measure ignores is its *invariances*: two representations that differ in nothing else are the same
to it. For definitions see the survey of Klabunde, Schumacher, Strohmaier & Lemmerich (arXiv 2305.06329).

A raw score says little: it depends on the numbers of inputs and dimensions, and unrelated models score far from the
end of the range. :mod:`mome_utils.similarity_baselines` places it between a floor and a ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mome_utils.config import MomeError
from mome_utils.similarity_cca import basis, canonical, cca, principal, pwcca, svcca
from mome_utils.similarity_inputs import Array, checked, prepared, unit_norm, unit_rows
from mome_utils.similarity_linear import (
    Cloud,
    Overlap,
    aligned_cosine,
    angular,
    cka,
    debiased_cka,
    minibatch_cka,
    procrustes,
)
from mome_utils.similarity_neighbours import (
    distance_ranks,
    jaccard,
    nearest,
    rank_similarity,
    rsa,
    rsm_difference,
    second_order_cosine,
)

__all__ = [
    "INVARIANCES", "MEASURES", "NEIGHBOURS", "Invariance", "Measure", "Space", "compare", "compare_all",
    "compare_layers", "measure", "minibatch_cka",
]

Invariance = Literal["permutation", "orthogonal", "invertible", "scaling", "translation"]

#: What a measure may ignore: maps of one representation that leave the score as it is.
INVARIANCES: Mapping[str, str] = MappingProxyType({
    "permutation": "another order of the dimensions",
    "orthogonal": "any rotation or reflection of the space",
    "invertible": "any invertible linear map of the space",
    "scaling": "one positive factor for all values",
    "translation": "one vector added to all rows",
})

View = Literal["scaled", "rows", "ranks", "neighbours", "basis", "principal"]

#: Neighbours of each input that the neighbourhood measures look at, as published.
NEIGHBOURS = 10


@dataclass(frozen=True)
class Measure:
    """A measure of similarity or of distance between two representations.

    Attributes:
        name, label: what code and what figures call it.
        function: of one view of each representation, or of what ``shared`` makes of the two views.
        view: which view (:meth:`Space.view`).
        invariances: keys of :data:`INVARIANCES` that hold, representations centred.
        low, high: ends of the range. identical: the score of a representation and itself, one of the two.
        source: the paper.
        symmetric: swapping the two changes nothing.
        shared: what several measures need of the two views; computed once for all of them.
    """

    name: str
    label: str
    function: Callable[..., float]
    view: View
    invariances: frozenset[Invariance]
    low: float
    high: float
    identical: float
    source: str
    symmetric: bool = True
    shared: Callable[[Any, Any], Any] | None = None

    @property
    def is_distance(self) -> bool:
        """Whether smaller means more alike."""
        return self.identical == self.low


def _ignores(*names: Invariance) -> frozenset[Invariance]:
    return frozenset(names)


#: What all views of centred representations leave out, and what a rotation changes as well.
_RIGID = _ignores("permutation", "orthogonal", "scaling", "translation")
_UNITS = _ignores("permutation", "scaling", "translation")
_LINEAR = _RIGID | _ignores("invertible")

_ALL = (
    Measure("cka", "CKA", cka, "scaled", _RIGID, 0, 1, 1, "Kornblith et al. 2019, arXiv 1905.00414", shared=Overlap),
    Measure("debiased_cka", "Debiased CKA", debiased_cka, "scaled", _RIGID, -1, 1, 1,
            "Song et al. 2012, JMLR 13; Nguyen et al. 2021, arXiv 2010.15327", shared=Overlap),
    Measure("procrustes", "Procrustes", procrustes, "scaled", _RIGID, 0, math.sqrt(2), 0,
            "Ding et al. 2021, arXiv 2108.01661", shared=Overlap),
    Measure("angular", "Angular shape metric", angular, "scaled", _RIGID, 0, math.pi / 2, 0,
            "Williams et al. 2021, arXiv 2110.14739", shared=Overlap),
    Measure("aligned_cosine", "Aligned cosine", aligned_cosine, "scaled", _RIGID, -1, 1, 1,
            "Hamilton et al. 2016, arXiv 1605.09096", shared=Overlap),
    Measure("rsa", "RSA", rsa, "ranks", _UNITS, -1, 1, 1, "Kriegeskorte et al. 2008, Front. Syst. Neurosci. 2:4"),
    Measure("rsm_difference", "RSM norm difference", rsm_difference, "rows", _RIGID, 0, 2, 0,
            "Yin & Shen 2018, arXiv 1812.04224"),
    Measure("jaccard", "Jaccard of neighbours", jaccard, "neighbours", _RIGID, 0, 1, 1,
            "Klabunde et al. 2023, arXiv 2312.02730"),
    Measure("second_order_cosine", "Second-order cosine", second_order_cosine, "neighbours", _RIGID, -1, 1, 1,
            "Hamilton et al. 2016, arXiv 1606.02821"),
    Measure("rank_similarity", "Rank similarity", rank_similarity, "neighbours", _RIGID, 0, 1, 1,
            "Wang et al. 2022, IEEE TKDE"),
    Measure("cca", "Mean CCA", cca, "basis", _LINEAR, 0, 1, 1, "Kornblith et al. 2019, arXiv 1905.00414",
            shared=canonical),
    Measure("svcca", "SVCCA", svcca, "principal", _RIGID, 0, 1, 1, "Raghu et al. 2017, arXiv 1706.05806",
            shared=canonical),
    Measure("pwcca", "PWCCA", pwcca, "basis", _UNITS, 0, 1, 1, "Morcos et al. 2018, arXiv 1806.05759",
            symmetric=False, shared=canonical),
)

#: Every measure, by name.
MEASURES: Mapping[str, Measure] = MappingProxyType({entry.name: entry for entry in _ALL})


def measure(name: str) -> Measure:
    """The measure of this name.

    Raises:
        MomeError: there is none.
    """
    if name not in MEASURES:
        raise MomeError(f"There is no similarity measure '{name}': choose from {', '.join(MEASURES)}.")
    return MEASURES[name]


class Space:
    """One representation, checked and preprocessed once, and what measures need of it, computed once each.

    A cloud of points compared with many others (the layers of two models, the models of a study) pays for its ranks,
    neighbours and bases a single time. The largest view, ``ranks``, holds n (n − 1) / 2 numbers.

    Args:
        values: [n, d], row i for input i; computed in float64.
        neighbours: k of the neighbourhood measures.
        preprocessing: steps of :data:`mome_utils.similarity_inputs.PREPROCESSING`; other steps than centring change
            what the measures ignore.
        name: what an error message calls it.

    Raises:
        MomeError: values that no similarity is defined for, in one sentence.
    """

    def __init__(
        self, values: ArrayLike, *, neighbours: int = NEIGHBOURS, preprocessing: Sequence[str] = ("centre",),
        name: str = "The representation",
    ) -> None:
        self.values = prepared(checked(values, name), preprocessing)
        self.neighbours = neighbours
        self._views: dict[View, Any] = {}

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.values)

    def view(self, name: View) -> Any:
        """What a measure reads: the points scaled to unit norm (``scaled``), each point to length one (``rows``), the
        ranks of all distances (``ranks``), the nearest ``neighbours``, the ``basis`` of the columns' space, or its
        ``principal`` part."""
        if name not in self._views:
            makers: Mapping[str, Callable[[Array], Any]] = {
                "scaled": lambda x: Cloud(unit_norm(x)), "rows": unit_rows, "ranks": distance_ranks, "basis": basis,
                "principal": lambda _: principal(self.view("basis")),
                "neighbours": lambda x: nearest(x, self.neighbours),
            }
            self._views[name] = makers[name](self.values)
        return self._views[name]


def compare(
    name: str, x: ArrayLike | Space, y: ArrayLike | Space, *, neighbours: int = NEIGHBOURS,
    preprocessing: Sequence[str] = ("centre",),
) -> float:
    """One measure of two representations.

    Args:
        name: a key of :data:`MEASURES`.
        x, y: [n, dx] and [n, dy], row i of both for input i; or spaces, which were made with their own settings.
        neighbours, preprocessing: as for :class:`Space`.

    Raises:
        MomeError: an unknown name or step, or representations that cannot be compared, in one sentence.
    """
    return compare_all(x, y, [name], neighbours=neighbours, preprocessing=preprocessing)[name]


def compare_all(
    x: ArrayLike | Space, y: ArrayLike | Space, names: Sequence[str] | None = None, *, neighbours: int = NEIGHBOURS,
    preprocessing: Sequence[str] = ("centre",),
) -> dict[str, float]:
    """Several measures (by default all) of two representations. Arguments as for :func:`compare`."""
    chosen = [measure(name) for name in (MEASURES if names is None else names)]
    first, second = (
        part if isinstance(part, Space)
        else Space(part, neighbours=neighbours, preprocessing=preprocessing, name=f"The {place} representation")
        for part, place in ((x, "first"), (y, "second"))
    )
    if len(first) != len(second):
        raise MomeError(
            f"The representations have {len(first)} and {len(second)} rows: row i of both must belong to one input."
        )
    if first.neighbours != second.neighbours:
        raise MomeError("The two spaces were made with different numbers of neighbours: make both with one.")
    shared: dict[Any, Any] = {}
    found = {}
    for entry in chosen:
        views: tuple[Any, ...] = first.view(entry.view), second.view(entry.view)
        if entry.shared is not None:
            key = entry.view, entry.shared
            if key not in shared:
                shared[key] = entry.shared(*views)
            views = (shared[key],)
        found[entry.name] = float(entry.function(*views))
    return found


def compare_layers(
    name: str, first: Sequence[ArrayLike | Space], second: Sequence[ArrayLike | Space], *, neighbours: int = NEIGHBOURS
) -> Array:
    """One measure for every pair of layers of two models, [layers of the first, layers of the second].

    Args:
        name: a key of :data:`MEASURES`.
        first, second: the models' layers, each [n, dimensions].
        neighbours: k of the neighbourhood measures.

    Raises:
        MomeError: as :func:`compare`.
    """
    sides = [
        [layer if isinstance(layer, Space) else Space(layer, neighbours=neighbours, name=f"Layer {i}")
         for i, layer in enumerate(layers)]
        for layers in (first, second)
    ]
    return np.array([[compare(name, x, y) for y in sides[1]] for x in sides[0]])
