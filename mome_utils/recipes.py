"""What the study trains: one function per kind of run, so that notebooks that need the same run share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective
from mome_utils.runs import run_key
from mome_utils.training import ModelSpec, TrainSpec, resolve_dtype

if TYPE_CHECKING:
    from mome_utils.study import Study

__all__ = [
    "CORE_ARMS", "EXTENDED_ARMS", "moe_spec", "multilingual_student_spec", "objective", "sequential_spec",
    "stage_ends", "student_spec", "teacher_spec",
]

#: Distillation arms of notebook 03 as (divergence, α rule, temperature); plain cross-entropy has no teacher.
_ARMS: Mapping[str, tuple[str, str, float] | None] = MappingProxyType({
    "ce": None,
    "fixed": ("published_inverse_kl", "fixed", 1.0),
    "adaptive": ("published_inverse_kl", "published_adaptive", 1.0),
    "alternating": ("published_inverse_kl", "alternating", 1.0),
    "reverse_kl": ("reverse_kl", "fixed", 1.0),
    "forward_kl": ("forward_kl", "fixed", 2.0),
})
#: What the paper's first question needs, and reverse KL as its text means it.
CORE_ARMS = ("ce", "fixed", "adaptive", "alternating", "reverse_kl")
#: Beside them forward KL at the temperature of the release's other branch, averaged over time.
EXTENDED_ARMS = (*CORE_ARMS, "forward_kl")


def objective(study: Study, arm: str) -> Objective | None:
    """The objective of an arm (``None``: cross-entropy alone)."""
    if arm not in _ARMS:
        raise MomeError(f"There is no arm '{arm}': choose from {', '.join(_ARMS)}.")
    parts = _ARMS[arm]
    if parts is None:
        return None
    divergence, alpha, temperature = parts
    return Objective(divergence=divergence, alpha=alpha, value=study.profile.alpha, temperature=temperature)


def _model(study: Study, shape: Shape, kind: str = "gpt2", experts: Sequence[str] = ()) -> ModelSpec:
    tokenizer = study.data().tokenizer
    return ModelSpec(
        kind, shape, vocab_size=len(tokenizer), block_size=study.profile.block_size, bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id, experts=tuple(experts),
    )


def _blocks(study: Study) -> int:
    """Training blocks that every language has: all learn from equally many."""
    return min(len(study.data().block_array("train", language)) for language in study.languages)


def _steps(sequences: float, batch: int, multiple: int) -> int:
    """Optimizer steps for ``sequences`` blocks, rounded up to a multiple (validations come at equal distances)."""
    return max(1, math.ceil(sequences / batch / multiple)) * multiple


def _batch(study: Study, batch: int) -> int:
    """The profile's batch, rounded up to the same number of sequences from each language."""
    return math.ceil(batch / len(study.languages)) * len(study.languages)


def _spec(study: Study, model: ModelSpec, languages: Sequence[str], seed: int, **values: object) -> TrainSpec:
    profile = study.profile
    settings: dict = dict(
        model=model, data=study.data().fingerprint, languages=tuple(languages), warmup=profile.warmup,
        weight_decay=profile.weight_decay, seed=seed, threads=profile.threads, dtype=resolve_dtype(profile.dtype),
        evaluations=profile.evaluations, evaluation_blocks=profile.evaluation_blocks, select_best=True,
        lr_schedule="cosine",
    )
    return TrainSpec(**(settings | values))


def teacher_spec(study: Study, seed: int) -> TrainSpec:
    """The multilingual teacher: balanced batches, cosine decay, checkpoint chosen on mean validation bits per byte.

    The release chooses on the English loss alone; the mean over languages is what a multilingual teacher is for.
    """
    profile, batch = study.profile, _batch(study, study.profile.teacher_batch)
    sequences = profile.teacher_epochs * _blocks(study) * len(study.languages)
    return _spec(
        study, _model(study, profile.teacher), study.languages, seed, sampler="balanced", batch_size=batch,
        steps=_steps(sequences, batch, profile.evaluations), learning_rate=profile.teacher_lr,
    )


def multilingual_student_spec(study: Study, seed: int) -> TrainSpec:
    """A student-sized model trained by cross-entropy on exactly the teacher's batches: the single session."""
    teacher = teacher_spec(study, seed)
    return _spec(
        study, _model(study, study.profile.student), study.languages, seed, sampler="balanced",
        batch_size=teacher.batch_size, steps=teacher.steps, learning_rate=study.profile.student_lr,
    )


def student_spec(study: Study, language: str, arm: str, seed: int) -> TrainSpec:
    """One language's student under an arm of notebook 03; arms with one seed share start and data order."""
    profile, batch = study.profile, study.profile.student_batch
    goal = objective(study, arm)
    return _spec(
        study, _model(study, profile.student), [language], seed, sampler="balanced", batch_size=batch,
        steps=_steps(profile.student_epochs * _blocks(study), batch, profile.evaluations),
        learning_rate=profile.student_lr, objective=goal,
        teacher=None if goal is None else run_key(teacher_spec(study, seed)),
    )


def moe_spec(study: Study, variant: str, seed: int, arm: str = "fixed") -> TrainSpec:
    """JEET or MoE-CE: experts trained together, one language a batch, as many batches each as a student has."""
    profile = study.profile
    alone = student_spec(study, study.languages[0], arm, seed)
    return _spec(
        study, _model(study, profile.expert, variant, study.languages), study.languages, seed,
        sampler="one_language", batch_size=alone.batch_size, steps=alone.steps * len(study.languages),
        learning_rate=profile.student_lr, objective=alone.objective, teacher=alone.teacher,
    )


def sequential_spec(study: Study, seed: int, order: Sequence[str] | None = None) -> TrainSpec:
    """One student trained on the languages one after the other, on as many tokens as the single session.

    Rule for the stages: the learning rate is constant after one warm-up and the optimizer's state is kept, so that
    every stage can learn as well as the first; nothing tells the model that the language has changed.
    """
    languages = tuple(order or study.languages)
    single = multilingual_student_spec(study, seed)
    evaluations = len(languages) * max(2, study.profile.evaluations // 2)
    steps = _steps(single.steps * single.batch_size, single.batch_size, evaluations)
    return _spec(
        study, _model(study, study.profile.student), languages, seed, sampler="sequential",
        batch_size=single.batch_size, steps=steps, learning_rate=study.profile.student_lr, lr_schedule="constant",
        evaluations=evaluations, select_best=False, snapshots=stage_ends(steps, len(languages)),
    )


def stage_ends(steps: int, stages: int) -> tuple[int, ...]:
    """The step after which each of ``stages`` equal stages ends."""
    return tuple(steps * (i + 1) // stages for i in range(stages))
