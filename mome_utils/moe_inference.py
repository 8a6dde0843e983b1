"""What the mixture decides at inference: who may answer, who does, and with what weight.

Every decision is a row of ``expert_weights``, [B, E + 1]: the weight of each expert's answer, and last that of the
common expert's; a row adds up to 1. A routed sequence has one expert with weight 1 (in MoE-CE ½, and ½ for the
common one). A sequence on which the router abstains falls back: to the common expert alone, or without one to the
mean of the two most probable experts. Where experts share an output projection (JEET, MoE-CE) hidden states are
weighed; in PLE, where each has a head, it is the logits: the softmax of weighed logits is the weighed mean of the
log-probabilities, normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import LongTensor, Tensor, nn

from mome_utils.config import MomeError
from mome_utils.moe_config import MomeConfig
from mome_utils.routing import ABSTAIN, TokenRouter

__all__ = ["Absent", "Inference"]

#: An expert with less weight than this does not answer: float32 would lose it beside an answer of weight 1.
_LEAST = 1e-6


class Absent(nn.Module):
    """The place of an expert whose weights were left on disk."""


class Inference:
    """Part of `MomeForCausalLM`: active experts, routes and weights."""

    if TYPE_CHECKING:
        config: MomeConfig
        experts: nn.ModuleList
        router: TokenRouter
        common: nn.Module | None
        training: bool

    #: Digest of the experts' vocabulary (`moe_identity.vocabulary_digest`), where their tokenizer is known.
    vocabulary: str | None = None

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the experts, in the order of their routes; also of those left on disk."""
        return tuple(self.config.languages)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the experts that may answer."""
        return self.config.active

    def set_active(self, names: Sequence[str] | None) -> None:
        """Let only some experts answer: the router chooses among them. The choice is saved with the model.

        Args:
            names: languages, in any order; ``None`` for all that are in memory.

        Raises:
            MomeError: an unknown expert, none, or one that was left on disk.
        """
        chosen = self._there if names is None else self.config.checked_active(names)
        for name in chosen:
            if name not in self._there:
                raise MomeError(
                    f"The expert '{name}' was left on disk: load the model again with active_experts={chosen}."
                )
        self.config.active_experts = None if tuple(chosen) == self.languages else chosen

    def set_router(self, router: TokenRouter) -> None:
        """Copy a fitted router into the model, which then saves and loads it.

        Raises:
            MomeError: the router was fitted for other languages, another order, or another vocabulary.
        """
        if tuple(router.languages) != self.languages:
            raise MomeError(
                f"The router knows {', '.join(router.languages)} but the experts are "
                f"{', '.join(self.languages)}: "
                "fit the router again for the experts' languages, in their order."
            )
        state, own = router.state_dict(), self.router.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise MomeError(
                f"The router was not fitted on the experts' vocabulary of {self.config.vocab_size} tokens: "
                "fit it again with the experts' tokenizer."
            )
        self.router.load_state_dict(state)
        self.config.router_fitted = True

    @torch.no_grad()
    def router_probabilities(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Calibrated probability of each expert among the active ones, [B, E] float64; 0 for the others.

        Raises:
            MomeError: the model has no fitted router.
        """
        found = self._fitted_router().probabilities(input_ids, attention_mask)
        if len(self.active) < len(self.languages):
            # Softmax of the active experts' logits: that of all, renormalised.
            idle = torch.tensor([name not in self.active for name in self.languages], device=found.device)
            found = found.clamp_min(torch.finfo(found.dtype).tiny).masked_fill(idle, 0)
            found = found / found.sum(1, keepdim=True)
        return found

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LongTensor:
        """Expert index of each sequence, [B], as the router sees its tokens [B, T]: one of the active experts.

        -1 where the router abstains: its largest probability among them is less than ``router.abstain_below``.

        Raises:
            MomeError: the model has no fitted router.
        """
        router = self._fitted_router()
        scores = router(input_ids, attention_mask)
        if len(self.active) < len(self.languages):
            idle = torch.tensor([name not in self.active for name in self.languages], device=scores.device)
            scores = scores.masked_fill(idle, -torch.inf)
        routes = scores.argmax(-1)
        if router.abstain_below is not None:
            sure = self.router_probabilities(input_ids, attention_mask).amax(1) >= router.threshold
            routes = torch.where(sure, routes, ABSTAIN)
        return cast(LongTensor, routes)

    @torch.no_grad()
    def mixing_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, routes: Tensor | None = None,
        use_common: bool = True,
    ) -> Tensor:
        """What each expert's answer weighs, [B, E + 1]; the last column is the common expert's. Rows add up to 1.

        Args:
            input_ids: tokens that the router reads, [B, T].
            attention_mask: 0 for padding, [B, T].
            routes: expert index of each sequence, [B], -1 for the fallback; by default the router's choice.
            use_common: False leaves MoE-CE's common expert out.

        Raises:
            MomeError: routes that are not one per sequence, a route outside the active experts, or no fitted router
                where one is needed: without routes, for a fallback without a common expert, and for
                ``combine="router"``.
        """
        if routes is None:
            routes = self.route(input_ids, attention_mask)
        routes = self._checked_routes(routes.to(input_ids.device), len(input_ids))
        weights = torch.zeros(len(routes), len(self.languages) + 1, device=input_ids.device)
        told, common = routes != ABSTAIN, self.common is not None and use_common
        weights[told, routes[told]] = 1
        if common:
            weights[:, -1] = 1
            share: Tensor | float = 0.5
            if self.config.combine == "router" and not self.training:
                sure = self.router_probabilities(input_ids, attention_mask)
                # A share that rounds to 1 would leave the common expert out, and its cache empty for later tokens.
                share = sure.gather(1, routes.clamp(min=0)[:, None]).to(weights)[told].clamp(max=1 - 2**-24)
            weights[told, :-1] *= share
            weights[told, -1] = 1 - weights[told, :-1].sum(1)
        elif not told.all():
            mask = None if attention_mask is None else attention_mask[~told]
            best = self.router_probabilities(input_ids[~told], mask).topk(min(2, len(self.active))).indices
            weights[~told] = weights[~told].scatter(1, best, 1 / best.shape[1])
        return weights

    @property
    def _there(self) -> list[str]:
        """Names of the experts in memory."""
        return [n for n, e in zip(self.languages, self.experts, strict=True) if not isinstance(e, Absent)]

    def _fitted_router(self) -> TokenRouter:
        if not self.config.router_fitted:
            raise MomeError("This model has no fitted router: call set_router first, or pass routes=.")
        return self.router

    def _checked_routes(self, routes: Tensor, count: int) -> LongTensor:
        """Routes of ``count`` sequences, which lead to active experts, or to the fallback."""
        if routes.shape != (count,) or routes.dtype not in (torch.int64, torch.int32):
            raise MomeError(
                f"routes holds one expert index per sequence, {count} whole numbers here, not {routes.dtype} of shape "
                f"{tuple(routes.shape)}."
            )
        low, high = (int(bound) for bound in torch.aminmax(routes)) if len(routes) else (0, 0)
        if low < ABSTAIN or high >= len(self.languages):
            raise MomeError(
                f"Routes must lie from 0 to {len(self.languages) - 1}, but lie from {low} to {high}: "
                "give each sequence the place of its expert in model.languages, or -1 for the fallback."
            )
        if len(self.active) < len(self.languages):
            self._check_active([index for index in routes.unique().tolist() if index != ABSTAIN])
        return cast(LongTensor, routes.long())

    def _checked_weights(self, weights: Tensor, count: int) -> Tensor:
        """Weights [count, E + 1] of active experts, float32; a row adds up to 1, and no weight is below 1e-6.

        Raises:
            MomeError: another shape or type, a negative number, a row that adds up to something else, an expert
                that is not active, or a weight for a common expert that is not there.
        """
        columns = len(self.languages) + 1
        if weights.shape != (count, columns) or not weights.is_floating_point():
            raise MomeError(
                f"expert_weights holds one row of {columns} numbers per sequence (each expert's, then the common "
                f"expert's), {count} rows here, not {weights.dtype} of shape {tuple(weights.shape)}."
            )
        if not (weights >= 0).all() or not ((weights.sum(1) - 1).abs() <= 1e-4).all():  # also where one is no number
            raise MomeError("The rows of expert_weights must hold no negative number and add up to 1.")
        # A second expert that rounding loses beside 1 would make a row plain and mixed at once. The common expert
        # keeps the least weight: it may have to answer later tokens.
        weights = weights.float()
        weights = torch.cat([weights[:, :-1].masked_fill(weights[:, :-1] < _LEAST, 0), weights[:, -1:]], 1)
        weights = weights / weights.sum(1, keepdim=True)
        used = weights.gt(0).any(0).tolist()
        if used[-1] and self.common is None:
            raise MomeError(f"The variant {self.config.variant} has no common expert: give it the weight 0.")
        self._check_active([index for index, some in enumerate(used[:-1]) if some])
        return weights

    def _check_active(self, indices: Sequence[int]) -> None:
        for index in indices:
            if self.languages[index] not in self.active:
                raise MomeError(
                    f"The route {index} leads to the expert '{self.languages[index]}', which is not active: "
                    "call set_active first, or choose another route."
                )
