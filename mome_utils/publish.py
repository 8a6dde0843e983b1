"""Bring a finished ``laptop`` run to its tracked places, and check that what is tracked belongs together.

Published are: the notebooks with the outputs of the run, its figures, its result tables with their manifests,
``data/results/laptop/study.json`` (which code made what), and what :mod:`mome_utils.report` makes of them. A published
notebook is its source with outputs put in, so nothing that papermill adds to an executed copy gets through.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mome_utils.artifacts import file_digest, read_manifest, source_digest, write_atomic, write_folder_atomic
from mome_utils.config import MomeError
from mome_utils.ledger import ledger
from mome_utils.readme import RESULTS, STUDY, with_block
from mome_utils.records import EVERY, INJECTED_TAG, Record, code_digest, is_skipped, read_record, stale_reason, tags
from mome_utils.report import report_disagreements, write_report
from mome_utils.runner import Request, read_notebook, record_path, select_notebooks

__all__ = ["disagreements", "merge_outputs", "publish"]

SIZE_LIMIT = 5_000_000


def publish(root: Path, request: Request | None = None) -> str:
    """Publish the finished run of ``request`` (by default the ``laptop`` run on the embedded corpus).

    Everything is read and checked before anything is written.

    Args:
        root: the checkout.
        request: which run; its profile must be ``laptop``.

    Returns:
        One sentence that says what was published.

    Raises:
        MomeError: a notebook is stale, an output is not fit to be shown, or the results are too large.
    """
    request = request or Request()
    if request.profile != "laptop":
        raise MomeError(f"Only a 'laptop' run is published, not one at '{request.profile}'.")
    resolved, folder = request.resolve()
    readme = (root / "README.md").read_text(encoding="utf-8")
    with_block(readme, "")
    sources = select_notebooks(root)
    merged: dict[Path, dict[str, Any]] = {}
    entries: dict[str, Any] = {}
    for path in sources:
        notebook = read_notebook(path)
        record = read_record(record_path(folder, path))
        reason = stale_reason(notebook, request.digest_of(notebook, resolved), record, folder)
        if reason is not None or record is None:
            raise MomeError(f"notebooks/{path.name} cannot be published ({reason}): run 'mome study' first.")
        executed = read_notebook(folder / "notebooks" / path.name)
        merged[path] = merge_outputs(notebook, executed, path.name, _places(root))
        entries[path.stem] = _entry(record, folder, path.stem)
    _check_files(folder, [path.stem for path in sources], _places(root))
    ledger(folder / "results")  # a table that the report could not read is found before anything is written

    for path, notebook in merged.items():
        write_atomic(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        _copy(folder / "figures" / path.stem, root / "figures" / path.stem)
    with write_folder_atomic(root / RESULTS) as results:
        for path in sources:
            _copy(folder / "results" / path.stem, results / path.stem)
        study = {"profile": "laptop", "arms": request.arms, "cores": os.cpu_count(), "notebooks": entries}
        write_atomic(results / STUDY, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    write_report(root)
    return f"Published {len(merged)} notebooks with their figures and tables."


def merge_outputs(
    source: Mapping[str, Any], executed: Mapping[str, Any], name: str, places: Sequence[str] = ()
) -> dict[str, Any]:
    """``source`` with the outputs of its ``executed`` copy; cells that the study skips have none.

    Args:
        source: the notebook as written.
        executed: the same code cells, executed.
        name: the notebook's file name, for complaints.
        places: paths of this machine that no output may show.

    Raises:
        MomeError: an output holds an error, a warning, a widget or a path of this machine.
    """
    done = iter([cell for cell in executed["cells"] if _runs(cell)])
    notebook = deepcopy(dict(source))
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        cell["outputs"], cell["execution_count"] = [], None
        if _runs(cell):
            count += 1
            cell["outputs"] = [_clean(output) for output in next(done)["outputs"]]
            cell["execution_count"] = count
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
                problem = _problem(output, places)
                if problem:
                    raise MomeError(
                        f"notebooks/{name} cannot be published: code cell {count} shows {problem}."
                    )
    return notebook


def disagreements(root: Path) -> list[str]:
    """What in the tracked results no longer belongs to the tracked code, one sentence each."""
    found = []
    path = root / RESULTS / STUDY
    if not path.is_file():
        return [f"{RESULTS}/{STUDY} is missing: nothing has been published yet."]
    study = json.loads(path.read_text(encoding="utf-8"))["notebooks"]
    names = [notebook.stem for notebook in select_notebooks(root)]
    if names != list(study):
        found.append(f"Published are {', '.join(study)}, but the notebooks are {', '.join(names)}.")
    for name in (name for name in names if name in study):
        entry, notebook = study[name], read_notebook(root / "notebooks" / f"{name}.ipynb")
        if code_digest(notebook) != entry["code"]:
            found.append(f"{name}: its code has changed since its outputs were published.")
        if any(bool(cell["execution_count"]) != _runs(cell) for cell in notebook["cells"]
               if cell["cell_type"] == "code"):
            found.append(f"{name}: it is not published as it was executed.")
        changed = [module for module, source in entry["sources"].items() if source_digest(module) != source]
        if changed:
            found.append(f"{name}: its results were made before {', '.join(changed)} changed.")
        found += _changed_files(root / "figures" / name, entry["figures"], f"figures/{name}")
        found += _changed_files(root / RESULTS / name, entry["tables"], f"{RESULTS}/{name}")
    return found or report_disagreements(root)


def _entry(record: Record, folder: Path, name: str) -> dict[str, Any]:
    """What ``study.json`` says of a notebook."""
    names = sorted(name for name in record.manifests if Path(name).name != EVERY)
    manifests = [read_manifest((folder / name).parent) for name in names]
    return {
        "code": record.code,
        "first_run_seconds": round(record.first_run, 1),
        "extended_seconds": round(record.extra, 1),
        "tokens": {f"{m.stage}/{m.key}": m.metrics["tokens"] for m in manifests if m.stage == "runs"},
        "extended": sorted(str(Path(name).parent) for name in record.extended),
        "results": [f"{manifest.stage}/{manifest.key}" for manifest in manifests],
        "sources": {k: v for manifest in manifests for k, v in sorted(manifest.sources.items())},
        "figures": _digests(folder / "figures" / name),
        "tables": _digests(folder / "results" / name),
    }


def _runs(cell: Mapping[str, Any]) -> bool:
    """Whether the study executes this cell of the source notebook."""
    return cell["cell_type"] == "code" and not is_skipped(cell) and INJECTED_TAG not in tags(cell)


def _clean(output: Mapping[str, Any]) -> dict[str, Any]:
    """An output without what changes from run to run."""
    return {key: value for key, value in output.items() if key != "transient"}


def _problem(output: Mapping[str, Any], places: Sequence[str]) -> str | None:
    """Why an output must not be published, or ``None``."""
    if output["output_type"] == "error":
        return "an error"
    if output.get("name") == "stderr":
        return "a warning (it wrote to stderr)"
    data = output.get("data", {})
    if any(kind.startswith("application/vnd.jupyter.widget") for kind in data):
        return "a widget, which is nothing without its kernel"
    texts = {key: value for key, value in data.items() if key != "image/png"}
    place = _place_in(json.dumps([texts, output.get("text", "")], ensure_ascii=False), places)
    return f"a path of this machine ({place})" if place else None


def _places(root: Path) -> list[str]:
    """Folders whose names tell where this run took place."""
    places = {str(root.resolve()), str(Path.home()), sys.prefix, sys.base_prefix, tempfile.gettempdir()}
    return sorted((place for place in places if len(place) > 2), key=len, reverse=True)


def _place_in(text: str, places: Sequence[str]) -> str | None:
    for place in places:
        if re.search(rf"{re.escape(place)}[/\\]", text):
            return place
    home = re.search(r"/(?:home|Users|root)/\w+|[A-Z]:\\+Users\\+\w+", text)
    return home.group() if home else None


def _copy(source: Path, target: Path) -> None:
    """Replace the folder ``target`` by the files of ``source``."""
    if not source.is_dir():
        return
    with write_folder_atomic(target) as work:
        for file in _files(source):
            write_atomic(work / file.relative_to(source), file.read_bytes())


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _digests(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in _files(folder)}


def _changed_files(folder: Path, published: Mapping[str, str], where: str) -> list[str]:
    present = _digests(folder)
    return [f"{where}/{name} is not the file that was published."
            for name in sorted(present.keys() | published.keys()) if present.get(name) != published.get(name)]


def _check_files(folder: Path, names: Sequence[str], places: Sequence[str]) -> None:
    """Refuse tables that are too large, and figures or manifests that hold a path of this machine."""
    tables = [file for name in names for file in _files(folder / "results" / name)]
    figures = [file for name in names for file in _files(folder / "figures" / name)]
    for file in tables + figures:
        place = _place_in(file.read_text("utf-8"), places) if file.suffix in (".svg", ".json") else None
        if place:
            raise MomeError(f"{file.parent.name}/{file.name} cannot be published: it holds a path ({place}).")
    size = sum(file.stat().st_size for file in tables)
    if size > SIZE_LIMIT:
        raise MomeError(
            f"The result tables take {size / 1e6:.1f} MB, more than {SIZE_LIMIT / 1e6:.0f} MB: "
            "save fewer rows in the notebooks."
        )
