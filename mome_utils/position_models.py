"""Small transformers that differ in one thing at a time: how they encode position, and which way they look.

================  ===================================================================================================
``position``      what position does
================  ===================================================================================================
``absolute``      a learned vector per position is added to the token's (BERT, GPT-2)
``relative``      a learned bias per head and distance bucket is added to the attention scores (Raffel et al. 2020,
                  T5, arXiv 1910.10683)
``alibi``         a fixed bias, −slope · distance, is added to them (Press et al. 2022, arXiv 2108.12409; BLOOM)
``rotary``        queries and keys are turned by an angle that grows with the position (Su et al. 2021,
                  arXiv 2104.09864)
================  ===================================================================================================

All have equal shapes (the encodings' own parameters apart), read either way (``causal`` or not), and take explicit
``position_ids``: the last three see differences of positions only, so moving a whole sequence changes nothing there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2ForTokenClassification, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput

from mome_utils.config import MomeError, Shape
from mome_utils.models import IGNORED, scale_projection

__all__ = [
    "POSITIONS", "PositionConfig", "PositionForPretraining", "PositionForTokenClassification", "PositionModel",
    "build_position_model", "classifier_from", "distance_bucket", "load_classifier",
]

#: The encodings.
POSITIONS = ("absolute", "relative", "alibi", "rotary")
BUCKETS = 16


class PositionConfig(PreTrainedConfig):
    """Configuration of the models of this module.

    Args:
        vocab_size: tokens.
        width, layers, heads: shape of the stack.
        max_positions: positions that exist; T5's distances are bucketed up to this one.
        position: one of :data:`POSITIONS`.
        causal: whether a token sees only itself and what comes before.

    Raises:
        MomeError: an unknown encoding, or a head of odd width for ``rotary``.
    """

    model_type = "mome_position"

    vocab_size: int = 2048
    width: int = 64
    layers: int = 2
    heads: int = 2
    max_positions: int = 128
    position: str = "absolute"
    causal: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.position not in POSITIONS:
            raise MomeError(f"There is no position encoding '{self.position}': choose one of {', '.join(POSITIONS)}.")
        Shape(self.layers, self.width, self.heads)
        if self.position == "rotary" and self.width // self.heads % 2:
            raise MomeError("Rotary positions turn pairs of features: choose heads of even width.")

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states (transformers' name)."""
        return self.width


def distance_bucket(distance: Tensor, *, causal: bool, buckets: int = BUCKETS, reach: int = 128) -> Tensor:
    """T5's bucket of a distance (position of the key minus that of the query): exact when small, then logarithmic.

    Args:
        distance: integers of any shape.
        causal: whether keys only lie before; else half of the buckets are for each side.
        buckets: number of buckets.
        reach: distance from which on all share the last bucket.

    Returns:
        Indices from 0 to ``buckets − 1``, of the same shape.
    """
    if causal:
        side, size = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        side, size = (distance > 0).long() * buckets, distance.abs()
    exact = buckets // 2
    scale = (buckets - exact) / math.log(max(reach, exact + 1) / exact)
    far = exact + (torch.log(size.clamp(min=1).float() / exact) * scale).long()
    return side + torch.where(size < exact, size, far.clamp(max=buckets - 1))


class _Attention(nn.Module):
    """Multi-head attention whose scores take a bias ``[B or 1, heads, T, T]``."""

    def __init__(self, config: PositionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.inward = nn.Linear(config.width, 3 * config.width)
        self.outward = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor, bias: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.inward(hidden).split(width, -1)
        )
        if turn is not None:
            query, key = _turned(query, turn), _turned(key, turn)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        weights = scores.softmax(-1)
        return self.outward((weights @ value).transpose(1, 2).reshape(batch, length, width)), weights


def _turned(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of features ``[B, heads, T, d]`` turned by their positions' angles, ``[B, 1, T, d/2]`` each."""
    cosine, sine = turn
    a, b = states.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class _Block(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, config: PositionConfig) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(config.width)
        self.attention = _Attention(config)
        self.before_feed = nn.LayerNorm(config.width)
        self.feed = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(approximate="tanh"),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, hidden: Tensor, bias: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(self.before_attention(hidden), bias, turn)
        hidden = hidden + mixed
        return hidden + self.feed(self.before_feed(hidden)), weights


class _Base(PreTrainedModel):
    config_class = PositionConfig
    config: PositionConfig
    base_model_prefix = "body"
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's normal initialisation, token embeddings as the study's other models have them."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.num_embeddings == self.config.vocab_size:  # the tokens', which is the output projection too
                scale_projection(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class PositionModel(_Base):
    """Token ids to hidden states.

    Example:
        >>> model = PositionModel(PositionConfig(vocab_size=8, width=8, layers=1, heads=2, position="rotary"))
        >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: PositionConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        if config.position == "absolute":
            self.places = nn.Embedding(config.max_positions, config.width)
        elif config.position == "relative":
            self.distances = nn.Embedding(BUCKETS, config.heads)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.final = nn.LayerNorm(config.width)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        output_attentions: bool = False, **_: Any,
    ) -> BaseModelOutput:
        """Hidden states of a batch.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 1 where a token is to be seen (default: everywhere).
            position_ids: ``[B, T]`` (default: 0, 1, 2, …).
            output_attentions: whether to return the weights ``[B, heads, T, T]`` of each layer.

        Raises:
            MomeError: absolute positions beyond those that exist.
        """
        config, length = self.config, input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        hidden = self.tokens(input_ids)
        if config.position == "absolute":
            if int(position_ids.max()) >= config.max_positions:
                raise MomeError(
                    f"Position {int(position_ids.max())} does not exist: this model has {config.max_positions} "
                    "positions, so give shorter texts or smaller shifts."
                )
            hidden = hidden + self.places(position_ids)
        bias = self._bias(position_ids, attention_mask, length)
        turn = self._turn(position_ids) if config.position == "rotary" else None
        weights = []
        for block in self.blocks:
            hidden, own = block(hidden, bias, turn)
            weights.append(own)
        attentions = cast(Any, tuple(weights)) if output_attentions else None
        return BaseModelOutput(last_hidden_state=self.final(hidden), attentions=attentions)

    def _bias(self, places: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """What is added to the attention scores: ``[B or 1, heads or 1, T, T]``."""
        config, dtype = self.config, self.tokens.weight.dtype
        bias = torch.zeros(1, 1, length, length, dtype=dtype, device=places.device)
        distance = places[:, None, :] - places[:, :, None]  # of the key from the query
        if config.position == "relative":
            bucket = distance_bucket(distance, causal=config.causal, reach=config.max_positions)
            bias = self.distances(bucket).permute(0, 3, 1, 2)
        elif config.position == "alibi":
            steps = torch.arange(1, config.heads + 1, device=places.device, dtype=dtype)
            slopes = 2 ** (-8 * steps / config.heads)
            bias = -slopes[None, :, None, None] * distance.abs()[:, None].to(dtype)
        lowest = torch.finfo(dtype).min
        if config.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=places.device).triu(1)
            bias = bias.masked_fill(later, lowest)
        if mask is not None and not bool(mask.all()):
            bias = bias.masked_fill(mask[:, None, None, :] == 0, lowest)
        return bias

    def _turn(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position's angles, ``[B, 1, T, d/2]`` each."""
        half = self.config.width // self.config.heads // 2
        rates = 10_000 ** (-torch.arange(half, device=places.device, dtype=torch.float32) / half)
        angles = places[:, None, :, None].float() * rates
        return angles.cos(), angles.sin()


class PositionForPretraining(_Base):
    """Token ids to logits over the vocabulary, by the (tied) token embedding; the caller says what is predicted."""

    def __init__(self, config: PositionConfig) -> None:
        super().__init__(config)
        self.body = PositionModel(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, **_: Any,
    ) -> TokenClassifierOutput:
        """Loss and logits at the positions that have a label only, ``[n, V]``: the rest needs no product.

        Args:
            input_ids: ``[B, T]``.
            labels: ``[B, T]``, what each position predicts (masked language modelling: its own token; causal: the
                next one), −100 where nothing.
            attention_mask, position_ids: as for :class:`PositionModel`.
        """
        hidden = self.body(input_ids, attention_mask, position_ids).last_hidden_state
        asked = labels != IGNORED
        logits = hidden[asked] @ self.body.tokens.weight.T
        return TokenClassifierOutput(loss=functional.cross_entropy(logits, labels[asked]), logits=logits)


class PositionForTokenClassification(_Base):
    """Token ids to logits over labels, ``[B, T, labels]``; ``config.num_labels`` says how many."""

    def __init__(self, config: PositionConfig) -> None:
        super().__init__(config)
        self.body = PositionModel(config)
        self.head = nn.Linear(config.width, cast(int, config.num_labels))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool = False, **_: Any,
    ) -> TokenClassifierOutput:
        """Logits and, with labels ``[B, T]`` (−100: ignored), their mean cross-entropy."""
        read = self.body(input_ids, attention_mask, position_ids, output_attentions)
        logits = self.head(read.last_hidden_state)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        return TokenClassifierOutput(loss=loss, logits=logits, attentions=read.attentions)


def build_position_model(
    position: str, shape: Shape, *, causal: bool, vocab_size: int, max_positions: int, seed: int,
) -> PositionForPretraining:
    """An untrained model whose weights depend on ``seed`` only; what two encodings share starts alike.

    Raises:
        MomeError: as :class:`PositionConfig`.
    """
    make: Any = PositionConfig
    config = make(
        vocab_size=vocab_size, width=shape.width, layers=shape.layers, heads=shape.heads, position=position,
        max_positions=max_positions, causal=causal,
    )
    with torch.random.fork_rng(devices=[]):
        model = PositionForPretraining(config)
        for name, module in model.named_modules():
            torch.manual_seed(crc32(f"{seed} {name}".encode()))  # its own draw, whatever else there is
            model._init_weights(module)
    return model


def classifier_from(folder: Path, labels: int, seed: int) -> PreTrainedModel:
    """A saved language model, of this module or GPT-2, under a fresh classification head that depends on ``seed``.

    Raises:
        MomeError: the folder holds another kind of model.
    """
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    classes: dict[str, Any] = {"mome_position": PositionForTokenClassification, "gpt2": GPT2ForTokenClassification}
    if kind not in classes:
        raise MomeError(f"A model of the kind '{kind}' gets no classification head here: use mome_position or gpt2.")
    config = (GPT2Config if kind == "gpt2" else PositionConfig).from_pretrained(folder, num_labels=labels)
    config.classifier_dropout = 0.0  # GPT-2's head would have some: the study has none anywhere
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = classes[kind].from_pretrained(
            folder, config=config, local_files_only=True, dtype=torch.float32
        )
        head = model.get_submodule("head" if kind == "mome_position" else "classifier")
        nn.init.normal_(head.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    return model


def load_classifier(folder: Path) -> PreTrainedModel:
    """A finished run's classifier, in evaluation mode."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    classes: dict[str, Any] = {"mome_position": PositionForTokenClassification, "gpt2": GPT2ForTokenClassification}
    model: PreTrainedModel = classes[kind].from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval()
