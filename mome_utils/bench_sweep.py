"""``mome bench sweep``: six runs as the study makes them, and six runs of a textbook's loop one after the other.

Two arms (fixed and adaptive α) and three seeds of one language's student, at the sizes of the profile ``laptop``.
Ours caches the three teachers' hidden states first, then trains side by side through joblib, as a notebook does
(:func:`mome_utils.sweeps.in_parallel`), and validates and stores each run. The textbook
(:func:`mome_utils.bench_sides.textbook_loop`) trains the same students on the same sequences, one after the other in
one process, with as many threads as ours has workers; it caches, validates and stores nothing. Both are timed from
the start of a process to its end, by the time that passes: start-up counts, so the runs must be long enough. The data
set and the teachers (untrained: they cost what trained ones do) are made beforehand. Both keep freed memory for the
next step, which helps the textbook: its like in :mod:`mome_utils.bench_sides` does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from mome_utils import recipes
from mome_utils.bench_sides import library_network, textbook_loop
from mome_utils.config import MomeError, load_profile
from mome_utils.runs import STAGE, STATES, run_key, run_modules
from mome_utils.schedules import schedule
from mome_utils.study import Study
from mome_utils.sweeps import cache_job, in_parallel, quiet, train_job
from mome_utils.training import TrainSpec, build_model, load_gpt2, save_model

__all__ = ["ARMS", "SEEDS", "sweep"]

ARMS = ("fixed", "adaptive")
SEEDS = (0, 1, 2)
LANGUAGE = "en"


def sweep(
    *, root: Path | None = None, rounds: int = 5, steps: int = 624, topics: int | None = None, workers: int = 2,
    arms: Sequence[str] = ARMS, seeds: Sequence[int] = SEEDS, profile: str = "laptop",
    overrides: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A sweep through the run store, caching included, against the textbook's loop one run after the other.

    Args:
        root: not needed; every benchmark takes it.
        rounds: how often each side has its turn.
        steps: of each run; the default is what a student takes in the study.
        topics: of the corpus that the data set is made of; ``None`` takes the profile's.
        workers: runs side by side, and threads of the textbook.
        arms, seeds: of the students. profile, overrides: sizes of everything else.

    Returns:
        One row: seconds of both (medians over the rounds), their ratio (median, lowest and highest round), and the
        largest difference between the mean cross-entropies of a run's last tenth on both sides (nats).

    Raises:
        MomeError: fewer rounds or steps than one, or a side that ended.
    """
    if rounds < 1 or steps < 1:
        raise MomeError(f"A benchmark needs one round and one step or more, not {rounds} and {steps}.")
    changed = {"evaluations": 1, **({} if topics is None else {"topics": topics}), **(overrides or {})}
    request = {"profile": profile, "overrides": changed, "steps": steps, "workers": workers, "arms": list(arms),
               "seeds": list(seeds)}
    seconds: dict[str, list[float]] = {"ours": [], "textbook": []}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _side("prepare", request, Path(folder))
        for _ in range(rounds):
            for side in seconds:
                start = time.perf_counter()
                losses[side] = _side(side, request, Path(folder))
                seconds[side].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["textbook"], strict=True)]
    sizes = load_profile(profile, changed)
    tokens = steps * sizes.student_batch * sizes.block_size * len(arms) * len(seeds)
    middle = {side: float(np.median(found)) for side, found in seconds.items()}
    return [{
        "runs": len(arms) * len(seeds), "steps": steps, "workers": workers,
        "ours_s": middle["ours"], "textbook_s": middle["textbook"],
        "tokens_per_s": tokens / middle["ours"], "textbook_tokens_per_s": tokens / middle["textbook"],
        "ratio": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios),
        "difference": max(abs(a - b) for a, b in zip(losses["ours"], losses["textbook"], strict=True)),
        "rounds": rounds,
    }]


def _side(name: str, request: Mapping[str, Any], folder: Path) -> list[float]:
    """Run one side in a process of its own; what it writes on its last line."""
    package = str(Path(__file__).resolve().parent.parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {
        "MOME_ARTIFACTS": str(folder), "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "mome_utils.bench_sweep", name, json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing (want of memory?)"]
        raise MomeError(f"The benchmark's side '{name}' ended: {lines[-1]}.")
    found: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# --------------------------------------------------------------------------------- what the sides' processes do


def _study(request: Mapping[str, Any]) -> Study:
    return Study.open("bench", profile=request["profile"], overrides=request["overrides"], quiet=True)


def _specs(study: Study, request: Mapping[str, Any]) -> list[TrainSpec]:
    steps = request["steps"]
    return [
        dataclasses.replace(recipes.student_spec(study, LANGUAGE, arm, seed), steps=steps, snapshots=())
        for arm in request["arms"] for seed in request["seeds"]
    ]


def _teachers(study: Study, request: Mapping[str, Any]) -> list[TrainSpec]:
    return [recipes.teacher_spec(study, seed) for seed in request["seeds"]]


def _prepare(request: Mapping[str, Any]) -> list[float]:
    """The data set, and teachers as finished runs."""
    study = _study(request)
    study.build_data()
    for spec in _teachers(study, request):
        with study.store.create(STAGE, run_key(spec), inputs={}, parameters=spec, modules=run_modules(spec)) as result:
            save_model(build_model(spec.model, spec.seed), result.folder)
    return []


def _ours(request: Mapping[str, Any]) -> list[float]:
    """Cache, train and store; the mean cross-entropy of each run's last tenth."""
    study = _study(request)
    specs, place = _specs(study, request), (study.store.root, study.data().path)
    caches = [(spec, LANGUAGE, *place) for spec in _teachers(study, request)]
    in_parallel(cache_job, caches, workers=request["workers"])
    keys = in_parallel(train_job, [(spec, *place) for spec in specs], workers=request["workers"])
    last = [_last(pd.read_parquet(study.store.path(STAGE, key) / "history.parquet")["ce"].to_list()) for key in keys]
    for key in keys:  # the next round must train and cache again
        shutil.rmtree(study.store.path(STAGE, key))
    shutil.rmtree(study.store.root / STATES)
    return last


def _textbook(request: Mapping[str, Any]) -> list[float]:
    """The same students, each with its teacher in each step; the mean cross-entropy of each run's last tenth."""
    torch.set_num_threads(request["workers"])
    study = _study(request)
    blocks = study.data().block_array("train", LANGUAGE)
    examples: Any = [{"input_ids": torch.from_numpy(row.astype(np.int64))} for row in blocks]
    last = []
    for spec in _specs(study, request):
        order = schedule(spec.sampler, {LANGUAGE: len(blocks)}, steps=spec.steps, batch_size=spec.batch_size,
                         seed=spec.seed)
        batches = DataLoader(examples, batch_size=spec.batch_size, sampler=order[..., 1].flatten().tolist())
        assert spec.teacher is not None
        teacher = library_network(load_gpt2(study.store.path(STAGE, spec.teacher))).eval()
        student: Any = build_model(spec.model, spec.seed)
        losses: list[float] = []
        textbook_loop(library_network(student), teacher, batches, spec, losses.append)
        last.append(_last(losses))
    return last


def _last(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


if __name__ == "__main__":
    quiet()
    sides = {"prepare": _prepare, "ours": _ours, "textbook": _textbook}
    print(json.dumps(sides[sys.argv[1]](json.loads(sys.argv[2]))))
