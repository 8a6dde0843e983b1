"""How far the gradients of the two losses conflict over a training run: at its start, its snapshots and its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from mome_utils.config import MomeError
from mome_utils.dataset import StudyData
from mome_utils.distillation import Objective
from mome_utils.gradients import Moments, conflict, gradient_statistics, logits_of
from mome_utils.runs import Run, torch_threads
from mome_utils.sweeps import in_parallel, on_device, quiet
from mome_utils.training import TrainSpec, build_model

if TYPE_CHECKING:
    from mome_utils.study import Study

__all__ = ["gradient_job", "gradient_rows", "row_moments"]

#: Modules whose sources define the rows.
MODULES = tuple(
    f"mome_utils.{name}" for name in ("gradients", "gradient_runs", "distillation", "divergences", "models")
)


def gradient_job(
    spec: TrainSpec, folder: Path, step: int, teacher: tuple[TrainSpec, Path], language: str, micro_batches: int,
    micro_batch: int, seed: int, data_folder: Path,
) -> pd.DataFrame:
    """How far the gradients conflict in one run at one step, on blocks of the training split drawn by ``seed``.

    Rows of :func:`mome_utils.gradients.conflict`, by layer. ``step`` 0 is the untrained model, the spec's last step
    the finished one (with the spec's choice of checkpoint); any other has to be among its snapshots.
    """
    quiet()
    data, run = StudyData.load(data_folder), Run(spec, folder.name, folder)
    with torch_threads(spec.threads):
        student = build_model(spec.model, spec.seed) if step == 0 else run.model(None if step == spec.steps else step)
        student, mentor = on_device(student.eval()), on_device(Run(teacher[0], teacher[1].name, teacher[1]).model())
        blocks, wanted = data.block_array("train", language), micro_batches * micro_batch
        if len(blocks) < wanted:
            raise MomeError(f"There are {len(blocks)} training blocks of {language}, not {wanted}: ask for fewer.")
        chosen = np.random.default_rng(seed).permutation(len(blocks))[:wanted]
        ids = torch.from_numpy(blocks[chosen].astype(np.int64)).to(student.device)
        objective = spec.objective or Objective()
        return conflict(gradient_statistics(student, ids, logits_of(mentor), objective, micro_batch))


def gradient_rows(
    study: Study, runs: Sequence[Run], teachers: Sequence[Run], *, micro_batches: int = 16, micro_batch: int = 4
) -> pd.DataFrame:
    """How far the gradients conflict at the beginning, the snapshots and the end of runs; computed once and kept.

    Args:
        runs: distilled students.
        teachers: the teachers' runs; each student is beside its own.
        micro_batches, micro_batch: how many, and of how many sequences; the same blocks for all runs of a language.

    Returns:
        The columns of :func:`mome_utils.gradients.conflict`, and run, language, seed, step.
    """
    mentor = {teacher.key: teacher for teacher in teachers}
    missing = [run for run in runs if run.spec.teacher not in mentor]
    if missing:
        raise MomeError(f"The teacher of a run with seed {missing[0].spec.seed} is not among those given: pass it too.")

    def compute() -> pd.DataFrame:
        where = [(run, language, step) for run in runs for language in run.spec.languages
                 for step in sorted({0, *run.spec.snapshots, run.spec.steps})]
        taught = [mentor[str(run.spec.teacher)] for run, _, _ in where]
        jobs = [(run.spec, run.folder, step, (teacher.spec, teacher.folder), language, micro_batches, micro_batch, 0,
                 study.data().path) for (run, language, step), teacher in zip(where, taught, strict=True)]
        tables = in_parallel(gradient_job, jobs, workers=max(1, min(study.profile.jobs, len(jobs))))
        return pd.concat([
            table.assign(run=run.key, language=language, seed=run.spec.seed, step=step)
            for (run, language, step), table in zip(where, tables, strict=True)
        ], ignore_index=True)

    inputs = {"runs": [run.key for run in runs], "micro_batches": micro_batches, "micro_batch": micro_batch}
    return study.cached_rows("gradients", inputs, compute, MODULES)


def row_moments(row: Mapping[str, Any]) -> Moments:
    """The :class:`~mome_utils.gradients.Moments` that a row of :func:`gradient_rows` was made from."""
    return Moments(**{field.name: row[f"moment_{field.name}"] for field in dataclasses.fields(Moments)})
