"""Key-value cache of the mixture of modular experts: each sequence's keys and values lie with its experts."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["Dispatched", "MomeCache"]


class Dispatched(Protocol):
    """What the cache has to know of a dispatch: which rows of the batch each expert serves."""

    @property
    def weights(self) -> Tensor:
        """Of every expert and, last, the common one, for each row, [B, E + 1]."""

    @property
    def groups(self) -> tuple[tuple[int, Tensor], ...]:
        """Experts in use, each with its rows [n] in ascending order."""

    def select(self, rows: Tensor) -> Self:
        """The dispatch of these rows of the batch, in this order."""

    @classmethod
    def of_weights(cls, weights: Tensor) -> Self:
        """The dispatch of a batch with other weights."""


class MomeCache(Cache):
    """Keys and values of a batch in which each sequence belongs to one expert (or to a few, or to none).

    Holds one `DynamicCache` per expert for the sequences that it serves, one more for the common expert, and the
    dispatch, which stays as it was chosen on the prompt unless `generate` re-routes.

    Args:
        dispatch: which expert serves which rows.
        experts: number of routed experts.
    """

    def __init__(self, dispatch: Dispatched, experts: int) -> None:
        super().__init__(layers=[])
        self.dispatch = dispatch
        self.by_expert = [DynamicCache() for _ in range(experts)]
        self.common = DynamicCache()

    @property
    def is_croppable(self) -> bool:
        """False: tokens cannot be taken back (no speculative decoding)."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return max(cache.get_seq_length(layer_idx) for cache in (*self.by_expert, self.common))

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Let row i continue row ``beam_idx[i]``, with that row's experts (beam search)."""
        dispatch = self.dispatch.select(beam_idx)
        before = dict(self.dispatch.groups)
        caches = [DynamicCache() for _ in self.by_expert]
        for expert, rows in dispatch.groups:
            caches[expert] = self.by_expert[expert]
            # Rows of a group are ascending, so a row's rank in its group is its place there.
            caches[expert].reorder_cache(_places(before[expert], beam_idx[rows]))
        if self.common.get_seq_length():
            self.common.reorder_cache(beam_idx)
        self.dispatch, self.by_expert = dispatch, caches

    def replace(self, rows: Tensor, other: MomeCache, dispatch: Dispatched) -> None:
        """Let other experts go on with some rows; the common expert's keys and values stay.

        Args:
            rows: of this batch that change their experts, ascending.
            other: cache of those rows alone, for as many tokens as this one holds.
            dispatch: of the whole batch from now on.
        """
        before, after = dict(self.dispatch.groups), dict(other.dispatch.groups)
        caches = [DynamicCache() for _ in self.by_expert]
        for expert, members in dispatch.groups:
            moved = torch.isin(members, rows)
            stay, come = members[~moved], members[moved]
            parts = []
            if len(stay):
                parts.append((self.by_expert[expert], _places(before[expert], stay)))
            if len(come):
                parts.append((other.by_expert[expert], _places(after[expert], _places(rows, come))))
            order = torch.argsort(torch.cat([stay, come]))
            for layer in range(len(parts[0][0].layers)):
                keys, values = (
                    torch.cat([_states(cache, layer, kind).index_select(0, places) for cache, places in parts])[order]
                    for kind in ("keys", "values")
                )
                caches[expert].update(keys, values, layer)
        self.dispatch, self.by_expert = dispatch, caches


def _states(cache: DynamicCache, layer: int, kind: str) -> Tensor:
    states: Tensor = getattr(cache.layers[layer], kind)
    return states


def _places(rows: Tensor, wanted: Tensor) -> LongTensor:
    """Where the wanted rows stand among ascending rows."""
    places: LongTensor = torch.searchsorted(rows, wanted)  # type: ignore[assignment]
    return places
