"""Configuration and key-value cache of the mixture of modular experts (the model is in ``moe``)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import LongTensor
from transformers import GPT2Config
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from mome_utils.config import MomeError

__all__ = ["COMMON", "VARIANTS", "MomeCache", "MomeConfig"]

#: The variants, in the order of the paper.
VARIANTS = ("ple", "jeet", "moe_ce")
#: Name of the common expert; no language may bear it.
COMMON = "common"


class MomeConfig(PreTrainedConfig):
    """Configuration of `MomeForCausalLM`.

    Args:
        variant: ``ple``, ``jeet`` or ``moe_ce`` (see the module's docstring).
        languages: names of the experts, in the order of their routes.
        expert: shape of one expert as a `GPT2Config` (or its dictionary); all experts have the same one.
        router_fitted: whether the router's weights are fitted; without it every call needs ``routes``.
        bos_token_id, eos_token_id, pad_token_id: token ids that ``generate`` uses.

    Raises:
        MomeError: unknown variant, fewer than two languages, or languages that cannot be told apart.
    """

    model_type = "mome"
    sub_configs_defaults = {"expert": SubConfigSpec(GPT2Config)}
    keys_to_ignore_at_inference = ["past_key_values"]

    variant: str = "jeet"
    languages: list[str] | tuple[str, ...] = ("en", "fr", "de", "py")
    expert: GPT2Config | dict[str, Any] | None = None
    router_fitted: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.languages = list(self.languages)
        if self.variant not in VARIANTS:
            raise MomeError(f"There is no MoE variant '{self.variant}': choose one of {', '.join(VARIANTS)}.")
        distinct = set(self.languages) - {COMMON}
        if len(distinct) != len(self.languages) or len(distinct) < 2:
            raise MomeError(
                f"A mixture needs at least two languages with names of their own (other than '{COMMON}'), "
                f"not {self.languages}."
            )

    @property
    def gpt2(self) -> GPT2Config:
        """The experts' configuration."""
        return cast(GPT2Config, self.expert)

    # What transformers asks any language model's configuration for; the experts' shape is kept in one place.
    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.gpt2.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.gpt2.n_embd

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of one expert."""
        return self.gpt2.n_layer

    @property
    def n_layer(self) -> int:
        """Blocks of one expert (GPT-2's name, read by its weight initialisation)."""
        return self.gpt2.n_layer

    @property
    def max_position_embeddings(self) -> int:
        """Longest context in tokens."""
        return self.gpt2.n_positions

    @property
    def initializer_range(self) -> float:
        """Standard deviation of freshly drawn weights."""
        return self.gpt2.initializer_range


class MomeCache(Cache):
    """Keys and values of a batch in which each sequence belongs to one expert.

    Holds one `DynamicCache` per expert for the sequences that it serves, one more for the common expert, and
    the routes, which stay as they were chosen on the prompt.

    Args:
        routes: expert index of each sequence, [B].
        experts: number of routed experts.
    """

    def __init__(self, routes: LongTensor, experts: int) -> None:
        super().__init__(layers=[])
        self.routes = routes
        self.by_expert = [DynamicCache() for _ in range(experts)]
        self.common = DynamicCache()

    @property
    def is_croppable(self) -> bool:
        """False: tokens cannot be taken back (no speculative decoding)."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return max(cache.get_seq_length(layer_idx) for cache in self.by_expert)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Let row i continue row ``beam_idx[i]`` (beam search; the beams of a prompt share its expert)."""
        for expert, cache in enumerate(self.by_expert):
            rows = (self.routes == expert).nonzero().flatten()
            if len(rows):
                # Rows of the group are sorted, so a row's rank in its group is its place there.
                cache.reorder_cache(cast(LongTensor, torch.searchsorted(rows, beam_idx[rows])))
        if self.common.get_seq_length():
            self.common.reorder_cache(beam_idx)
