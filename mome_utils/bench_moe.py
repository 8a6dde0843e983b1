"""``mome bench moe``: what mixing languages in a batch, and routing at all, cost next to not doing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from mome_utils.bench import Alternation, alternate, one_thread
from mome_utils.config import MomeError, Shape
from mome_utils.memory import keep_freed_memory
from mome_utils.models import build_gpt2
from mome_utils.moe import Expert, MomeForCausalLM, build_mome
from mome_utils.moe_config import VARIANTS
from mome_utils.router_fit import fit_router

__all__ = ["PLAIN", "SIZES", "expert_alone", "moe"]

#: The variant without experts, whose large batch is compared with its small ones.
PLAIN = "none"

LANGUAGES = ("en", "fr", "de", "py")
#: Shape, vocabulary and block of the laptop study, and a larger one.
SIZES = ((Shape(2, 96, 2), 2048, 128), (Shape(4, 192, 4), 4096, 128))
BOS, EOS = 1, 2


def moe(
    *,
    root: Path | None = None,
    rounds: int = 7,
    sizes: Sequence[tuple[Shape, int, int]] = SIZES,
    sequences: int = 64,
    new_tokens: int = 48,
    variants: Sequence[str] = (PLAIN, *VARIANTS),
    least_seconds: float = 0.2,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A mixed batch against one-language batches, and a generated token against that of a model without routing.

    Three kinds of work for each variant: ``forward`` and ``training`` (forward, loss and backward) of a batch of
    mixed sequences, against the same sequences as one batch per language; and ``token``: greedy generation from one
    prompt, against a plain GPT-2 of equal active size: the expert alone, or for MoE-CE, where the common expert
    answers too, one with as many blocks as both. MoE-CE has one work more, ``token, one expert``: the same text
    against its routed expert alone, which is half of what computes. Each is routed by the model's own router.
    The variant ``none`` is a plain GPT-2, whose batch of all sequences is compared with the same four batches: what
    the size of a batch costs without any routing. One thread; what is counted is the time that the process computes,
    with memory that it keeps (:func:`~mome_utils.memory.keep_freed_memory`), as the study's own runs do.

    Args:
        root: not needed; every benchmark takes it.
        rounds: how often each has its turn.
        sizes: shapes of an expert with vocabulary and block size.
        sequences: in the mixed batch; a multiple of the languages.
        new_tokens: to generate. variants: to try.
        least_seconds: see `alternate`. seed: of weights and texts.

    Returns:
        Rows, each as soon as it is measured.
        For each work: milliseconds of both (medians over the rounds; per generated token for ``token``), their ratio
        (median, lowest and highest round), and the largest difference between their logits.

    Raises:
        MomeError: the two differ, or the batch does not divide by the languages.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    if sequences < 1 or sequences % len(LANGUAGES):
        raise MomeError(f"The batch needs a multiple of {len(LANGUAGES)} sequences, not {sequences}.")
    timed = partial(alternate, rounds=rounds, least_seconds=least_seconds, clock=time.process_time)
    keep_freed_memory()
    return _rows(timed, rounds, sizes, sequences, new_tokens, variants, seed)


def _rows(
    timed: _Timed, rounds: int, sizes: Sequence[tuple[Shape, int, int]], sequences: int, new_tokens: int,
    variants: Sequence[str], seed: int,
) -> Iterator[dict[str, Any]]:
    for shape, vocabulary, block in sizes:
        texts = _texts(vocabulary, block, sequences // len(LANGUAGES), seed)
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
        for variant in variants:
            model: Any = (
                build_gpt2(shape, vocab_size=vocabulary, block_size=block, seed=seed, bos=BOS, eos=EOS).eval()
                if variant == PLAIN else _mixture(variant, shape, vocabulary, block, texts, seed)
            )
            prompt = texts[0][:1, : block - new_tokens]
            works: dict[str, Callable[[], _Work]] = {
                "forward": partial(_forward, model, texts, order, timed),
                "training": partial(_training, model, texts, order, timed),
            }
            if variant != PLAIN:
                plain = expert_alone(model, shape, seed)
                works["token"] = partial(_token, model, plain, prompt, new_tokens, timed)
            if variant != PLAIN and model.common is not None:
                plain = expert_alone(model, shape, seed, common=False)
                works["token, one expert"] = partial(_token, model, plain, prompt, new_tokens, timed)
            for work, measure in works.items():
                with one_thread():
                    times, difference, count = measure()
                first, second = (1000 / count * float(np.median(seconds)) for seconds in (times.first, times.second))
                yield {
                    "variant": variant, "layers": shape.layers, "width": shape.width, "vocabulary": vocabulary,
                    "work": work, "moe_ms": first, "without_ms": second, "ratio": float(np.median(times.ratios)),
                    "lowest": min(times.ratios), "highest": max(times.ratios), "difference": difference,
                    "rounds": rounds,
                }


_Timed = Callable[[Callable[[], object], Callable[[], object]], Alternation]
_Work = tuple[Alternation, float, int]


def _texts(vocabulary: int, block: int, each: int, seed: int) -> list[Tensor]:
    """Ids [each, block] of every language: a range of the vocabulary of its own, beside a shared one."""
    generator = torch.Generator().manual_seed(seed)
    width = (vocabulary - 3) // (len(LANGUAGES) + 1)
    texts = []
    for language in range(len(LANGUAGES)):
        own = torch.rand(each, block, generator=generator) < 0.7
        start = torch.where(own, language + 1, 0) * width + 3
        texts.append(start + torch.randint(width, (each, block), generator=generator))
    return texts


def _mixture(
    variant: str, shape: Shape, vocabulary: int, block: int, texts: Sequence[Tensor], seed: int
) -> MomeForCausalLM:
    model = build_mome(
        variant, shape, vocab_size=vocabulary, block_size=block, languages=LANGUAGES, seed=seed, bos=BOS, eos=EOS
    ).eval()
    model.set_router(fit_router({n: list(t.numpy()) for n, t in zip(LANGUAGES, texts, strict=True)}, vocabulary))
    for place, part in enumerate(texts):
        if not (model.route(part) == place).all():
            raise MomeError("The router does not tell the benchmark's languages apart: give it longer sequences.")
    return model


@torch.no_grad()
def _forward(model: Any, texts: Sequence[Tensor], order: Tensor, timed: _Timed) -> _Work:
    """Logits of the mixed batch, against those of the one-language batches."""
    mixed = torch.cat(list(texts))[order]
    apart = torch.cat([model(part).logits for part in texts])[order]
    difference = _small(model(mixed).logits - apart)
    return timed(lambda: model(mixed), lambda: [model(part) for part in texts]), difference, 1


def _training(model: Any, texts: Sequence[Tensor], order: Tensor, timed: _Timed) -> _Work:
    """Gradients of the mixed batch's loss, against those of the one-language batches', added up."""
    mixed = torch.cat(list(texts))[order]
    languages = torch.arange(len(texts)).repeat_interleave(len(texts[0]))[order]
    routed = isinstance(model, MomeForCausalLM)

    def loss(ids: Tensor, routes: Tensor) -> Tensor:
        options = {"routes": routes} if routed else {}
        found: Tensor = model(ids, labels=ids, **options).loss
        return found

    def together() -> None:
        model.zero_grad()
        loss(mixed, languages).backward()

    def apart() -> None:
        model.zero_grad()
        for place, part in enumerate(texts):
            (loss(part, torch.full((len(part),), place)) / len(texts)).backward()

    def gradients() -> Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model.train()
    together()
    one = gradients()
    apart()
    difference = _small(one - gradients())
    times = timed(together, apart)
    model.zero_grad()
    model.eval()
    return times, difference, 1


@torch.no_grad()
def _token(model: MomeForCausalLM, plain: Any, prompt: Tensor, count: int, timed: _Timed) -> _Work:
    """A text from the mixture, against one from a plain GPT-2."""
    options: dict[str, Any] = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None,
    )
    difference = 0.0
    if plain.config.n_layer == model.config.n_layer:  # the routed expert alone: what a row of weights 1 gives
        difference = _small(model(prompt, use_common=False).logits - plain(prompt).logits)

    def routed() -> object:
        return model.generate(prompt, **options)

    def alone() -> object:
        return plain.generate(prompt, **options)

    return timed(routed, alone), difference, count


def expert_alone(
    model: MomeForCausalLM, shape: Shape, seed: int, *, place: int = 0, common: bool = True
) -> GPT2LMHeadModel:
    """An expert as a plain GPT-2; with MoE-CE's ``common`` one the blocks of both in a row.

    Args:
        model: the mixture. shape: of one expert. seed: of a network that is then overwritten.
        place: which expert.
        common: add the common expert's blocks, where there is one.
    """
    gpt2 = model.config.gpt2
    layers = shape.layers * (2 if common and model.common is not None else 1)
    plain = build_gpt2(
        Shape(layers, shape.width, shape.heads), vocab_size=gpt2.vocab_size, block_size=gpt2.n_positions, seed=seed,
        bos=BOS, eos=EOS,
    ).eval()
    expert = model.experts[place]
    if isinstance(expert, GPT2LMHeadModel):
        plain.load_state_dict(expert.state_dict())
        return plain
    plain.lm_head.weight = model.lm_head.weight  # untied, as in the mixture
    plain.transformer.wte, plain.transformer.wpe = model.wte, model.wpe
    stacks = [part for part in (expert, model.common if common else None) if isinstance(part, Expert)]
    for place, block in enumerate(block for stack in stacks for block in stack.h):
        plain.transformer.h[place].load_state_dict(block.state_dict())
    plain.transformer.ln_f.load_state_dict(stacks[0].ln_f.state_dict())
    return plain


def _small(difference: Tensor) -> float:
    """The largest difference, after a check that it is one of rounding."""
    largest = float(difference.detach().abs().max())
    if largest > 1e-4:
        raise MomeError(
            f"The mixture computes something else than what it is compared with (up to {largest:.1e} apart): "
            "its times mean nothing until that is repaired."
        )
    return largest
