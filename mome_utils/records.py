"""What a run of a notebook depended on, and whether that still holds.

A finished notebook leaves a record beside its executed copy. The notebook is *stale* when its code cells, the
parameters it ran with (the resolved profile and the corpus' content among them) or the results it read or
made have changed, and only then: editing prose, an exercise or a figure function makes nothing stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mome_utils.artifacts import MANIFEST, digest, file_digest, read_manifest, source_digest, write_atomic
from mome_utils.config import MomeError

__all__ = ["EVERY", "SKIPPED_TAGS", "Record", "code_digest", "is_skipped", "is_stale", "listing", "read_record",
           "seconds_saved", "stale_reason", "tags", "write_record"]

#: Cells that a run of the study leaves alone: the reader's own work, and its solution.
SKIPPED_TAGS = frozenset({"exercise", "solution"})
INJECTED_TAG = "injected-parameters"
#: As the last part of a manifest's name in a record: not one result of a stage but which there are.
EVERY = "*"


@dataclass(frozen=True)
class Record:
    """A finished run of one notebook.

    Attributes:
        notebook: its name, ``03_kd_alpha_comparison``.
        code: :func:`code_digest` of the notebook that ran.
        parameters: whatever decided the run, as a digest.
        manifests: manifest file, relative to the profile's folder, to its SHA-256; and ``<stage>/*`` to the
            :func:`listing` of a stage, for a notebook that reads whatever is there.
        cells: seconds each executed code cell took, in order.
        first_run: seconds the notebook takes when nothing it makes is in the store, without ``extra``.
        extra: seconds of training that belong to the extended arms.
        finished: false while it runs, and for good when it does not get to its end.
    """

    notebook: str
    code: str
    parameters: str
    manifests: Mapping[str, str]
    cells: Sequence[float]
    first_run: float = 0.0
    extra: float = 0.0
    finished: bool = True

    @property
    def seconds(self) -> float:
        """Seconds the last run took."""
        return float(sum(self.cells))


def tags(cell: Mapping[str, Any]) -> set[str]:
    """Tags of a notebook cell."""
    return set(cell.get("metadata", {}).get("tags", ()))


def is_skipped(cell: Mapping[str, Any]) -> bool:
    """Whether a run of the study leaves this cell alone (an exercise or a solution)."""
    return bool(tags(cell) & SKIPPED_TAGS)


def code_digest(notebook: Mapping[str, Any]) -> str:
    """Digest of the code cells that a run of the study executes.

    Prose, outputs, exercises, solutions and the parameters that papermill injects are left out, so a source
    notebook and its executed copy have the same digest.
    """
    return digest([
        "".join(cell["source"]).strip()
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and not is_skipped(cell) and INJECTED_TAG not in tags(cell)
    ])


def write_record(path: Path, record: Record) -> None:
    """Write ``record`` as JSON."""
    write_atomic(path, json.dumps(asdict(record), indent=1) + "\n")


def read_record(path: Path) -> Record | None:
    """The record at ``path``; ``None`` when there is none that can be read (then the notebook runs again)."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def stale_reason(
    notebook: Mapping[str, Any], parameters: str, record: Record | None, folder: Path
) -> str | None:
    """Why a notebook has to run (again), or ``None`` when its last run still holds.

    Args:
        notebook: the source notebook as JSON data.
        parameters: digest of what decides the run now.
        record: the last finished run, if any.
        folder: the profile's folder of results, which the record's manifest names are relative to.
    """
    if record is None:
        return "not run yet"
    if record.code != code_digest(notebook):
        return "its code has changed"
    if record.parameters != parameters:
        return "its parameters have changed"
    if not record.finished:
        return "its last run did not get to its end"
    source_now = cache(source_digest)  # many results, few modules
    for name, expected in record.manifests.items():
        if Path(name).name == EVERY:
            problem = None if listing(folder / Path(name).parent, record.notebook) == expected else "are others now"
        else:
            problem = _manifest_problem(folder / name, expected, source_now)
        if problem:
            return f"{Path(name).parent.as_posix()} {problem}"
    return None


def listing(stage: Path, notebook: str) -> str:
    """Which results a stage's folder holds, as a digest; that of ``notebook`` itself is left out."""
    found = sorted(path.parent.name for path in stage.glob(f"*/{MANIFEST}"))
    return digest([name for name in found if name != notebook])


def is_stale(notebook: Mapping[str, Any], parameters: str, record: Record | None, folder: Path) -> bool:
    """Whether :func:`stale_reason` finds one."""
    return stale_reason(notebook, parameters, record, folder) is not None


def _manifest_problem(path: Path, expected: str, source_now: Callable[[str], str]) -> str | None:
    """What is wrong with a result: its manifest, its files by size, or the code that made it."""
    if not path.is_file():
        return "is gone"
    if file_digest(path) != expected:
        return "was made again"
    if path.name != MANIFEST:
        return None
    try:
        manifest = read_manifest(path.parent)
        if any(source_now(module) != source for module, source in manifest.sources.items()):
            return "was made by code that has changed"
    except MomeError:
        return "cannot be read or was made by code that is gone"
    for name, entry in manifest.files.items():
        file = path.parent / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return f"is damaged ({name})"
    return None


def seconds_saved(records: Path, notebook: str, loaded: Mapping[str, float]) -> float:
    """What a first run would have spent on training beyond this one: loaded runs that no notebook before uses.

    Args:
        records: folder of what the notebooks touched, ``<notebook>.touched.json``.
        notebook: the one that loaded them.
        loaded: seconds of training behind each run, by manifest.
    """
    earlier: set[str] = set()
    for record in records.glob("*.touched.json"):
        if record.name < f"{notebook}.touched.json":
            earlier |= json.loads(record.read_text(encoding="utf-8"))["manifests"].keys()
    return sum(seconds for name, seconds in loaded.items() if name not in earlier)
