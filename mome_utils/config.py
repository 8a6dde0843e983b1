"""Profiles: how large the study is run, from a minutes-long smoke test to the published scale.

A profile is a frozen dataclass of plain numbers. Nothing else in the package holds a default that decides a
result, so a profile (with its overrides) and a corpus determine every number of the study.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["MomeError", "Profile", "Shape", "load_profile", "profile_names"]


class MomeError(Exception):
    """An error meant for the reader: one sentence that says what is wrong and what to do."""


@dataclass(frozen=True)
class Shape:
    """Size of a GPT-2 style decoder: ``layers`` blocks of ``width`` features with ``heads`` attention heads."""

    layers: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads) < 1 or self.width % self.heads:
            raise MomeError(
                f"A model of {self.layers} layers, width {self.width} and {self.heads} heads cannot be built: "
                "use positive numbers and a width that is a multiple of the heads."
            )


@dataclass(frozen=True)
class Profile:
    """Every number that decides how the study is run.

    Sizes are counts (topics, tokens, sequences), ``*_epochs`` are passes over the training blocks of the
    languages a run learns from, fractions and percentages say so in their names.
    """

    name: str
    #: Number of topics (aligned document groups) kept, spread evenly over groups; ``None`` keeps all.
    topics: int | None
    vocab_size: int
    block_size: int
    teacher: Shape
    student: Shape
    expert: Shape
    #: Number of seeds: data order and initialisation of teacher, students and experts alike.
    seeds: int
    teacher_epochs: float
    student_epochs: float
    #: Sequences per optimizer step.
    teacher_batch: int
    student_batch: int
    teacher_lr: float
    student_lr: float
    #: Times a run is scored on validation blocks; its checkpoint is chosen there.
    evaluations: int
    #: Validation blocks per language that each of those scorings uses (``None``: all of them).
    evaluation_blocks: int | None
    #: Step of the sliding window that scores a document, in tokens.
    stride: int
    #: Runs trained side by side, and threads of each: part of a run's identity, since sums depend on them.
    jobs: int
    threads: int
    #: ``float32``, ``bfloat16`` (autocast) or ``auto``: bfloat16 where the hardware multiplies it natively.
    dtype: str
    #: Train through ``torch.compile`` where this machine can. It pays in long runs: each process compiles first.
    compile: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    #: No language may have more than this many per cent more tokens than the smallest.
    max_diff_percent: float = 5.0
    #: Keep only topics that exist in every language, and keep them aligned by cutting rather than dropping.
    common_documents: bool = True
    #: Linear warm-up, as a fraction of the steps, then cosine decay (constant in sequential training).
    warmup: float = 0.1
    weight_decay: float = 0.05
    #: Weight of the language-modelling loss when it is fixed (the paper's α).
    alpha: float = 0.5

    def __post_init__(self) -> None:
        positive = ("vocab_size", "block_size", "seeds", "teacher_epochs", "student_epochs", "teacher_batch",
                    "student_batch", "teacher_lr", "student_lr", "evaluations", "stride", "jobs", "threads")
        for name in positive:
            if getattr(self, name) <= 0:
                raise MomeError(f"Profile field '{name}' must be positive, not {getattr(self, name)!r}.")
        if self.stride >= self.block_size:
            raise MomeError(
                f"The scoring stride ({self.stride}) must be smaller than the block ({self.block_size}): "
                "otherwise some bytes are never scored."
            )
        if self.validation_fraction <= 0 or self.test_fraction <= 0 or (
            self.validation_fraction + self.test_fraction >= 1
        ):
            raise MomeError("validation_fraction and test_fraction must be positive and leave room for training.")
        if self.max_diff_percent < 0:
            raise MomeError(f"max_diff_percent must be 0 or more, not {self.max_diff_percent}.")
        if not 0 <= self.alpha <= 1:
            raise MomeError(f"alpha must lie between 0 and 1, not {self.alpha}.")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise MomeError(f"dtype must be float32, bfloat16 or auto, not '{self.dtype}'.")


def _profiles() -> dict[str, Profile]:
    smoke = Profile(
        name="smoke", topics=60, vocab_size=1024, block_size=64,
        teacher=Shape(2, 64, 2), student=Shape(1, 32, 2), expert=Shape(1, 32, 2),
        seeds=1, teacher_epochs=0.5, student_epochs=0.5, teacher_batch=16, student_batch=16,
        teacher_lr=3e-3, student_lr=3e-3, evaluations=2, evaluation_blocks=16, stride=32,
        jobs=1, threads=1, dtype="float32",
    )
    # On three megabytes of text a small model with small batches learns more, in the same time, than a large one;
    # every model makes the same number of passes, so that teacher, students and experts are comparable.
    laptop = Profile(
        name="laptop", topics=None, vocab_size=2048, block_size=128,
        teacher=Shape(4, 192, 3), student=Shape(2, 96, 2), expert=Shape(2, 96, 2),
        seeds=3, teacher_epochs=1.5, student_epochs=1.5, teacher_batch=4, student_batch=4,
        teacher_lr=2e-3, student_lr=3e-3, evaluations=6, evaluation_blocks=48, stride=64,
        jobs=2, threads=1, dtype="auto",
    )
    gpu = Profile(
        name="gpu", topics=None, vocab_size=32_000, block_size=1024,
        teacher=Shape(24, 1024, 16), student=Shape(6, 768, 12), expert=Shape(3, 768, 12),
        seeds=3, teacher_epochs=3, student_epochs=1, teacher_batch=64, student_batch=64,
        teacher_lr=3e-4, student_lr=6e-4, evaluations=20, evaluation_blocks=512, stride=512,
        jobs=1, threads=8, dtype="bfloat16", compile=True,
    )
    paper = dataclasses.replace(
        gpu, name="paper", seeds=1, teacher_batch=1024, student_batch=1024, teacher_lr=5e-5, student_lr=5e-5,
        student_epochs=3, warmup=0.05, expert=Shape(3, 768, 6),
    )
    return {p.name: p for p in (smoke, laptop, gpu, paper)}


def profile_names() -> tuple[str, ...]:
    """Names of the presets, smallest first."""
    return tuple(_profiles())


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """The preset ``name`` with the fields in ``overrides`` replaced.

    Model shapes may be given as ``[layers, width, heads]``. Numbers may be given as text, as they come from a
    command line.

    Raises:
        MomeError: unknown profile or field, or a value of the wrong kind.

    Example:
        >>> load_profile("smoke", {"max_diff_percent": 3}).max_diff_percent
        3.0
    """
    presets = _profiles()
    if name not in presets:
        raise MomeError(f"There is no profile '{name}': choose one of {', '.join(presets)}.")
    values: dict[str, Any] = {}
    fields = {f.name: f for f in dataclasses.fields(Profile)}
    for key, value in (overrides or {}).items():
        if key not in fields or key == "name":
            known = ", ".join(k for k in fields if k != "name")
            raise MomeError(f"A profile has no field '{key}': the fields are {known}.")
        values[key] = _convert(key, str(fields[key].type), value)
    return dataclasses.replace(presets[name], **values)


def _convert(key: str, kind: str, value: Any) -> Any:
    """``value`` as the type that the field's annotation names, or a sentence that says why not."""
    complaint = MomeError(f"The profile field '{key}' needs a value of type {kind}, not {value!r}.")
    if kind == "Shape":
        if isinstance(value, Shape):
            return value
        parts = value.strip("[]()").split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or len(parts) != 3:
            raise complaint
        return Shape(*(_convert(key, "int", p) for p in parts))
    if value is None or value == "None":
        if "None" in kind:
            return None
        raise complaint
    if kind == "str":
        return str(value)
    if kind == "bool":
        named = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in named:
            raise complaint
        return named[str(value).lower()]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise complaint from None
    if not math.isfinite(number):
        raise complaint
    if kind.startswith("int"):
        if number != int(number):
            raise complaint
        return int(number)
    return number
