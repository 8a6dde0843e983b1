"""What notebook 08 trains, at which size, and how its runs and scores come out of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from mome_utils.config import MomeError, Shape
from mome_utils.position_runs import (
    STAGE,
    TASKS,
    ClassifySpec,
    PositionRun,
    PretrainSpec,
    run_key,
    stored_task,
    train_or_load,
)
from mome_utils.position_scores import score_job
from mome_utils.position_tasks import task_specs
from mome_utils.runs import STAGE as LANGUAGE_MODELS
from mome_utils.sweeps import in_parallel, quiet

if TYPE_CHECKING:
    from pathlib import Path

    from mome_utils.dataset import StudyData
    from mome_utils.position_runs import Spec
    from mome_utils.runs import Run
    from mome_utils.study import Study

__all__ = [
    "ARMS", "CURED", "DIRECTIONS", "Budget", "Scores", "budget_of", "classify_spec", "position_runs", "pretrain_spec",
    "score_runs", "seeds_of", "tasks_of",
]

#: Arm → the steps that each batch gets. As released, a cure is a second step on the batch, changed.
ARMS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "plain": ("plain",),
    "twice": ("plain", "plain"),
    "rps": ("plain", "rps"),
    "cp": ("plain", "cp"),
    "left": ("plain", "left"),
    "rps_cp": ("rps", "cp"),
    "rps_alone": ("rps",),
    "cp_alone": ("cp",),
})
#: The published cures.
CURED = ("rps", "cp")
#: Direction → whether a token sees only what comes before.
DIRECTIONS: Mapping[str, bool] = MappingProxyType({"encoder": False, "decoder": True})
_SCORE_MODULES = tuple(f"mome_utils.{m}" for m in ("position_models", "position_scores", "tagging"))
#: Seeds of models that train in seconds.
_SEEDS = 5


@dataclass(frozen=True)
class Budget:
    """Sizes: of the models, of pretraining (steps, blocks a step), of classification (batches, sentences a batch), and
    how many sentences are kept to learn from and to be tested on."""

    shape: Shape
    steps: int
    blocks: int
    batches: int
    sentences: int
    learned: int
    tested: int
    pretrain_rate: float = 3e-3
    rate: float = 3e-3


def budget_of(study: Study) -> Budget:
    """What a profile affords: seconds a run on a laptop, the student's shape on larger machines."""
    known = {
        "smoke": Budget(Shape(1, 32, 2), 12, 3, 16, 8, 128, 24),
        "laptop": Budget(Shape(2, 64, 2), 200, 3, 80, 16, 3000, 200),
    }
    large = Budget(study.profile.student, 4000, 32, 1000, 32, 50_000, 2000, pretrain_rate=6e-4, rate=2e-4)
    return known.get(study.profile.name, large)


def seeds_of(study: Study, asked: int = 0) -> tuple[int, ...]:
    """Seeds of the models trained here: as asked, or five where the profile has more than one."""
    return tuple(range(asked or (_SEEDS if study.profile.seeds > 1 else 1)))


def tasks_of(study: Study, copies: int) -> dict[str, str]:
    """The tasks that the study's languages allow: kind → key of the stored task; made where it is not there.

    Raises:
        MomeError: fewer than two copies, or more than leave room for a sentence.
    """
    if not 2 <= copies <= study.data().block_size // 8:
        raise MomeError(f"copies must lie between 2 and {study.data().block_size // 8} here, not {copies!r}.")
    budget, found = budget_of(study), {}
    for spec in task_specs(study.languages, study.data().block_size, copies, budget.learned, budget.tested):
        found[spec.kind] = stored_task(spec, study.store, study.data())
        study.touch(study.store.path(TASKS, found[spec.kind]))
    return found


def pretrain_spec(study: Study, position: str, direction: str, seed: int) -> PretrainSpec:
    """Language modelling on the languages of the tasks (all languages where there is but one task, of any words)."""
    budget = budget_of(study)
    specs = task_specs(study.languages, study.data().block_size, 2, budget.learned, budget.tested)
    languages = tuple(g for g in study.languages if any(g in spec.languages for spec in specs))
    blocks = -(-budget.blocks // len(languages)) * len(languages)  # equally many of each language
    return PretrainSpec(
        study.data().fingerprint, languages, position, DIRECTIONS[direction], budget.shape, budget.steps, blocks,
        budget.pretrain_rate, seed, study.profile.threads,
    )


def classify_spec(study: Study, task: str, start: PretrainSpec | Run, arm: str, *, longer: int = 1) -> ClassifySpec:
    """A classifier under an arm, from a pretraining or from a finished language model of the study, with its seed.

    Args:
        study: the study.
        task: key of the task.
        start: what it starts from.
        arm: one of :data:`ARMS`.
        longer: factor of the number of batches.

    Raises:
        MomeError: an unknown arm.
    """
    if arm not in ARMS:
        raise MomeError(f"There is no arm '{arm}': choose one of {', '.join(ARMS)}.")
    budget = budget_of(study)
    own = isinstance(start, PretrainSpec)
    key, seed = (run_key(start), start.seed) if isinstance(start, PretrainSpec) else (start.key, start.spec.seed)
    return ClassifySpec(
        study.data().fingerprint, task, key, STAGE if own else LANGUAGE_MODELS, ARMS[arm], longer * budget.batches,
        budget.sentences, budget.rate, study.data().block_size, seed, study.profile.threads,
    )


def position_runs(study: Study, specs: Sequence[Spec], *, extra: bool = False) -> list[PositionRun]:
    """The finished runs of ``specs``, in order; what is not in the store is trained, side by side.

    ``extra`` marks runs beyond the core set, whose time is reported apart, as in :meth:`mome_utils.study.Study.runs`.
    """
    keys = [run_key(spec) for spec in specs]
    todo = {k: s for k, s in zip(keys, specs, strict=True) if not study.store.has(STAGE, k)}
    jobs = [(spec, study.store.root, study.data().path) for spec in todo.values()]
    in_parallel(_train_job, jobs, workers=max(1, min(study.profile.jobs, len(jobs))))
    found = [train_or_load(spec, study.store, study.data()) for spec in specs]
    for run in {run.key: run for run in found}.values():
        study.count_run(run.folder, run.metrics, trained=run.key in todo, extra=extra)
    return found


def _train_job(spec: Spec, root: Path, data_folder: Path) -> str:
    """One run, in whatever process it lands."""
    from mome_utils.artifacts import Store
    from mome_utils.dataset import StudyData

    quiet()
    data: StudyData = StudyData.load(data_folder)
    return train_or_load(spec, Store(root), data).key


class Scores(NamedTuple):
    """Tables of :mod:`mome_utils.position_scores`, with ``task``, ``model``, ``arm`` and ``seed``."""

    counts: pd.DataFrame
    losses: pd.DataFrame
    attention: pd.DataFrame


def score_runs(study: Study, runs: Mapping[tuple[str, str, str], Sequence[PositionRun]], copies: int) -> Scores:
    """Classifiers scored at ``copies`` places, side by side and once: what is in the store is read.

    Args:
        study: the study.
        runs: by task, name of the model and arm.
        copies: K.
    """
    names = ("position_counts", "position_losses", "position_attention")
    every = {run.key: run for group in runs.values() for run in group}
    scores = study.scores
    keys = {key: [scores.key(n, {"run": key, "copies": copies}, _SCORE_MODULES) for n in names] for key in every}
    todo = [key for key, parts in keys.items() if not all(scores.has(part) for part in parts)]
    jobs = []
    for key in todo:
        spec = every[key].spec
        assert isinstance(spec, ClassifySpec)
        jobs.append((key, spec.task, copies, study.profile.threads, study.store.root, study.data().path))
    tables = in_parallel(score_job, jobs, workers=max(1, min(study.profile.jobs, len(jobs))))
    for key, made in zip(todo, tables, strict=True):
        for part, table in zip(keys[key], made, strict=True):
            scores.save(part, table, {"position_run": key, "copies": copies}, _SCORE_MODULES)
    found: tuple[list[pd.DataFrame], ...] = ([], [], [])
    for (task, model, arm), group in runs.items():
        for run in group:
            for rows, part in zip(found, keys[run.key], strict=True):
                rows.append(scores.read(part).assign(task=task, model=model, arm=arm, seed=run.spec.seed))
    return Scores(*(pd.concat(rows, ignore_index=True) for rows in found))
