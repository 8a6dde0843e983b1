"""GPT-2 shapes: the teacher, the students and the experts are the same decoder in different sizes."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from mome_utils.config import Shape

__all__ = ["build_gpt2", "gpt2_config", "parameter_count"]


def gpt2_config(shape: Shape, *, vocab_size: int, block_size: int, bos: int, eos: int) -> GPT2Config:
    """Configuration of a GPT-2 decoder (Radford et al., 2019) of the given shape.

    Dropout is off: runs are short, and a run must depend on its seed alone. ``gelu_pytorch_tanh`` is GPT-2's own
    activation in its fused form. Input embedding and output projection are tied, as in GPT-2.
    """
    return GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )


def build_gpt2(shape: Shape, *, vocab_size: int, block_size: int, seed: int, bos: int, eos: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 language model whose weights depend on ``seed`` only (the global generator is untouched)."""
    config = gpt2_config(shape, vocab_size=vocab_size, block_size=block_size, bos=bos, eos=eos)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
