"""Which rows of a batch each expert reads, and how the experts' answers become one tensor in the batch's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import LongTensor, Tensor, nn

__all__ = ["Dispatch", "combine"]


@dataclass(frozen=True)
class Dispatch:
    """Which rows of a batch each expert reads, and what its answers weigh.

    Attributes:
        groups: experts in use, each with its rows [n] in ascending order.
        weights: of every expert and, last, the common one, for each row, [B, E + 1].
        plain: each row has one expert and no weight but 1, or ½ beside the common expert's ½ in all rows.
    """

    groups: tuple[tuple[int, Tensor], ...]
    weights: Tensor
    plain: bool

    @cached_property
    def common(self) -> bool:
        """Whether the common expert takes part."""
        return bool(self.weights[:, -1].any())

    @classmethod
    def of_routes(cls, routes: LongTensor, experts: int, common: bool) -> Self:
        """One of ``experts`` for each row [B], averaged with the common one or not."""
        order = torch.argsort(routes, stable=True)
        counts = torch.bincount(routes, minlength=experts).tolist()
        groups = [(index, rows) for index, rows in enumerate(torch.split(order, counts)) if len(rows)]
        weights = nn.functional.one_hot(routes, experts + 1).float()
        if common:
            weights = (weights + nn.functional.one_hot(torch.tensor(experts, device=routes.device))) / 2
        return cls(tuple(groups), weights, True)

    @classmethod
    def of_weights(cls, weights: Tensor) -> Self:
        """Any mixture, [B, E + 1]."""
        used = weights[:, :-1] > 0
        groups = tuple((e, used[:, e].nonzero().flatten()) for e in used.any(0).nonzero().flatten().tolist())
        largest, common = weights[:, :-1].amax(1), weights[:, -1]
        same = ((largest == 1) & (common == 0)).all() | ((largest == 0.5) & (common == 0.5)).all()
        return cls(groups, weights, bool(same & used.sum(1).le(1).all()))

    def select(self, rows: Tensor) -> Self:
        """The dispatch of these rows, in this order."""
        return self.of_weights(self.weights[rows])


def combine(pieces: list[Tensor], shared: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Weighed answers of the experts [n, T, …] and of the common one [B, T, …], in the order of the batch."""
    if dispatch.plain:
        merged = _merge(pieces, dispatch.groups)
        return merged if shared is None else (merged + shared) / 2
    like = pieces[0] if shared is None else shared
    weights = dispatch.weights.to(like)
    merged = like.new_zeros(len(weights), *like.shape[1:])
    for (index, rows), piece in zip(dispatch.groups, pieces, strict=True):
        merged = merged.index_add(0, rows, piece * weights[rows, index, None, None])
    return merged if shared is None else merged + shared * weights[:, -1, None, None]


def _merge(pieces: list[Tensor], groups: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Answers of groups that share no row, in the order of the batch."""
    if len(pieces) == 1:
        return pieces[0]
    merged: Tensor = _Rows.apply([rows for _, rows in groups], *pieces)
    return merged


class _Rows(torch.autograd.Function):
    """Puts pieces [n, …] into their rows of one tensor [B, …]: each number is copied once, and once backwards.

    PLE's pieces are logits, the largest tensors there are; joining and then ordering them would copy them twice.
    """

    @staticmethod
    def forward(ctx: Any, places: list[Tensor], *pieces: Tensor) -> Tensor:
        ctx.places = places
        merged = pieces[0].new_empty(sum(map(len, pieces)), *pieces[0].shape[1:])
        for rows, piece in zip(places, pieces, strict=True):
            merged.index_copy_(0, rows, piece)
        return merged

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradients[0].index_select(0, rows) for rows in ctx.places)
