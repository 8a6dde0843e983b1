"""What a causal language model makes of a text: the states of every layer, one vector for each passage.

A *passage* is a piece of a document, begun with ``<s>``. Its representation at a layer is the state of its final
token (as in Klabunde et al. 2023, arXiv 2312.02730), which has read all of it, or the mean over its tokens. Layer 0
is the embedding, layer l the output of block l, the last one after the final layer norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.evaluation import encode_documents
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_config import COMMON

__all__ = [
    "AGGREGATIONS", "Aggregation", "Passage", "Reader", "States", "cut_passages", "expert_reader", "hidden_states",
    "layer_reader", "load_causal_lm", "text_states", "topic_means",
]

Aggregation = Literal["final", "mean"]
#: The representations of a passage at a layer: the state of its final token, and the mean over its tokens.
AGGREGATIONS: tuple[Aggregation, ...] = ("final", "mean")

Reader = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Token ids [B, T] and their mask [B, T] (1 for tokens, padding on the right) → the states [B, T, D] of each layer."""

States = Mapping[Aggregation, Sequence[NDArray[np.float32]]]
"""By aggregation, the representations of all passages at each layer: [passages, D]."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document: the document's language and id, and token ids begun with ``<s>``."""

    language: str
    topic: str
    ids: tuple[int, ...]


def cut_passages(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], *, tokens: int, per_document: int
) -> list[Passage]:
    """Pieces of equal length that do not overlap, spread evenly over each document.

    Args:
        tokens: of a piece, ``<s>`` included. A document shorter than that is one shorter piece; what is left behind
            the last full piece of a longer one is not used.
        per_document: how many pieces of a document are kept at most.

    Raises:
        MomeError: pieces too short, or fewer than one for each document.
    """
    if tokens < 2 or per_document < 1:
        raise MomeError(f"{per_document} passages of {tokens} tokens hold nothing: use one or more, of two or more.")
    found = []
    for document, (start, *ids) in zip(documents, encode_documents(tokenizer, documents), strict=True):
        pieces = [ids[i : i + tokens - 1] for i in range(0, max(1, len(ids) - tokens + 2), tokens - 1)]
        chosen = np.linspace(0, len(pieces) - 1, min(per_document, len(pieces))).round().astype(int)
        found += [Passage(document.language, document.id, (start, *pieces[i])) for i in chosen]
    return found


# ------------------------------------------------------------------------------------------------------- reading


def layer_reader(model: PreTrainedModel) -> Reader:
    """Reads with any causal language model of ``transformers``, without its output projection."""
    decoder = cast(Any, model.base_model)

    def read(ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        return cast(Sequence[Tensor], decoder(**inputs, output_hidden_states=True, use_cache=False).hidden_states)

    return read


def expert_reader(model: MomeForCausalLM, name: str) -> Reader:
    """Reads with one expert of a mixture: a language's, or the common one.

    Raises:
        MomeError: the model has no such expert.
    """
    if name == COMMON and model.common is not None:
        expert: Any = model.common
    elif name in model.languages:
        expert = model.experts[model.languages.index(name)]
    else:
        raise MomeError(f"This model has no expert '{name}': its experts are {', '.join(model.languages)}.")
    if isinstance(expert, PreTrainedModel):  # PLE: a complete model
        return layer_reader(expert)

    def read(ids: Tensor, mask: Tensor) -> Sequence[Tensor]:
        seen: list[Tensor] = []
        inputs = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in expert.h]
        try:
            last = model.expert_hidden(name, ids.to(model.device), mask.to(model.device))
        finally:
            for hook in inputs:
                hook.remove()
        return [*seen, last]  # what a block reads is what the one before it wrote

    return read


def hidden_states(reader: Reader, passages: Sequence[Sequence[int]], *, pad: int, batch_size: int = 32) -> States:
    """Every layer's representations of token sequences, in their order.

    Args:
        passages: token ids of each, one or more. pad: id to fill shorter ones with, on the right, where a causal
            model's states do not see it. batch_size: sequences read at once.

    Returns:
        By aggregation, one float32 array [passages, D] for each layer.

    Raises:
        MomeError: no passage, or one without tokens.
    """
    if not passages or not all(len(ids) for ids in passages):
        raise MomeError("There is nothing to read: give passages of at least one token.")
    found: dict[Aggregation, list[list[Tensor]]] = {name: [] for name in AGGREGATIONS}
    with torch.inference_mode():
        for first in range(0, len(passages), batch_size):
            batch = [torch.tensor(ids, dtype=torch.long) for ids in passages[first : first + batch_size]]
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(ids) for ids in batch])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            layers = [layer.float().cpu() for layer in reader(padded, mask)]
            found["final"].append([layer[torch.arange(len(batch)), lengths - 1] for layer in layers])
            found["mean"].append([(layer * mask[:, :, None]).sum(1) / lengths[:, None] for layer in layers])
    return {name: [torch.cat(parts).numpy() for parts in zip(*pieces, strict=True)] for name, pieces in found.items()}


def topic_means(states: NDArray[np.float32], topics: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """The topics in alphabetical order, and the mean of the states [passages, D] of each: [topics, D]."""
    names, places = np.unique(np.asarray(topics), return_inverse=True)
    sums = np.zeros((len(names), states.shape[1]))
    np.add.at(sums, places, states)
    return names.tolist(), sums / np.bincount(places)[:, None]


# ------------------------------------------------------------------------------------------- models from elsewhere


def load_causal_lm(name: str) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer, by folder or by name on the Hugging Face hub, in evaluation mode.

    Raises:
        MomeError: nothing of this name can be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MomeError(f"The model '{name}' cannot be loaded: check its name or folder ({reason}).") from error
    return model.eval(), tokenizer


def text_states(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8) -> States:
    """Representations of texts by a model with a tokenizer of its own, each text cut to what the model can read.

    The same texts make the rows of models with different tokenizers comparable.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    found = tokenizer(list(texts), truncation=limit is not None, max_length=limit)["input_ids"]
    # Padding is never seen (mask, and causal attention), so any id serves.
    return hidden_states(layer_reader(model), found, pad=tokenizer.pad_token_id or 0, batch_size=batch_size)
