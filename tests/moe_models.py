"""Small mixtures and text in made-up languages, for the tests of the mixture."""

from __future__ import annotations

import torch

from mome_utils.config import Shape
from mome_utils.models import build_gpt2
from mome_utils.moe import MomeForCausalLM, build_mome
from mome_utils.router_fit import fit_router
from mome_utils.routing import TokenRouter

LANGUAGES = ("en", "fr", "de", "py")
SHAPE, BLOCK, WIDTH_OF_RANGE = Shape(2, 16, 2), 24, 12
VOCABULARY = 3 + WIDTH_OF_RANGE * len(LANGUAGES)
BOS, EOS = 1, 2
SIZE = {"vocab_size": VOCABULARY, "block_size": BLOCK, "bos": BOS, "eos": EOS}


def tokens(language: int, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sequences [count, length] of ids that belong to one language."""
    generator = torch.Generator().manual_seed(97 * seed + language)
    return 3 + WIDTH_OF_RANGE * language + torch.randint(WIDTH_OF_RANGE, (count, length), generator=generator)


def fitted(languages=LANGUAGES) -> TokenRouter:
    """A router for made-up languages."""
    blocks = {name: tokens(LANGUAGES.index(name), 12, BLOCK).numpy() for name in languages}
    return fit_router(blocks, VOCABULARY)


def moved(model, seed: int = 0):
    """A fresh model is almost linear: make its parts differ."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(variant: str, router=None, seed: int = 0, languages=LANGUAGES, **options) -> MomeForCausalLM:
    """A small mixture in evaluation mode, with the attention that a plain ``from_pretrained`` chooses."""
    model = moved(build_mome(variant, SHAPE, languages=languages, seed=seed, **SIZE, **options), seed)
    model.set_attn_implementation("sdpa")
    if router is not None:
        model.set_router(router)
    return model


def students(languages=LANGUAGES, shape=SHAPE):
    """One small GPT-2 per language."""
    return {name: build_gpt2(shape, seed=i, **SIZE).eval() for i, name in enumerate(languages)}


def mixed_batch():
    """Two sequences of each language, [8, 9], shuffled, and their languages, [8]."""
    ids = torch.cat([tokens(i, 2, 9) for i in range(len(LANGUAGES))])
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    return ids[order], order // 2
