"""What a saved mixture is: the function that its experts compute, the tokens that they read, the tensors it holds.

Experts of equal shape may have another number of heads, belong to another variant, or have been trained with another
tokenizer. A digest of each travels with a saved mixture, so that a wrong expert is found before it answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import GPT2Config

from mome_utils.artifacts import DamagedArtifact, digest
from mome_utils.moe_config import MomeConfig

__all__ = [
    "check_tensors", "expected_tensors", "expert_digest", "function_of", "read_config", "vocabulary_digest",
    "vocabulary_in",
]

#: Settings of a GPT-2 that change what it computes.
_FUNCTION = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
    "add_cross_attention", "tie_word_embeddings",
)


def function_of(config: GPT2Config) -> dict[str, Any]:
    """The settings of a GPT-2 that change what it computes (not how it was trained or loaded)."""
    return {key: getattr(config, key) for key in _FUNCTION}


def expert_digest(config: MomeConfig) -> str:
    """Name of the function that a mixture's experts compute, whatever their weights: variant and settings."""
    return digest({"variant": config.variant, **function_of(config.gpt2)})


def vocabulary_in(folder: Path) -> dict[str, int] | None:
    """Tokens and their ids of the tokenizer in a folder; ``None`` where there is none."""
    whole, words = folder / "tokenizer.json", folder / "vocab.json"
    if whole.is_file():
        return Tokenizer.from_file(str(whole)).get_vocab(with_added_tokens=True)
    if words.is_file():
        return cast(dict[str, int], json.loads(words.read_text(encoding="utf-8")))
    return None


def vocabulary_digest(vocabulary: Mapping[str, int] | None) -> str | None:
    """Name of a vocabulary: equal for equal tokens with equal ids; ``None`` where it is not known."""
    return None if vocabulary is None else digest(vocabulary)


def read_config(folder: Path, **fields: Any) -> MomeConfig:
    """The configuration in a folder, with some fields changed.

    Raises:
        DamagedArtifact: there is none, or it is not a mixture's.
    """
    path, facts = folder / "config.json", None
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        pass  # said below
    if not isinstance(facts, dict) or facts.get("model_type") != MomeConfig.model_type:
        raise DamagedArtifact(
            "The configuration 'config.json' is missing, damaged or not that of a mixture: copy it again from the "
            "saved model."
        )
    return cast(MomeConfig, MomeConfig.from_pretrained(folder, **fields))


def expected_tensors(config: MomeConfig, experts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a mixture with these of its experts writes, by name; without their numbers."""
    from mome_utils.moe import MomeForCausalLM  # it stands on this module

    described: Any = deepcopy(config)
    described.active_experts = list(experts)
    with torch.device("meta"):
        model: Any = MomeForCausalLM(described)
    state, tied = model.state_dict(), model.all_tied_weights_keys
    return {key: tuple(tensor.shape) for key, tensor in state.items() if tied.get(key) not in state}


def check_tensors(config: MomeConfig, files: Iterable[Path], shapes: bool) -> None:
    """Compare what the files hold with what the configuration describes, before a number is read.

    Raises:
        DamagedArtifact: tensors are missing or superfluous, or (where ``shapes`` matter) have another shape; or a
            file names another function.
    """
    found: dict[str, tuple[int, ...]] = {}
    functions = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            functions.add((opened.metadata() or {}).get("function"))
            found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    expected = expected_tensors(config, config.active)
    if not config.router_fitted:  # its numbers are never read; earlier versions wrote fewer of them
        found, expected = (
            {key: shape for key, shape in part.items() if not key.startswith("router.")} for part in (found, expected)
        )
    same = found == expected if shapes else found.keys() == expected.keys()
    if not same or functions - {None, expert_digest(config)}:
        raise DamagedArtifact(
            "The configuration describes another model than the one in these files (its variant, or the depth, "
            "width, heads or vocabulary of its experts): copy it again from the saved model."
        )
