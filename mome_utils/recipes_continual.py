"""What notebook 06 trains beyond the other notebooks: orders, sessions, methods against forgetting, and relearning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mome_utils.config import MomeError
from mome_utils.continual import ContinualSpec
from mome_utils.continual_methods import METHODS
from mome_utils.recipes import moe_spec, multilingual_student_spec, sequential_spec
from mome_utils.schedules import ScheduleKind
from mome_utils.training import TrainSpec

if TYPE_CHECKING:
    from mome_utils.study import Study

__all__ = [
    "COURSES", "SESSIONS", "Course", "chosen_courses", "continual_spec", "growing_spec", "learn_spec", "method_table",
    "orders", "relearn_spec", "session_spec",
]


@dataclass(frozen=True)
class Course:
    """One way through the languages in turn.

    Attributes:
        method: a key of :data:`~mome_utils.continual_methods.METHODS`.
        strength: of the method; 0 for ``plain``.
        label: what a reader sees.
        tier: ``core`` and ``extended`` are the notebook's arms; ``further`` ones are trained when they are named.
        fresh: whether later stages begin with a fresh optimizer and a warm-up of their own.
    """

    method: str
    strength: float
    label: str
    tier: Literal["core", "extended", "further"] = "further"
    fresh: bool = False


#: Sequential training with something done against forgetting, by arm. Pulls and distillation have other strengths too.
COURSES: Mapping[str, Course] = MappingProxyType({
    "replay_1": Course("replay", 0.01, "Replay 1 %"),
    "replay_5": Course("replay", 0.05, "Replay 5 %", tier="core"),
    "replay_20": Course("replay", 0.20, "Replay 20 %", tier="extended"),
    "ewc_weak": Course("ewc", 10.0, "EWC, λ = 10"),
    "ewc": Course("ewc", 100.0, "EWC, λ = 100", tier="extended"),
    "ewc_strong": Course("ewc", 1000.0, "EWC, λ = 1,000"),
    "l2_weak": Course("l2", 10.0, "L2 pull, λ = 10"),
    "l2": Course("l2", 100.0, "L2 pull, λ = 100", tier="extended"),
    "l2_strong": Course("l2", 1000.0, "L2 pull, λ = 1,000"),
    "lwf_weak": Course("lwf", 0.3, "LwF, weight 0.3"),
    "lwf": Course("lwf", 1.0, "LwF, weight 1", tier="extended"),
    "lwf_strong": Course("lwf", 3.0, "LwF, weight 3"),
    "rate_tenth": Course("rate", 0.1, "A tenth of the rate"),
    "fresh_start": Course("plain", 0.0, "Fresh optimizer, new warm-up", fresh=True),
})

#: One session over all languages, by the order of its batches.
SESSIONS: Mapping[str, ScheduleKind] = MappingProxyType({
    "single_session": "balanced", "random_batches": "random", "blocked_batches": "one_language",
})


def chosen_courses(arms: str, further: Sequence[str] = ()) -> tuple[str, ...]:
    """The arms of :data:`COURSES` that belong to ``core`` or ``extended``, and further ones by name, in their order.

    Raises:
        MomeError: an unknown name.
    """
    for arm in further:
        if arm not in COURSES:
            raise MomeError(f"There is no course '{arm}': choose from {', '.join(COURSES)}.")
    tiers = ("core", "extended") if arms == "extended" else ("core",)
    return tuple(arm for arm, course in COURSES.items() if course.tier in tiers or arm in further)


def orders(study: Study) -> tuple[tuple[str, ...], ...]:
    """Orders of the languages: the study's own first, then its reverse, then the halves swapped.

    At ``gpu`` and ``paper`` every order follows. Two languages have two.
    """
    own = tuple(study.languages)
    half = len(own) // 2
    rest = permutations(own) if study.profile.name in ("gpu", "paper") else [own[half:] + own[:half]]
    return tuple(dict.fromkeys((own, own[::-1], *rest)))


def session_spec(study: Study, seed: int, arm: str) -> TrainSpec:
    """A student of all languages in one session: the single session of notebook 06 but for the order of its batches.

    Raises:
        MomeError: an unknown arm of :data:`SESSIONS`.
    """
    if arm not in SESSIONS:
        raise MomeError(f"There is no session '{arm}': choose from {', '.join(SESSIONS)}.")
    return replace(multilingual_student_spec(study, seed), sampler=SESSIONS[arm])


def continual_spec(study: Study, seed: int, arm: str, order: Sequence[str] | None = None) -> ContinualSpec:
    """A course of :data:`COURSES`: the sequential run of the same seed and order, but for the rule after stage one."""
    if arm not in COURSES:
        raise MomeError(f"There is no course '{arm}': choose from {', '.join(COURSES)}.")
    course = COURSES[arm]
    return _extended(
        sequential_spec(study, seed, order), method=course.method, strength=course.strength,
        optimizer_state="fresh" if course.fresh else "kept", warm_up_again=course.fresh,
    )


def growing_spec(study: Study, seed: int, *, frozen: bool) -> ContinualSpec:
    """JEET that grows by an expert per stage: each stage's batches reach its own expert and the shared parts alone.

    An expert whose turn has not come, or is over, gets no gradient and so does not change. The shared embeddings and
    the output projection go on learning, or are frozen after the first stage. It learns from text alone, like the
    sequential student, whose steps, batches and rule for the stages it has.
    """
    mixture = replace(moe_spec(study, "jeet", seed).model, experts=tuple(study.languages))
    return _extended(replace(sequential_spec(study, seed), model=mixture), freeze_shared=frozen)


def relearn_spec(study: Study, seed: int, start: str | None, *, scored: int = 12) -> ContinualSpec:
    """The first language once more, for half a stage: from a run's final weights, or untrained with ``None``.

    Both begin with a warm-up and a fresh optimizer, and see the same sequences in the same order; they are scored
    ``scored`` times at equal distances, so that their curves can be compared step by step.
    """
    course = sequential_spec(study, seed)
    steps = max(1, round(course.steps / len(course.languages) / 2 / scored)) * scored
    first = replace(course, languages=course.languages[:1], steps=steps, evaluations=scored, snapshots=(steps,))
    return _extended(first, start=start)


def learn_spec(study: Study, seed: int) -> ContinualSpec:
    """What :func:`relearn_spec` is compared with: the same steps from scratch."""
    return relearn_spec(study, seed, None)


def _extended(spec: TrainSpec, **settings: Any) -> ContinualSpec:
    """A spec with the fields that a continual run has beyond it."""
    return ContinualSpec(**{f.name: getattr(spec, f.name) for f in fields(TrainSpec)}, **settings)


def method_table(arms: Sequence[str]) -> list[dict[str, str]]:
    """A row per course: arm, name, what its strength means, source."""
    return [
        {"arm": f"`{arm}`", "course": course.label,
         "its strength": "the rule between stages" if course.fresh else METHODS[course.method].strength,
         "source": "" if course.fresh else METHODS[course.method].source}
        for arm, course in ((arm, COURSES[arm]) for arm in arms)
    ]
