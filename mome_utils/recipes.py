"""What the study trains: one function per kind of run, so that notebooks that need the same run share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from mome_utils.compilation import resolve_compile
from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective
from mome_utils.runs import run_key
from mome_utils.training import ModelSpec, TrainSpec, resolve_dtype

if TYPE_CHECKING:
    from mome_utils.study import Study

__all__ = [
    "CORE_ARMS", "EXTENDED_ARMS", "arm_names", "dense_spec", "expert_groups", "gpt2_parameters", "group_expert_spec",
    "groups_spec", "held_out_groups", "matched_shape", "moe_spec", "multilingual_student_spec", "objective",
    "rate_spec", "sequential_spec", "small_student_spec", "stage_ends", "student_spec", "teacher_spec",
]

#: Distillation arms of notebook 03; plain cross-entropy has no teacher. "As released" is the whole of the release's
#: step: its masks, its rule and its micro-batches, as many as a laptop's batch has sequences.
_ARMS: Mapping[str, Objective | None] = MappingProxyType({
    "ce": None,
    "fixed": Objective("soft_ce", "fixed"),
    "adaptive": Objective("soft_ce", "published_adaptive"),
    "alternating": Objective("soft_ce", "alternating"),
    "as_released": Objective("published_inverse_kl", "published_adaptive", micro_batches=4),
    "alternating_micro": Objective("soft_ce", "published_alternating", micro_batches=4),
    "kd": Objective("soft_ce", "kd"),
    "reverse_kl": Objective("reverse_kl", "fixed"),
    "forward_kl_t2": Objective("forward_kl", "fixed", temperature=2.0),
    "jensen_shannon": Objective("jensen_shannon", "fixed", parameter=0.5),
    "skew_forward": Objective("skew_forward_kl", "fixed", parameter=0.1),
    "skew_reverse": Objective("skew_reverse_kl", "fixed", parameter=0.1),
    "total_variation": Objective("total_variation", "fixed"),
    "linear_up": Objective("soft_ce", "linear_up"),
    "linear_down": Objective("soft_ce", "linear_down"),
    "cosine_up": Objective("soft_ce", "cosine_up"),
    "cosine_down": Objective("soft_ce", "cosine_down"),
    "uncertainty": Objective("soft_ce", "uncertainty"),
    "gradient_norm": Objective("soft_ce", "gradient_norm"),
    "kd_then_ce": Objective("soft_ce", "kd_then_ce"),
    "ce_then_kd": Objective("soft_ce", "ce_then_kd"),
    "plateau": Objective("soft_ce", "plateau"),
})
#: What the paper's first question needs, and reverse KL as its text means it.
CORE_ARMS = ("ce", "fixed", "adaptive", "alternating", "reverse_kl")
#: Beside them the release as it is, the other divergences, and other rules for α.
EXTENDED_ARMS = (
    *CORE_ARMS, "as_released", "alternating_micro", "kd", "forward_kl_t2", "jensen_shannon", "skew_reverse",
    "total_variation", "linear_up", "uncertainty", "gradient_norm", "kd_then_ce", "plateau",
)


def arm_names() -> tuple[str, ...]:
    """Every arm that can be trained."""
    return tuple(_ARMS)


def objective(study: Study, arm: str) -> Objective | None:
    """The objective of an arm, α at the profile's value (``None``: cross-entropy alone)."""
    if arm not in _ARMS:
        raise MomeError(f"There is no arm '{arm}': choose from {', '.join(_ARMS)}.")
    found = _ARMS[arm]
    return None if found is None else replace(found, value=study.profile.alpha)


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
        compiled=resolve_compile(profile.compile),
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


def multilingual_student_spec(study: Study, seed: int, arm: str = "ce") -> TrainSpec:
    """A student-sized model of all languages, on exactly the teacher's batches.

    By cross-entropy alone it is the single session of notebook 06; with another arm, a multilingual student.
    """
    teacher, goal = teacher_spec(study, seed), objective(study, arm)
    return _spec(
        study, _model(study, study.profile.student), study.languages, seed, sampler="balanced",
        batch_size=teacher.batch_size, steps=teacher.steps, learning_rate=study.profile.student_lr,
        objective=goal, teacher=None if goal is None else run_key(teacher),
    )


def student_spec(study: Study, language: str, arm: str, seed: int) -> TrainSpec:
    """One language's student under an arm of notebook 03; arms with one seed share start and data order.

    Students at fixed α keep their weights after each quarter of the steps: notebook 03 looks at their gradients.
    """
    profile, batch = study.profile, study.profile.student_batch
    goal = objective(study, arm)
    steps = _steps(profile.student_epochs * _blocks(study), batch, profile.evaluations)
    return _spec(
        study, _model(study, profile.student), [language], seed, sampler="balanced", batch_size=batch, steps=steps,
        learning_rate=profile.student_lr, objective=goal, snapshots=stage_ends(steps, 4)[:-1] if arm == "fixed" else (),
        teacher=None if goal is None else run_key(teacher_spec(study, seed)),
    )


def rate_spec(study: Study, language: str, arm: str, seed: int, factor: float) -> TrainSpec:
    """A student whose learning rate is ``factor`` times the profile's: the check that no arm is at a disadvantage."""
    spec = replace(student_spec(study, language, arm, seed), snapshots=())
    return replace(spec, learning_rate=spec.learning_rate * factor)


def small_student_spec(study: Study, language: str, arm: str, seed: int) -> TrainSpec:
    """A student of half the depth and half the width, for question O1: another ratio of teacher to student."""
    shape = study.profile.student
    small = Shape(max(1, shape.layers // 2), max(1, shape.width // 2 // shape.heads) * shape.heads, shape.heads)
    return replace(student_spec(study, language, arm, seed), model=_model(study, small), snapshots=())


def held_out_groups(study: Study) -> tuple[str, ...]:
    """Every other topic group, in alphabetical order: what the students of :func:`groups_spec` never see.

    Raises:
        MomeError: the corpus has fewer than two groups.
    """
    groups = tuple(sorted(set(study.data().table["group"])))
    if len(groups) < 2:
        raise MomeError("A shifted domain needs topic groups: give the documents of the corpus a 'group'.")
    return groups[1::2]


def groups_spec(study: Study, language: str, arm: str, seed: int) -> TrainSpec:
    """A student that trains on half of the topic groups only, for question O1: another domain.

    It makes as many passes over its blocks as the others do over theirs. (Its teacher has seen all groups.)
    """
    unseen = held_out_groups(study)
    kept = tuple(group for group in sorted(set(study.data().table["group"])) if group not in unseen)
    blocks = min(len(study.data().blocks_of_groups("train", g, kept)) for g in study.languages)
    spec = student_spec(study, language, arm, seed)
    steps = _steps(study.profile.student_epochs * blocks, spec.batch_size, study.profile.evaluations)
    return replace(spec, steps=steps, groups=kept, snapshots=())


def moe_spec(study: Study, variant: str, seed: int, arm: str = "fixed", *, mixed: bool = False) -> TrainSpec:
    """JEET or MoE-CE: experts trained together, on as many sequences of each language as a student has.

    As published, each batch is of one language, and an expert has as many batches as a student. ``mixed`` gives every
    batch the same number of sequences of each language instead, each sent to its expert: the same steps and tokens,
    so an expert learns in every step, from a share of the batch. The profile's batch is rounded up for that, and the
    steps become fewer, where the languages do not divide it.
    """
    profile = study.profile
    alone = student_spec(study, study.languages[0], arm, seed)
    steps, batch = alone.steps * len(study.languages), alone.batch_size
    if mixed:
        sequences, batch = steps * batch, _batch(study, batch)
        steps = _steps(sequences, batch, profile.evaluations)
    return _spec(
        study, _model(study, profile.expert, variant, study.languages), study.languages, seed,
        sampler="balanced" if mixed else "one_language", batch_size=batch, steps=steps,
        learning_rate=profile.student_lr, objective=alone.objective, teacher=alone.teacher,
    )


def expert_groups(languages: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """The languages in ``count`` groups of neighbours in their order, as equal in number as can be.

    Raises:
        MomeError: fewer groups than one, or more than languages.

    Example:
        >>> expert_groups(("en", "fr", "de", "py"), 2)
        (('en', 'fr'), ('de', 'py'))
    """
    if not 1 <= count <= len(languages):
        raise MomeError(f"{len(languages)} languages make 1 to {len(languages)} groups of experts, not {count}.")
    ends = [round(len(languages) * i / count) for i in range(count + 1)]
    return tuple(tuple(languages[a:b]) for a, b in zip(ends, ends[1:], strict=False))


def gpt2_parameters(shape: Shape, vocab_size: int, block_size: int) -> int:
    """Parameters of a GPT-2 with a tied output projection, without building it."""
    width = shape.width
    blocks = shape.layers * (12 * width**2 + 13 * width)  # attention 4, feed-forward 8; their biases 9, layer norms 4
    return (vocab_size + block_size + 2) * width + blocks  # embeddings, and the final layer norm


def matched_shape(study: Study, experts: int) -> Shape:
    """Shape of each of ``experts`` models that together have as many parameters as one student per language.

    The rule: the student's depth, and the width (a multiple of 4) that comes nearest; the number of heads is the
    divisor of the width that comes nearest to the student's width per head. Depth stays because the layers follow one
    another: so a token passes as many of them in every model that is compared.
    """
    profile, vocabulary = study.profile, len(study.data().tokenizer)
    if experts == len(study.languages):
        return profile.student
    layers, per_head = profile.student.layers, profile.student.width // profile.student.heads
    target = len(study.languages) * gpt2_parameters(profile.student, vocabulary, profile.block_size) / experts

    def distance(width: int) -> float:
        return abs(gpt2_parameters(Shape(layers, width, 1), vocabulary, profile.block_size) - target)

    widest = 4 + profile.student.width * len(study.languages)  # parameters grow at least as fast as the width
    width = min(range(4, widest + 4, 4), key=distance)
    heads = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(width / h - per_head))
    return Shape(layers, width, heads)


def group_expert_spec(
    study: Study, languages: Sequence[str], seed: int, arm: str = "fixed", *, experts: int
) -> TrainSpec:
    """The expert of a group of languages, one of ``experts`` that are together as large as one student per language.

    For quality against the number of experts at a fixed total size. Each language is seen as often as by its
    student, in balanced batches; with one language a group this is :func:`student_spec`.
    """
    if len(languages) == 1 and experts == len(study.languages):
        return student_spec(study, languages[0], arm, seed)
    return _dense(study, languages, matched_shape(study, experts), seed, arm)


def dense_spec(study: Study, seed: int, arm: str = "fixed", *, total: bool) -> TrainSpec:
    """One model of all languages, as large as all PLE experts (``total``) or as the one that answers.

    The fair rivals of a mixture: the same teacher, loss, sequences and steps, and no routing. Where students make as
    many passes as the teacher, the smaller is the very run of :func:`multilingual_student_spec`.
    """
    shape = matched_shape(study, 1) if total else study.profile.student
    return _dense(study, study.languages, shape, seed, arm)


def _dense(study: Study, languages: Sequence[str], shape: Shape, seed: int, arm: str) -> TrainSpec:
    """A GPT-2 of some languages, balanced, that makes as many passes over their blocks as a student."""
    profile, goal = study.profile, objective(study, arm)
    batch = math.ceil(profile.student_batch / len(languages)) * len(languages)
    sequences = profile.student_epochs * _blocks(study) * len(languages)
    return _spec(
        study, _model(study, shape), languages, seed, sampler="balanced", batch_size=batch,
        steps=_steps(sequences, batch, profile.evaluations), learning_rate=profile.student_lr, objective=goal,
        teacher=None if goal is None else run_key(teacher_spec(study, seed)),
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
