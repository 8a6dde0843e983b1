"""One whole smoke study for all tests that need one."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from mome_utils.artifacts import file_digest
from mome_utils.runner import Request, run_study

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run: what a machine checks must not depend on its luck.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")


@dataclass(frozen=True)
class SmokeStore:
    """The results of a finished ``mome study --profile smoke``.

    Attributes:
        artifacts: what MOME_ARTIFACTS has to name to use them.
        folder: the profile's folder below it.
        shown: what the run told its user.
        changed: tracked files of the checkout that the run changed.
    """

    artifacts: Path
    folder: Path
    shown: str
    changed: tuple[str, ...]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke-artifacts", metavar="FOLDER",
                     help="keep the smoke study here and go on from what is there (default: a new temporary folder)")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that run side by side (``pytest -n 2``) take one thread each, also in the processes that they start."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest work begins first: one worker makes the smoke study, and nobody waits for it who can do else.

    Each of two workers is handed one half of the list: the first begins with a test that needs the smoke study, the
    second with the tests marked ``long``, and the other tests of the smoke study come at the end.
    """
    reading = [item for item in items if "smoke_store" in getattr(item, "fixturenames", ())]
    long = [item for item in items if item.get_closest_marker("long")]
    placed = {*reading, *long}
    order = [*reading[:1], *(item for item in items if item not in placed), *reading[1:]]
    order[len(items) // 2 : len(items) // 2] = long
    items[:] = order


@pytest.fixture(scope="session")
def smoke_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SmokeStore:
    """Runs the study at ``smoke`` once, as a user would, into a folder of its own. Read only: see smoke_copy.

    Tests that run side by side share it: whichever needs it first runs it, and the others wait.
    """
    kept, own = request.config.getoption("--smoke-artifacts"), tmp_path_factory.getbasetemp()
    shared = own.parent if hasattr(request.config, "workerinput") else own
    artifacts, report = Path(kept).resolve() if kept else shared / "artifacts", shared / "smoke.json"
    with FileLock(shared / "smoke.lock"):
        if not report.is_file():
            report.write_text(json.dumps(_run_smoke(artifacts)), encoding="utf-8")
    made = json.loads(report.read_text(encoding="utf-8"))
    return SmokeStore(artifacts, artifacts / "smoke", made["shown"], tuple(made["changed"]))


def _run_smoke(artifacts: Path) -> dict[str, object]:
    before = _tracked_files()
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(artifacts))
        patch.chdir(ROOT)
        run_study(Request(profile="smoke"), root=ROOT, stream=stream)
    after = _tracked_files()
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    return {"shown": stream.getvalue(), "changed": changed}


@pytest.fixture
def use_smoke_store(smoke_store: SmokeStore, monkeypatch: pytest.MonkeyPatch) -> SmokeStore:
    """The finished smoke study as the store that ``Study.open`` finds. Do not change it."""
    monkeypatch.setenv("MOME_ARTIFACTS", str(smoke_store.artifacts))
    monkeypatch.chdir(ROOT)
    return smoke_store


@pytest.fixture
def smoke_copy(smoke_store: SmokeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished smoke study to work in, as the store that ``Study.open`` finds."""
    copy = tmp_path / "artifacts"
    shutil.copytree(smoke_store.folder, copy / "smoke")
    monkeypatch.setenv("MOME_ARTIFACTS", str(copy))
    monkeypatch.chdir(ROOT)
    return copy


def _tracked_files() -> dict[str, str]:
    """Content of every file that git tracks here; nothing outside a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return {}  # not a checkout (a ZIP file, say): there is nothing that could be changed
    names = listed.stdout.split("\0")
    return {name: file_digest(ROOT / name) for name in names if (ROOT / name).is_file()}
