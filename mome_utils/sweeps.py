"""Many runs side by side: one function per kind of job, spread over processes by joblib.

Orchestration only: nothing here decides a number, so changing it retrains nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import joblib
import pandas as pd

from mome_utils.artifacts import Store
from mome_utils.continual import train_or_load
from mome_utils.dataset import StudyData
from mome_utils.evaluation import score_documents
from mome_utils.memory import keep_freed_memory
from mome_utils.runs import STAGE, Run, cache_teacher, run_key, torch_threads
from mome_utils.training import TrainSpec

__all__ = ["cache_job", "in_parallel", "quiet", "score_job", "train_job"]


def in_parallel(
    function: Callable[..., Any], jobs: Sequence[tuple], *, workers: int,
    watch: Callable[[int], None] | None = None, pause: float = 1.0,
) -> list[Any]:
    """``[function(*job) for job in jobs]``, ``workers`` at a time through joblib, in order.

    Any joblib backend serves (``joblib.parallel_config``): processes here, Dask or Ray on a cluster by
    configuration alone. One worker means this process and this thread. ``watch(finished)`` is called every
    ``pause`` seconds (with one worker: after each job). The first error, or an interruption, stops the sweep and its
    workers; finished jobs have saved their results.
    """
    results: list[Any] = []
    if workers <= 1:
        for job in jobs:
            results.append(function(*job))
            if watch is not None:
                watch(len(results))
        return results
    done = Event()

    def look() -> None:
        while watch is not None and not done.wait(pause):
            watch(len(results))

    Thread(target=look, daemon=True).start()
    try:
        with warnings.catch_warnings():
            # A worker that was idle for long, or whose memory has grown, is replaced: its job is not lost.
            warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
            # An error or an interruption closes this generator, and joblib then ends its workers.
            parallel = joblib.Parallel(n_jobs=workers, return_as="generator")
            for result in parallel(joblib.delayed(function)(*job) for job in jobs):
                results.append(result)
    finally:
        done.set()
    if watch is not None:
        watch(len(results))
    return results


def quiet() -> None:
    """Workers share one terminal: libraries keep their notices to themselves."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _settle() -> None:
    """Each worker is a process of its own, started anew."""
    quiet()
    keep_freed_memory()


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
        model = Run(spec, folder.name, folder).model(step)
        documents = [d for language in languages for d in data.documents(split, language)]
        return score_documents(
            lambda ids: model(input_ids=ids, use_cache=False).logits, data.tokenizer, documents,
            block_size=data.block_size, stride=stride,
        )
