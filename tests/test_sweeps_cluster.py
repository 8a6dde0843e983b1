"""The study's own sweep on a Dask cluster: the same files as alone, one display, and a log for each run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import joblib
import pytest
from distributed import Client, LocalCluster

from mome_utils import display, recipes, sweeps
from mome_utils.artifacts import file_digest
from mome_utils.config import MomeError
from mome_utils.run_log import LOG
from mome_utils.runs import Run
from mome_utils.study import Study

TINY = {
    "topics": 20, "vocab_size": 300, "block_size": 32, "stride": 16, "teacher": [1, 16, 2], "student": [1, 16, 2],
    "teacher_epochs": 0.1, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4, "evaluations": 3,
    "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


@contextlib.contextmanager
def two_workers() -> Iterator[None]:
    """Joblib's jobs go to a cluster of two processes, as they would to one of many machines."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster), joblib.parallel_config("dask"),
    ):
        yield


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[Run]:
    """Two teachers, and a student of the first, in a store of its own."""
    monkeypatch.setenv("MOME_ARTIFACTS", str(folder))
    study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY | changes, quiet=True)
    study.build_data()
    teachers = study.runs([recipes.teacher_spec(study, seed) for seed in (0, 1)])
    study.cache_teachers(teachers[:1])
    return teachers + study.runs([recipes.student_spec(study, "en", "adaptive", 0)])


def files(runs: list[Run]) -> dict[str, str]:
    """Digest of each result of the runs: weights, histories and the teacher's cached states."""
    root = runs[0].folder.parent.parent
    kept = (root / stage for stage in ("runs", "teacher_states"))
    return {path.relative_to(root).as_posix(): file_digest(path) for stage in kept for path in stage.rglob("*")
            if path.suffix in (".safetensors", ".parquet")}


def test_a_cluster_makes_what_runs_make_alone_and_one_line_tells_how_far_it_is(tmp_path, monkeypatch):
    alone = swept(tmp_path / "alone", monkeypatch, jobs=1)
    shown: list[str] = []
    monkeypatch.setattr(display.DisplayHandle, "display", lambda handle, what, **_: shown.append(what.data))
    monkeypatch.setattr(display.DisplayHandle, "update", lambda handle, what, **_: shown.append(what.data))
    with two_workers():
        runs = swept(tmp_path / "cluster", monkeypatch, jobs=1)
    expected = files(alone)
    assert len(expected) == 3 * 2 + 2 and files(runs) == expected
    assert [run.key for run in runs] == [run.key for run in alone] and all((run.folder / LOG).is_file() for run in runs)
    assert shown[0] == "*2 runs to train.*" and "*2 runs trained.*" in shown and shown[-1] == "*1 runs trained.*"


def test_every_run_has_a_log_of_its_own(tmp_path, monkeypatch):
    runs = swept(tmp_path, monkeypatch, jobs=1)
    for run in runs:
        lines = (run.folder / LOG).read_text(encoding="utf-8").splitlines()
        stamps, said = zip(*(line.split(" ", 1) for line in lines), strict=True)
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp) for stamp in stamps)
        assert said[0] == f"started: seed {run.spec.seed}, {run.spec.dtype}, threads: {run.spec.threads}"
        assert said[1] == f"training: {run.spec.steps} steps of 4 sequences"
        assert said[-2:] == (f"trained to step {run.spec.steps}", "finished")
        validated = run.history().dropna(subset=["val_mean"])
        expected = [
            f"step {row.step} of {run.spec.steps}: {row.val_mean:.4f} validation bits per byte ("
            + ", ".join(f"{g} {getattr(row, f'val_{g}'):.4f}" for g in run.spec.languages) + ")"
            for row in validated.itertuples()
        ]
        assert list(said[2:-2]) == expected and len(expected) == run.spec.evaluations


def test_a_log_tells_of_an_error_and_of_going_on(tmp_path, monkeypatch):
    from mome_utils.runs import train_or_load
    from mome_utils.training import LMTrainer

    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
    study.build_data()
    spec = recipes.teacher_spec(study, 0)
    whole = LMTrainer.record

    def failing(trainer: LMTrainer, **values: float) -> None:
        if trainer.state.global_step == spec.steps // 3 + 1:
            raise MomeError("The disk is full.\nReally.")
        whole(trainer, **values)

    monkeypatch.setattr(LMTrainer, "record", failing)
    with pytest.raises(MomeError, match="disk is full"):
        train_or_load(spec, study.store, study.data())
    [log] = (study.store.root / "runs").glob(f"*.unfinished/{LOG}")
    assert log.read_text(encoding="utf-8").endswith("Z stopped by MomeError: The disk is full.\n")
    monkeypatch.setattr(LMTrainer, "record", whole)
    run = train_or_load(spec, study.store, study.data())
    said = [line.split(" ", 1)[1] for line in (run.folder / LOG).read_text(encoding="utf-8").splitlines()]
    assert said.count("finished") == 1 and said[-1] == "finished" and not log.exists()
    assert f"training: {spec.steps} steps of 4 sequences, from step {spec.steps // 3} on" in said


@pytest.mark.parametrize("backend", ["threading", "multiprocessing"])
def test_backends_of_any_kind_serve_and_jobs_share_no_process_at_a_time(backend, tmp_path):
    seen: list[int] = []
    jobs = [(tmp_path / backend, i) for i in range(4)]
    with joblib.parallel_config(backend, n_jobs=2):
        found = sweeps.in_parallel(inside, jobs, workers=1, watch=seen.append, pause=0.02)
    assert found == [0, 1, 2, 3] and seen[-1] == 4 and seen == sorted(seen)


def inside(folder: Path, number: int) -> int:
    """A job that complains when another one is under way in its process."""
    import os
    import time

    mark = folder.with_name(f"{folder.name}-{os.getpid()}")
    mark.mkdir()
    time.sleep(0.05)
    mark.rmdir()
    return number
