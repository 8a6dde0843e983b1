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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2PreTrainedModel
from transformers.utils.generic import can_return_tuple

from mome_utils.config import MomeError, Shape
from mome_utils.models import gpt2_config, scale_projection
from mome_utils.moe_config import COMMON, VARIANTS, MomeCache, MomeConfig
from mome_utils.routing import TokenRouter

__all__ = ["COMMON", "VARIANTS", "MomeCache", "MomeConfig", "MomeForCausalLM", "build_mome"]


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
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embeds, attention_mask=attention_mask, past_key_values=cache
        )
        hidden = embeds
        for block in self.h:
            hidden = block(hidden, cache, mask, use_cache=cache is not None)
        return cast(Tensor, self.ln_f(hidden))


class MomeForCausalLM(GPT2PreTrainedModel, GenerationMixin):
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
        gpt2 = config.gpt2
        gpt2._attn_implementation = self.config._attn_implementation
        self.router = TokenRouter(gpt2.vocab_size, tuple(config.languages))
        self.common: Expert | None = None
        if config.variant == "ple":
            self.experts = nn.ModuleList(GPT2LMHeadModel(gpt2) for _ in config.languages)
        else:
            self.wte = nn.Embedding(gpt2.vocab_size, gpt2.n_embd)
            self.wpe = nn.Embedding(gpt2.n_positions, gpt2.n_embd)
            self.experts = nn.ModuleList(Expert(gpt2) for _ in config.languages)
            if config.variant == "moe_ce":
                self.common = Expert(gpt2)
            self.lm_head = nn.Linear(gpt2.n_embd, gpt2.vocab_size, bias=False)
        self.post_init()
        # transformers looks for tied weights in direct children only; PLE's tied heads lie one level below.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the experts, in the order of their routes."""
        return tuple(self.config.languages)

    @classmethod
    def from_experts(
        cls, experts: Mapping[str, GPT2LMHeadModel], router: TokenRouter | None = None
    ) -> MomeForCausalLM:
        """Assemble PLE from one finished GPT-2 per language; the weights are copied.

        Raises:
            MomeError: experts of different shape or vocabulary, or a router of other languages.
        """
        if not experts:
            raise MomeError("A mixture needs at least two experts, and none was given.")
        shapes = {name: _function_of(model.config) for name, model in experts.items()}
        for name, shape in shapes.items():
            first = next(iter(shapes))
            if shape != shapes[first]:
                raise MomeError(
                    f"The experts '{first}' and '{name}' differ in shape or vocabulary: "
                    "train all experts with one shape and one tokenizer."
                )
        gpt2 = next(iter(experts.values())).config
        model = cls(
            MomeConfig(
                variant="ple", languages=list(experts), expert=deepcopy(gpt2), bos_token_id=gpt2.bos_token_id,
                eos_token_id=gpt2.eos_token_id, pad_token_id=gpt2.pad_token_id,
            )
        )
        for own, (_, student) in zip(model.experts, experts.items(), strict=True):
            own.load_state_dict(student.state_dict())
        if router is not None:
            model.set_router(router)
        return model.train(next(iter(experts.values())).training)

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
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LongTensor:
        """Expert index of each sequence, [B], as the router sees its tokens [B, T].

        Raises:
            MomeError: the model has no fitted router.
        """
        if not self.config.router_fitted:
            raise MomeError("This model has no fitted router: call set_router first, or pass routes=.")
        return cast(LongTensor, self.router(input_ids, attention_mask).argmax(-1))

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
        """``total`` parameters, and those ``active`` for one sequence: the shared ones and one expert's."""
        total = sum(p.numel() for p in self.parameters())
        routed = sum(p.numel() for p in self.experts.parameters())
        return {"total": total, "active": total - routed + routed // len(self.experts)}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        routes: Tensor | None = None,
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
            routes: expert index of each sequence, [B]; by default the cache's, or else the router's choice.
            use_common: MoE-CE's average with the common expert; False leaves it out.
            labels: tokens, [B, T], shifted inside, -100 where no loss is wanted.
            use_cache: return a cache for the next call.
            logits_to_keep: number of last positions to project; 0 projects all.

        Raises:
            MomeError: no routes and no fitted router, a route outside the experts, or too long a context.
        """
        cache = cast(MomeCache | None, past_key_values)
        if cache is not None:
            routes = cache.routes
        elif routes is None:
            routes = self.route(input_ids, attention_mask)
        routes = cast(LongTensor, routes.to(input_ids.device))
        if use_cache and cache is None:
            cache = MomeCache(routes, len(self.experts))

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
        groups = _groups(routes, len(self.experts))
        pieces = []
        for index, rows in groups:
            mask = None if attention_mask is None else _rows(attention_mask, rows)
            own = None if cache is None else cache.by_expert[index]
            if embeds is None:
                expert = cast(GPT2LMHeadModel, self.experts[index])
                ids, places = _rows(input_ids, rows), _rows(position_ids, rows)
                hidden = self._ple_hidden(expert, ids, mask, places, own)
                pieces.append(expert.lm_head(hidden[:, kept]))
            else:
                pieces.append(self.experts[index](_rows(embeds, rows), mask, own)[:, kept])
        merged = _merge(pieces, groups)
        if embeds is None:
            logits = merged
        else:
            if self.common is not None and use_common:
                shared = self.common(embeds, attention_mask, None if cache is None else cache.common)
                merged = (merged + shared[:, kept]) / 2
            logits = self.lm_head(merged)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, *args: Any, routes: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """`GenerationMixin.generate`, with one expert per prompt: routed on the prompt and kept from there.

        Args:
            inputs: prompts, [B, T], padded on the left (with an ``attention_mask``) where lengths differ.
            routes: expert index of each prompt, [B]; by default the router's choice.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if routes is None and prompt is not None:
            routes = self.route(prompt, kwargs.get("attention_mask"))
        return super().generate(inputs, *args, routes=routes, **kwargs)  # type: ignore[misc]

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
        return self.experts[self.languages.index(name)]

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
    bos: int, eos: int,
) -> MomeForCausalLM:
    """An untrained mixture with experts of ``shape`` whose weights depend on ``seed`` only.

    The global random generator is untouched. Experts are configured as the study's students (`gpt2_config`).

    Raises:
        MomeError: as `MomeConfig`.
    """
    expert = gpt2_config(shape, vocab_size=vocab_size, block_size=block_size, bos=bos, eos=eos)
    make: Any = MomeConfig  # the base class takes more than its generated signature says
    config = make(
        variant=variant, languages=list(languages), bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
        expert=expert, attn_implementation=expert._attn_implementation,
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


def _function_of(config: GPT2Config) -> dict[str, Any]:
    """The settings of a GPT-2 that change what it computes (not how it was loaded)."""
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"}
    return {key: value for key, value in config.to_dict().items() if key not in ignored}


def _positions(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Places of the last ``length`` tokens, counted over the mask [B, >= length]; None without a mask."""
    if attention_mask is None:
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _groups(routes: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """Experts in use, each with the rows [n] of its sequences in their order."""
    low, high = torch.aminmax(routes)
    if int(low) < 0 or int(high) >= experts:
        raise MomeError(f"Routes must lie from 0 to {experts - 1}, but lie from {int(low)} to {int(high)}.")
    order = torch.argsort(routes, stable=True)
    counts = torch.bincount(routes, minlength=experts).tolist()
    return [(index, rows) for index, rows in enumerate(torch.split(order, counts)) if len(rows)]


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; the tensor itself where all are asked for (they are in order then)."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, rows)


def _merge(pieces: list[Tensor], groups: list[tuple[int, Tensor]]) -> Tensor:
    """Results of the groups, back in the order of the batch."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat([rows for _, rows in groups])))


AutoConfig.register(MomeConfig.model_type, MomeConfig)
AutoModelForCausalLM.register(MomeConfig, MomeForCausalLM)
