"""The mixture of modular experts as a transformers model that routes each sequence of a mixed batch.

Three variants of Al-Maamari, Ben Amor and Granitzer (2024, arXiv 2407.19610):

``ple``
    Pre-trained language experts: each is a complete GPT-2 with an embedding and an output head of its own.
``jeet``
    Joint expert embedding training: token embedding, position embedding and an untied output projection are
    shared; an expert is a stack of GPT-2 blocks with its final layer norm. The release gives each expert an
    embedding that no forward pass reads; here there is none. Positions are shared like tokens: what comes
    before the experts is common, what is inside one belongs to one language.
``moe_ce``
    JEET plus a common expert that sees every sequence: the last hidden states of the routed and of the common
    expert are averaged before the output projection.

The published code routes a whole batch at once, from all its ids together. Here each sequence has a route:
sequences are grouped by expert, each expert runs once on its group, and the results return to their places.
An expert that no sequence was sent to takes no part in the graph, so its gradients stay ``None`` and an
optimizer leaves it alone.

Here is all that training computes. What else a model can do lies beside: decide at inference (`moe_inference`),
generate (`moe_generation`), travel as one file per expert (`moe_shards`), gain and lose experts (`moe_growth`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel
from transformers.utils.generic import can_return_tuple

from mome_utils.config import MomeError, Shape
from mome_utils.models import gpt2_config, scale_projection
from mome_utils.moe_cache import MomeCache
from mome_utils.moe_config import COMMON, VARIANTS, MomeConfig
from mome_utils.moe_dispatch import Dispatch, combine
from mome_utils.moe_generation import Generation
from mome_utils.moe_growth import Growth
from mome_utils.moe_inference import Absent
from mome_utils.moe_shards import Shards
from mome_utils.routing import ABSTAIN, TokenRouter

__all__ = ["COMMON", "VARIANTS", "Dispatch", "Expert", "MomeCache", "MomeConfig", "MomeForCausalLM", "build_mome"]


class Expert(nn.Module):
    """GPT-2 blocks and their final layer norm, without an embedding: an expert of JEET and MoE-CE."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.h = nn.ModuleList(GPT2Block(config, layer_idx=i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self, embeds: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Embedded tokens [B, T, D] to the last hidden states [B, T, D]."""
        mask = create_causal_mask(self.config, embeds, attention_mask=attention_mask, past_key_values=cache)
        hidden = embeds
        for block in self.h:
            hidden = block(hidden, cache, mask, use_cache=cache is not None)
        return cast(Tensor, self.ln_f(hidden))


class MomeForCausalLM(Shards, Growth, Generation, GPT2PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model of one expert per language behind a token router (and a common expert in MoE-CE).

    Example:
        >>> from mome_utils.config import Shape
        >>> size = {"vocab_size": 16, "block_size": 4, "bos": 0, "eos": 1}
        >>> model = build_mome("jeet", Shape(1, 8, 2), languages=("en", "py"), seed=0, **size)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        >>> model(ids, routes=torch.tensor([1, 0])).logits.shape
        torch.Size([2, 3, 16])
    """

    config_class = MomeConfig
    config: MomeConfig  # type: ignore[assignment]
    base_model_prefix = ""

    def __init__(self, config: MomeConfig) -> None:
        super().__init__(config)
        config.check()
        gpt2 = config.gpt2
        gpt2._attn_implementation = self.config._attn_implementation
        self.router = TokenRouter(gpt2.vocab_size, tuple(config.languages))
        self.common: Expert | None = None
        make: Any = GPT2LMHeadModel if config.variant == "ple" else Expert
        if config.variant != "ple":
            self.wte = nn.Embedding(gpt2.vocab_size, gpt2.n_embd)
            self.wpe = nn.Embedding(gpt2.n_positions, gpt2.n_embd)
        self.experts = nn.ModuleList(make(gpt2) if name in config.active else Absent() for name in config.languages)
        if config.variant != "ple":
            if config.variant == "moe_ce":
                self.common = Expert(gpt2)
            self.lm_head = nn.Linear(gpt2.n_embd, gpt2.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self._tied_weights_keys = {"lm_head.weight": "wte.weight"}
        self.post_init()
        # transformers looks for tied weights in direct children only; PLE's tied heads lie one level below.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Shared token and position embeddings, [B, T, D] (JEET and MoE-CE)."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return cast(Tensor, self.wte(input_ids) + self.wpe(position_ids))

    def head(self, name: str) -> nn.Module:
        """Output projection that reads expert ``name``'s hidden states: its own (PLE) or the shared one."""
        expert = self._expert(name)
        return cast(nn.Module, expert.lm_head if self.config.variant == "ple" else self.lm_head)

    def expert_hidden(self, name: str, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D] of the expert ``name`` (a language, or ``common``) on tokens [B, T].

        Raises:
            MomeError: the model has no such expert.
        """
        positions = _positions(attention_mask, input_ids.shape[1])
        if self.config.variant == "ple":
            return self._ple_hidden(self._expert(name), input_ids, attention_mask, positions, None)
        return cast(Tensor, self._expert(name)(self.embed(input_ids, positions), attention_mask))

    def parameter_counts(self) -> dict[str, int]:
        """``total`` parameters in memory, and those ``active`` for one sequence: the shared ones and one expert's."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for p in self.experts.parameters())
        there = sum(not isinstance(expert, Absent) for expert in self.experts)
        return {"total": total, "active": total - routed + routed // there}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        routes: Tensor | None = None,
        expert_weights: Tensor | None = None,
        use_common: bool = True,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits of a batch whose sequences may belong to different languages.

        Args:
            input_ids: tokens, [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T seen so far]; padding may be on either side.
            position_ids: places of the tokens in their sequences, [B, T]; by default counted over the mask.
            past_key_values: cache that an earlier call returned.
            routes: expert index of each sequence, [B], -1 for the fallback; by default the router's choice.
            expert_weights: instead of routes, the weight of each expert and of the common one, [B, E + 1].
            use_common: MoE-CE's average with the common expert; False leaves it out.
            labels: tokens, [B, T], shifted inside, -100 where no loss is wanted.
            use_cache: return a cache for the next call.
            logits_to_keep: number of last positions to project; 0 projects all.

        Raises:
            MomeError: no routes and no fitted router; routes, weights, context or (unless in training) tokens that do
                not fit the model or the batch.

        With ``past_key_values`` the sequences stay with the cache's experts, whatever else is given.
        """
        merged, cache = self._answers(
            input_ids, attention_mask, position_ids, cast(MomeCache | None, past_key_values), routes, expert_weights,
            use_common, use_cache, logits_to_keep,
        )
        logits = merged if self.config.variant == "ple" else self.lm_head(merged)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=kwargs.get("num_items_in_batch")
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def shared_states(self, input_ids: Tensor, routes: Tensor) -> Tensor:
        """What the shared output projection reads (JEET and MoE-CE): last hidden states [B, T, D], in training.

        Args:
            input_ids: tokens, [B, T]. routes: expert index of each sequence, [B].
        """
        return self._answers(input_ids, None, None, None, routes, None, True, False, 0)[0]

    def _answers(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: MomeCache | None,
        routes: Tensor | None, expert_weights: Tensor | None, use_common: bool, use_cache: bool | None,
        logits_to_keep: int,
    ) -> tuple[Tensor, MomeCache | None]:
        """The experts' answers in the order of the batch, hidden states [B, T, D] or logits (PLE), and the cache."""
        if cache is None:
            if not self.training:  # a step of training waits for no such check
                self._check_tokens(input_ids)
            dispatch = self._dispatch(input_ids, attention_mask, routes, expert_weights, use_common)
            cache = MomeCache(dispatch, len(self.experts)) if use_cache else None
        else:
            dispatch = cast(Dispatch, cache.dispatch)

        length = input_ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if length > self.config.max_position_embeddings:
            raise MomeError(
                f"The text has {length} tokens but the model's context holds "
                f"{self.config.max_position_embeddings}: shorten the text, or generate fewer tokens."
            )
        if position_ids is None:
            position_ids = _positions(attention_mask, length)
            if position_ids is None:
                position_ids = torch.arange(length, device=input_ids.device)[None]
            position_ids = position_ids[:, -input_ids.shape[1]:]
        position_ids = position_ids.expand(input_ids.shape)

        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        embeds = None if self.config.variant == "ple" else self.embed(input_ids, position_ids)
        pieces = []
        for index, rows in dispatch.groups:
            mask = None if attention_mask is None else _rows(attention_mask, rows)
            own = None if cache is None else cache.by_expert[index]
            if embeds is None:
                expert = cast(GPT2LMHeadModel, self.experts[index])
                ids, places = _rows(input_ids, rows), _rows(position_ids, rows)
                hidden = self._ple_hidden(expert, ids, mask, places, own)
                pieces.append(expert.lm_head(hidden[:, kept]))
            else:
                pieces.append(self.experts[index](_rows(embeds, rows), mask, own)[:, kept])
        shared = None
        if embeds is not None and self.common is not None and dispatch.common:
            shared = self.common(embeds, attention_mask, None if cache is None else cache.common)[:, kept]
        return combine(pieces, shared, dispatch), cache

    def _dispatch(
        self, input_ids: Tensor, attention_mask: Tensor | None, routes: Tensor | None,
        expert_weights: Tensor | None, use_common: bool,
    ) -> Dispatch:
        """What `forward` does with each row. Given routes need no router, and training weighs nothing."""
        if expert_weights is not None:
            return Dispatch.of_weights(self._checked_weights(expert_weights.to(input_ids.device), len(input_ids)))
        common = self.common is not None and use_common
        if routes is None or (common and self.config.combine != "mean" and not self.training):
            return Dispatch.of_weights(self.mixing_weights(input_ids, attention_mask, routes, use_common))
        routes = self._checked_routes(routes.to(input_ids.device), len(input_ids))
        if (routes == ABSTAIN).any():
            return Dispatch.of_weights(self.mixing_weights(input_ids, attention_mask, routes, use_common))
        return Dispatch.of_routes(routes, len(self.experts), common)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache itself, because its layout depends on the routes."""
        return False

    def _expert(self, name: str) -> Any:
        """The expert of a language, or the common one."""
        if name == COMMON and self.common is not None:
            return self.common
        if name not in self.languages:
            known = ", ".join(self.languages)
            raise MomeError(f"This model has no expert '{name}': its experts are {known}.")
        expert = self.experts[self.languages.index(name)]
        if isinstance(expert, Absent):
            raise MomeError(f"The expert '{name}' was left on disk: load the model again with it among active_experts.")
        return expert

    @staticmethod
    def _ple_hidden(
        expert: GPT2LMHeadModel, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Last hidden states of a complete GPT-2."""
        # Embedded here: given ids, it would warn of unmasked padding at every </s>, also the padding token.
        output = expert.transformer(
            inputs_embeds=expert.transformer.wte(input_ids), attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=cache is not None,
        )
        return cast(Tensor, output.last_hidden_state)


def build_mome(
    variant: str, shape: Shape, *, vocab_size: int, block_size: int, languages: Sequence[str], seed: int,
    bos: int, eos: int, tie_projection: bool = False,
) -> MomeForCausalLM:
    """An untrained mixture with experts of ``shape`` whose weights depend on ``seed`` only.

    The global random generator is untouched. Experts are configured as the study's students (`gpt2_config`).
    ``tie_projection`` makes the shared output projection of JEET and MoE-CE the token embedding.

    Raises:
        MomeError: as `MomeConfig`.
    """
    expert = gpt2_config(shape, vocab_size=vocab_size, block_size=block_size, bos=bos, eos=eos)
    make: Any = MomeConfig  # the base class takes more than its generated signature says
    config = make(
        variant=variant, languages=list(languages), bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
        expert=expert, attn_implementation=expert._attn_implementation, tie_word_embeddings=tie_projection,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MomeForCausalLM(config)
        if variant == "ple":
            for part in model.experts:
                if isinstance(part, GPT2LMHeadModel):
                    scale_projection(part.transformer.wte.weight)
        else:
            scale_projection(model.wte.weight)
            scale_projection(model.lm_head.weight)
    return model


def _positions(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Places of the last ``length`` tokens, counted over the mask [B, >= length]; None without a mask."""
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; the tensor itself where all are asked for (they are in order then)."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, rows)


AutoModelForCausalLM.register(MomeConfig, MomeForCausalLM, exist_ok=True)
