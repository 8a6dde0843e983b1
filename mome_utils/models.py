"""GPT-2 shapes, and the loss of language modelling: teacher, students and experts differ in size only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from mome_utils.config import Shape

__all__ = ["IGNORED", "build_gpt2", "gpt2_config", "next_tokens", "parameter_count", "scale_projection", "shifted_ce"]

IGNORED = -100
"""Label of a position that takes part in no loss (the value used throughout transformers)."""

#: Blocks up to this many tokens use plain attention.
SHORT_BLOCK = 256


def gpt2_config(shape: Shape, *, vocab_size: int, block_size: int, bos: int, eos: int) -> GPT2Config:
    """Configuration of a GPT-2 decoder (Radford et al., 2019) of the given shape.

    Dropout is off: runs are short, and a run must depend on its seed alone. ``gelu_pytorch_tanh`` is GPT-2's own
    activation in its fused form. Input embedding and output projection are tied, as in GPT-2. Attention is fused
    except for short blocks, where the plain products are faster to differentiate on a processor.
    """
    make: Any = GPT2Config  # the base class takes more than its generated signature says
    config: GPT2Config = make(
        attn_implementation="eager" if block_size <= SHORT_BLOCK else "sdpa",
        vocab_size=vocab_size, n_positions=block_size, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )
    return config


def build_gpt2(shape: Shape, *, vocab_size: int, block_size: int, seed: int, bos: int, eos: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 language model whose weights depend on ``seed`` only (the global generator is untouched)."""
    config = gpt2_config(shape, vocab_size=vocab_size, block_size=block_size, bos=bos, eos=eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        scale_projection(model.transformer.wte.weight)  # tied: the output projection too
    return model


def scale_projection(weight: torch.Tensor) -> None:
    """Draw an embedding or output projection ``[V, H]`` anew, so that logits start at the same size at any width.

    GPT-2 uses a standard deviation of 0.02 whatever the width; its final layer norm has unit variance, so initial
    logits have one of 0.02·√H. That suits the paper's teacher (H = 1024); a hundred features start with logits so
    small that many steps pass before the embedding learns. So 0.02·√1024 is kept for every H. (Why initial scales
    should follow the width: Yang et al., arXiv 2203.03466; this is one step of their scheme, not all of it.)
    """
    torch.nn.init.normal_(weight, std=0.02 * math.sqrt(1024 / weight.shape[1]))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts: labels moved one place left, the last position ignored, [B, T] → [B, T].

    Moving the labels and not the logits saves a copy of [B, T, V].
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def shifted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, the mean over the positions that have a target.

    Args:
        logits: [B, T, V]; position t predicts label t + 1. Half precision is widened to float32.
        labels: [B, T] token ids; −100 marks a position that is no target.
    Returns:
        [] nats per target; 0 (with zero gradient) where nothing is a target.
    """
    flat, targets = logits.flatten(0, 1), next_tokens(labels).reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    total = functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
