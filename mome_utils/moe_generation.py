"""Generation with the mixture: routed on the prompt, and where wanted again when the text switches language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mome_utils.config import MomeError
from mome_utils.moe_cache import MomeCache
from mome_utils.moe_inference import Inference

__all__ = ["Generation", "Rerouting"]


@dataclass(frozen=True)
class Rerouting:
    """When a text that is being generated changes its expert.

    Attributes:
        every: tokens from one decision to the next.
        window: last tokens that a decision reads.
        above: probability that another expert needs in order to take over.
        start: tokens of the prompt, padding included.
    """

    every: int
    window: int
    above: float
    start: int

    def __post_init__(self) -> None:
        for name, value in (("reroute_every", self.every), ("reroute_window", self.window)):
            if value < 1:
                raise MomeError(f"{name} is a number of tokens, 1 or more, not {value}.")
        if not 0 < self.above <= 1:
            raise MomeError(f"reroute_above is a probability, more than 0 and at most 1, not {self.above}.")

    def due(self, length: int) -> bool:
        """Whether a text of this length, prompt included, is looked at again."""
        return length > self.start and (length - self.start) % self.every == 0


class Generation(Inference):
    """Part of `MomeForCausalLM`: `generate` and what it needs."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, *args: Any, routes: Tensor | None = None,
        expert_weights: Tensor | None = None, use_common: bool = True, reroute_every: int | None = None,
        reroute_window: int | None = None, reroute_above: float = 0.9, **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`; each prompt is routed and keeps its expert, unless re-routing is on.

        Re-routing looks at the last tokens of each text: where an active expert other than its present one has
        a high probability, that expert takes over, and its keys and values are computed from the text so far.

        Args:
            inputs: prompts, [B, T], padded on the left (with an ``attention_mask``) where lengths differ.
            routes: expert index of each prompt, [B]; by default the router's choice.
            expert_weights: instead of routes, the weight of each expert, [B, E + 1] (see `mixing_weights`).
            use_common: False leaves MoE-CE's common expert out.
            reroute_every: generated tokens from one decision to the next; ``None`` keeps the route.
            reroute_window: last tokens that a decision reads; by default as many, but at least 32.
            reroute_above: probability that another expert needs in order to take over.

        Raises:
            MomeError: as `forward`, a token outside the vocabulary, or re-routing with numbers out of range.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            self._check_tokens(prompt)
        if prompt is not None and expert_weights is None:
            expert_weights = self.mixing_weights(prompt, kwargs.get("attention_mask"), routes, use_common)
        if reroute_every is not None:
            self._fitted_router()
            window = max(reroute_every, 32) if reroute_window is None else reroute_window
            start = 1 if prompt is None else prompt.shape[1]
            kwargs["rerouting"] = Rerouting(reroute_every, window, reroute_above, start)
        if expert_weights is not None:
            # Checked here too, so that texts with a cache and without compare the same weights.
            count = len(expert_weights if prompt is None else prompt)
            kwargs["expert_weights"] = self._checked_weights(expert_weights, count)
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None, expert_weights: Tensor | None = None,
        rerouting: Rerouting | None = None, **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward pass; here, before a token is computed, texts change their experts.

        With a cache the present experts are the cache's. Without one they are found again from the text, so
        that both ways decide alike and beams may change places.
        """
        if rerouting is not None:
            if isinstance(past_key_values, MomeCache):
                if rerouting.due(input_ids.shape[1]):
                    self._reroute_cache(past_key_values, input_ids, attention_mask, rerouting)
            elif expert_weights is not None:
                for length in range(rerouting.start + rerouting.every, input_ids.shape[1] + 1, rerouting.every):
                    mask = None if attention_mask is None else attention_mask[:, :length]
                    expert_weights = self._rerouted(expert_weights, input_ids[:, :length], mask, rerouting)
        found: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, expert_weights=expert_weights, **kwargs,
        )
        return found

    def _check_tokens(self, input_ids: Tensor) -> None:
        """Look for a token that no embedding knows (on a GPU it would end the process)."""
        if not input_ids.numel():
            return
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            raise MomeError(
                f"The tokens lie from {low} to {high} but the model knows 0 to "
                f"{self.config.vocab_size - 1}: use the tokenizer of the model."
            )

    def _rerouted(
        self, weights: Tensor, input_ids: Tensor, attention_mask: Tensor | None, rerouting: Rerouting
    ) -> Tensor:
        """Weights [B, E + 1] after a decision on the last tokens of the texts so far, [B, T]."""
        ids = input_ids[:, -rerouting.window:]
        mask = None if attention_mask is None else attention_mask[:, -rerouting.window:]
        best = self.router_probabilities(ids, mask).max(1)
        # Several experts share a fallback without a common one: any single expert that is sure takes over.
        present = torch.where(weights[:, :-1].gt(0).sum(1) == 1, weights[:, :-1].argmax(1), -1)
        changed = (best.values >= rerouting.above) & (best.indices != present)
        if not changed.any():
            return weights
        use_common = bool(weights[:, -1].gt(0).any())
        new = self.mixing_weights(ids, mask, best.indices, use_common).to(weights)
        return torch.where(changed[:, None], new, weights)

    def _reroute_cache(
        self, cache: MomeCache, input_ids: Tensor, attention_mask: Tensor | None, rerouting: Rerouting
    ) -> None:
        """Let other experts go on with some texts: compute their keys and values of all but the last token."""
        before = cache.dispatch.weights
        after = self._rerouted(before, input_ids, attention_mask, rerouting)
        rows = (before != after).any(1).nonzero().flatten()
        if not len(rows):
            return
        alone = after[rows, :-1]
        alone = torch.cat([alone / alone.sum(1, keepdim=True), torch.zeros_like(alone[:, :1])], 1)
        mask = None if attention_mask is None else attention_mask[rows, : input_ids.shape[1] - 1]
        other = self(
            input_ids[rows, :-1], attention_mask=mask, expert_weights=alone, use_cache=True, logits_to_keep=1
        ).past_key_values
        cache.replace(rows, other, type(cache.dispatch).of_weights(after))
