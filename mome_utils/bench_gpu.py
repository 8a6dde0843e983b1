"""``mome bench --device cuda``: how near training comes to what a GPU can multiply, and what the cache saves there.

Three questions at the sizes of the profile ``gpu``, in one process and one call:

- *the teacher*: tokens per second of its training step, and which fraction of this device's own rate of matrix
  products the step's products make up (model FLOPs utilisation: Chowdhery et al., arXiv 2204.02311, appendix B);
- *distillation with and without the cache*: the same step of the same trainer, fed with cached hidden states, or with
  those that the teacher computes in the step;
- *dispatch*: forward and backward of a mixture on a batch of all languages, against a batch for each language.

Steps wait for the device before the clock is read. Weights and texts are random: they cost what real ones do.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mome_utils.batches import ScheduledBlocks, ValidationSet
from mome_utils.bench import Alternation, alternate
from mome_utils.bench_kd import matrix_rate
from mome_utils.bench_sides import BOS, EOS, Side, train_spec
from mome_utils.compilation import resolve_compile
from mome_utils.config import MomeError, Profile, load_profile
from mome_utils.kd_training import KDTrainer
from mome_utils.models import build_gpt2
from mome_utils.moe import build_mome
from mome_utils.moe_config import VARIANTS
from mome_utils.training import LMTrainer, build_model

__all__ = ["gpu"]

LANGUAGES = ("en", "fr", "de", "py")
#: Sequences of a step: a share of the profile's batch that one device holds with its activations.
SEQUENCES = 16
#: Width of the square matrices whose product tells the device's rate.
MATRIX = 8192


def gpu(
    *, root: Path | None = None, rounds: int = 7, device: str = "cuda", sequences: int = SEQUENCES,
    matrix: int = MATRIX, least_seconds: float = 1.0, overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Teacher training, distillation with and without the cache, and a mixture's dispatch on one GPU.

    Args:
        root: not needed; every benchmark takes it.
        rounds: how often each side has its turn.
        device: ``cuda``; ``cpu`` is for the tests, with small sizes.
        sequences: of a step. matrix: width of the matrices that tell the device's rate.
        least_seconds: of a turn. overrides: fields of the profile ``gpu``.

    Returns:
        A row for each comparison: tokens per second of both (medians over the rounds), their ratio (median, lowest
        and highest round), the fraction of the device's matrix rate, and the most memory in use while both are there
        (MB, with weights). The teacher is compared with nothing.

    Raises:
        MomeError: fewer rounds than one, no GPU, or a batch that the languages do not divide.
    """
    if rounds < 1:
        raise MomeError(f"A benchmark needs one round or more, not {rounds}.")
    if sequences % len(LANGUAGES) or sequences < 1:
        raise MomeError(f"The batch needs a multiple of {len(LANGUAGES)} sequences, not {sequences}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise MomeError("There is no GPU here: the benchmarks without --device cuda run on the processor.")
    profile = load_profile("gpu", overrides)
    side = Side(
        "ours", "kd", compiled=resolve_compile(profile.compile), teacher=profile.teacher, student=profile.student,
        vocabulary=profile.vocab_size, block=profile.block_size, batch=sequences, dtype=profile.dtype,
        threads=torch.get_num_threads(),
    )
    rate = matrix_rate(profile.dtype, side.threads, size=matrix, device=device)
    timed = partial(alternate, rounds=rounds, least_seconds=least_seconds, clock=partial(_clock, device))
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for part in (_teacher, _distillation):
            _begin(device)
            rows.append(part(side, timed, rate, device, Path(folder)))
    for variant in VARIANTS:
        _begin(device)
        rows.append(_dispatch(variant, profile, sequences, timed, device))
    return rows


def _begin(device: str) -> None:
    """Nothing of the part before stays on the device, nor in its peak of memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _clock(device: str) -> float:
    """Seconds, once the device has done all it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _teacher(side: Side, timed: Callable[..., Alternation], rate: float, device: str, folder: Path) -> dict[str, Any]:
    """A step of the teacher's training, twice: its ratio to itself shows how still the device was."""
    alone = replace(side, work="ce", student=side.teacher)
    step = _step(alone, folder)
    return _row("teacher training", "itself", alone, timed(step, step), rate, alone.flops(), device)


def _distillation(
    side: Side, timed: Callable[..., Alternation], rate: float, device: str, folder: Path
) -> dict[str, Any]:
    """A step with cached states against one in which the teacher computes them."""
    cached, computed = _step(side, folder), _step(side, folder, teacher_in_step=True)
    times = timed(computed, cached)
    return _row("distillation, cached teacher", "teacher in each step", side,
                Alternation(times.second, times.first), rate, side.flops(), device)


def _dispatch(
    variant: str, profile: Profile, sequences: int, timed: Callable[..., Alternation], device: str
) -> dict[str, Any]:
    """Forward and backward of a mixed batch against the same sequences as a batch for each language."""
    model: Any = build_mome(
        variant, profile.expert, vocab_size=profile.vocab_size, block_size=profile.block_size, languages=LANGUAGES,
        seed=0, bos=BOS, eos=EOS,
    )
    model.to(device).train()
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, profile.vocab_size, (sequences, profile.block_size), generator=drawn).to(device)
    routes = torch.arange(len(LANGUAGES)).repeat_interleave(sequences // len(LANGUAGES)).to(device)
    shuffled = torch.randperm(sequences, generator=drawn).to(device)

    def learn(rows: Tensor) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=profile.dtype == "bfloat16"):
            model(ids[rows], routes=routes[rows], labels=ids[rows]).loss.backward()
        model.zero_grad()

    def apart() -> None:
        for rows in torch.arange(sequences, device=device).view(len(LANGUAGES), -1):
            learn(rows)

    times = timed(lambda: learn(shuffled), apart)
    side = Side("ours", "ce", vocabulary=profile.vocab_size, block=profile.block_size, batch=sequences)
    return _row(f"{variant}, mixed batch", "a batch for each language", side, times, None, 0.0, device)


def _step(side: Side, folder: Path, *, teacher_in_step: bool = False) -> Callable[[], None]:
    """One optimizer step of our trainer on a batch that stays the same."""
    spec = train_spec(side)
    ids = np.random.default_rng(side.seed).integers(3, side.vocabulary, (side.batch, side.block), dtype=np.int32)
    pairs = np.stack([np.zeros(side.batch, dtype=np.int64), np.arange(side.batch)], -1)[None]
    validation = [ValidationSet("xx", torch.from_numpy(ids[:1].astype(np.int64)), torch.ones(side.vocabulary).long())]
    model, decoder = build_model(spec.model, side.seed), None
    if side.work == "ce":
        trainer = LMTrainer(spec, ScheduledBlocks(pairs, [ids], None), validation, folder, model)
    else:
        teacher = build_gpt2(side.teacher, vocab_size=side.vocabulary, block_size=side.block, seed=side.seed + 1,
                             bos=BOS, eos=EOS).eval()
        states = torch.randn(side.batch, side.block, side.teacher.width).bfloat16()
        trainer = KDTrainer(spec, ScheduledBlocks(pairs, [ids], [states]), validation, folder, model,
                            head=teacher.lm_head.weight.detach().clone())
        decoder = teacher.transformer.to(trainer.args.device) if teacher_in_step else None
        if decoder is not None and side.compiled:
            decoder = torch.compile(decoder)
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    batch = trainer._prepare_inputs(trainer.feed.__getitems__(range(side.batch)))
    model.train()

    def step() -> None:
        if decoder is not None:
            with torch.no_grad(), trainer.accelerator.autocast():
                batch["teacher_states"] = decoder(batch["input_ids"], use_cache=False).last_hidden_state.bfloat16()
        trainer.training_step(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()

    return step


def _row(
    measured: str, against: str, side: Side, times: Alternation, rate: float | None, flops: float, device: str
) -> dict[str, Any]:
    """A comparison; ``ratio`` says how many times faster the first is."""
    ratios = [1 / ratio for ratio in times.ratios]
    first, second = float(np.median(times.first)), float(np.median(times.second))
    tokens = side.batch * side.block
    memory = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0
    return {
        "measured": measured, "against": against, "tokens_per_s": tokens / first,
        "against_tokens_per_s": tokens / second, "ratio": float(np.median(ratios)), "lowest": min(ratios),
        "highest": max(ratios), "matrix_rate": flops / first / rate if rate else 0.0, "memory_mb": memory,
        "device": torch.cuda.get_device_name() if device == "cuda" else device, "rounds": len(ratios),
    }
