"""Many runs side by side: one function per kind of job, spread over processes by joblib.

On this machine the processes are joblib's own. ``joblib.parallel_config`` takes the same sweep elsewhere; for a
cluster that runs Dask, whose workers see the study's folder of artifacts::

    from distributed import Client
    with Client("scheduler:8786"), joblib.parallel_config("dask"):
        study.runs(specs)

Orchestration only: nothing here decides a number, so changing it retrains nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import joblib
import pandas as pd
import torch
from transformers import PreTrainedModel

from mome_utils.artifacts import Store
from mome_utils.continual import train_or_load
from mome_utils.dataset import StudyData
from mome_utils.evaluation import score_documents
from mome_utils.memory import keep_freed_memory, release_freed_memory
from mome_utils.runs import STAGE, Run, cache_teacher, run_key, torch_threads
from mome_utils.training import TrainSpec

__all__ = ["cache_job", "in_parallel", "on_device", "quiet", "score_job", "train_job", "training_cost"]


#: Two jobs must not share a process: they would draw from one random generator, and neither would be repeatable.
_ALONE = Lock()


def in_parallel(
    function: Callable[..., Any], jobs: Sequence[tuple], *, workers: int,
    watch: Callable[[int], None] | None = None, pause: float = 1.0,
) -> list[Any]:
    """``[function(*job) for job in jobs]``, ``workers`` at a time through joblib, in order.

    Jobs see nothing of each other: each gives what it gives alone, to the last bit, wherever it runs. They must not
    call this function themselves.

    Args:
        function: what a job is; it can be imported by its name, or be sent as it is.
        jobs: arguments of each.
        workers: jobs at a time in processes of this machine; one means this process and this thread. Where
            ``joblib.parallel_config`` names another backend (Dask, Ray), that backend decides, even for one job.
        watch: called with the number of finished jobs every ``pause`` seconds (with one worker: after each job).
        pause: seconds.

    Raises:
        Exception: the first that a job raises. It stops the sweep and its workers, as an interruption does; finished
            jobs have saved their results.
    """
    results: list[Any] = []
    elsewhere = _elsewhere()
    if workers <= 1 and not elsewhere:
        for job in jobs:
            results.append(function(*job))
            if watch is not None:
                watch(len(results))
        return results
    done = Event()
    release_freed_memory()  # what this process has kept for its next tensors is wanted by the workers now
    # An error or an interruption closes a generator, and joblib then ends its workers. Not every backend has them.
    backend = joblib.parallel.get_active_backend()[0]
    parallel = joblib.Parallel(
        n_jobs=None if elsewhere else workers,
        return_as="generator" if backend.supports_return_generator else "list",
    )

    def look() -> None:
        while watch is not None and not done.wait(pause):
            watch(parallel.n_completed_tasks)  # results in order would hide the jobs that overtook others

    looking = Thread(target=look, daemon=True)
    looking.start()
    try:
        with warnings.catch_warnings():
            # A worker that was idle for long, or whose memory has grown, is replaced: its job is not lost.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
            results.extend(parallel(joblib.delayed(_alone)(function, job) for job in jobs))
    finally:
        done.set()
        looking.join()  # its last word must not come after ours
    if watch is not None:
        watch(len(results))
    return results


def _elsewhere() -> bool:
    """Whether the caller chose a backend of joblib other than processes of this machine."""
    own = joblib.parallel.BACKENDS[joblib.parallel.DEFAULT_BACKEND]
    return not isinstance(joblib.parallel.get_active_backend()[0], own)


def _alone(function: Callable[..., Any], job: tuple) -> Any:
    """A job that has its process to itself, also where a backend runs several threads in one."""
    with _ALONE:
        try:
            return function(*job)
        finally:
            release_freed_memory()  # the next job may be of another kind


def quiet() -> None:
    """Workers share one terminal: libraries keep their notices to themselves."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, moved to the GPU where there is one."""
    torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def _settle() -> None:
    """What a process needs once before its first job; where workers are started anew, each one does."""
    quiet()
    keep_freed_memory()


def training_cost(spec: TrainSpec) -> float:
    """Multiplications of a run's training, up to a factor: a sweep that begins with the longest run ends sooner.

    A GPT-2 block holds 12 · width² weights (Radford et al. 2019); MoE-CE reads every sequence twice.
    """
    shape = spec.model.shape
    weights = 12 * shape.layers * shape.width**2 + spec.model.vocab_size * shape.width
    return float(spec.steps * spec.batch_size * weights * (1 + (spec.model.kind == "moe_ce")))


def train_job(spec: TrainSpec, root: Path, data_folder: Path) -> str:
    """One run of a sweep, in whatever process it lands; returns the run's key."""
    _settle()
    return train_or_load(spec, Store(root), StudyData.load(data_folder)).key


def cache_job(spec: TrainSpec, language: str, root: Path, data_folder: Path) -> float:
    """Cache one finished teacher's states for one language; returns the seconds it took."""
    _settle()
    store, key = Store(root), run_key(spec)
    started = time.monotonic()
    cache_teacher(store, StudyData.load(data_folder), Run(spec, key, store.path(STAGE, key)), language)
    return time.monotonic() - started


def score_job(
    spec: TrainSpec, folder: Path, step: int | None, languages: Sequence[str], split: str, stride: int,
    data_folder: Path,
) -> pd.DataFrame:
    """Documents of a split scored by one finished run's model: ``language, document, nats, bytes, tokens``."""
    _settle()
    data = StudyData.load(data_folder)
    with torch_threads(spec.threads):
        model = on_device(Run(spec, folder.name, folder).model(step))
        documents = [d for language in languages for d in data.documents(split, language)]
        return score_documents(
            model, data.tokenizer, documents, block_size=data.block_size, stride=stride
        )
