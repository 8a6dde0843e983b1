"""One large run, trained by all processes that ``accelerate launch`` has started, into the run store.

``accelerate launch --multi_gpu --num_processes 8 -m mome_utils train --profile gpu`` trains the profile's teachers by
eight processes; notebooks that are told so (``teacher_processes=8``) load them from the store. The number of processes
is part of a run's identity, as the number of threads is: each sums its share of a batch first, so the last digits
differ. The guide is ``mome_utils/configs/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mome_utils import recipes
from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective
from mome_utils.distributed import check_processes, is_main, join, main_first, processes
from mome_utils.runs import train_or_load
from mome_utils.study import Study
from mome_utils.sweeps import quiet
from mome_utils.top_k import SparseCache
from mome_utils.training import ModelSpec, TrainSpec

__all__ = ["read_spec", "train_together"]


def train_together(
    parameters: Mapping[str, Any], *, seed: int | None = None, files: Sequence[Path] = ()
) -> Iterator[str]:
    """Train runs one after the other, each by all processes, and say where they are (the main process only).

    Args:
        parameters: of the study, as :meth:`mome_utils.study.Study.open` takes them.
        seed: of the teacher; ``None`` for the teachers of all seeds.
        files: specs to train (:func:`read_spec`) instead of the teacher.

    Raises:
        MomeError: a spec cannot be read, is of other data, or belongs to another number of processes; before the
            first run starts.
    """
    join()
    quiet()
    overrides = {"teacher_processes": processes()} | dict(parameters.get("overrides") or {})
    study = Study.open("train", **{**parameters, "overrides": overrides}, quiet=True)
    with main_first():
        data = study.build_data()
    seeds = study.seeds if seed is None else (seed,)
    specs = [read_spec(file) for file in files] or [recipes.teacher_spec(study, each) for each in seeds]
    for spec in specs:
        check_processes(spec.processes, processes())
        if spec.data != data.fingerprint:
            raise MomeError("A spec is of another data set than this profile makes of this corpus: give those it had.")
    for spec in specs:
        run = train_or_load(spec, study.store, data)
        if is_main():
            count = f"{spec.processes} process{'es' if spec.processes > 1 else ''}"
            yield (
                f"{run.key}: {run.metrics['validation_bits_per_byte']:.4f} bits per byte on validation at step "
                f"{run.metrics['step']} of {spec.steps}, trained by {count}."
            )


def read_spec(file: Path) -> TrainSpec:
    """The spec of a run: a JSON object with its fields, or the manifest of a stored run, whose ``parameters`` it is.

    Raises:
        MomeError: the file cannot be read, or is not a spec.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values = dict(values.get("parameters", values))
        model = dict(values["model"])
        model["shape"] = Shape(**model["shape"])
        values["model"] = ModelSpec(**_frozen(model))
        if values.get("objective"):
            values["objective"] = Objective(**values["objective"])
        if values.get("cache"):
            values["cache"] = SparseCache(**values["cache"])
        return TrainSpec(**_frozen(values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MomeError(
            f"{file} cannot be read as the spec of a run ({type(error).__name__}: {error}): give a run's "
            "manifest.json, or its 'parameters'."
        ) from None


def _frozen(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
