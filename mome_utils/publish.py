"""Bring a finished ``laptop`` run to its tracked places, and check that what is tracked belongs together.

Published are: the notebooks with the outputs of the run, its figures, its result tables with their manifests,
``data/results/laptop/study.json`` (which code made what), and the results block of the README. A published
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

import pandas as pd

from mome_utils.artifacts import file_digest, read_manifest, source_digest, write_atomic, write_folder_atomic
from mome_utils.config import MomeError
from mome_utils.overview import in_words
from mome_utils.records import INJECTED_TAG, Record, code_digest, is_skipped, read_record, stale_reason, tags
from mome_utils.runner import Request, read_notebook, record_path, select_notebooks

__all__ = ["disagreements", "merge_outputs", "publish", "readme_block", "with_block"]

RESULTS = "data/results/laptop"
STUDY = "study.json"
SIZE_LIMIT = 5_000_000
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


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

    for path, notebook in merged.items():
        write_atomic(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        _copy(folder / "figures" / path.stem, root / "figures" / path.stem)
    with write_folder_atomic(root / RESULTS) as results:
        for path in sources:
            _copy(folder / "results" / path.stem, results / path.stem)
        study = {"profile": "laptop", "arms": request.arms, "cores": os.cpu_count(), "notebooks": entries}
        write_atomic(results / STUDY, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    write_atomic(root / "README.md", with_block(readme, readme_block(root)))
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


def readme_block(root: Path) -> str:
    """What the README says of the published run: a table of notebooks and one of verdicts, all computed."""
    study = json.loads((root / RESULTS / STUDY).read_text(encoding="utf-8"))
    lines = ["| Notebook | Question | First run |", "|---|---|---:|"]
    for name, entry in study["notebooks"].items():
        title, question = _title_and_question(read_notebook(root / "notebooks" / f"{name}.ipynb"))
        took = in_words(round(entry["first_run_seconds"]))
        if entry["extended_seconds"]:
            took += f" (extended arms: {in_words(round(entry['extended_seconds']))} more)"
        lines.append(f"| [{title}](notebooks/{name}.ipynb) | {question} | {took} |")
    total = in_words(sum(entry["first_run_seconds"] for entry in study["notebooks"].values()))
    cores = study["cores"]
    asked = " `--arms extended` adds the extended arms; they are shown." if study["arms"] == "extended" else ""
    lines += ["", f"Together {total} on {cores} processor cores the first time, and seconds after that.{asked}", ""]
    lines += ["| Claim | As published | Effect here, with 95 % interval | Margin | Verdict |",
              "|---|---|---:|---:|---|"]
    for claim in _claims(root / RESULTS, study["notebooks"]).to_dict("records"):
        effect = ""
        if pd.notna(claim["estimate"]):
            effect = f"{claim['estimate']:+.4f} ({claim['low']:+.4f} to {claim['high']:+.4f}) {claim['unit']}"
        lines.append(f"| {claim['claim']} | {claim['statement']} | {effect} | {claim['margin']:g} "
                     f"| {claim['verdict']} |")
    return "\n".join(lines)


def with_block(readme: str, block: str) -> str:
    """``readme`` with the text between its two result markers replaced.

    Raises:
        MomeError: it has no such markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MomeError(f"README.md needs the lines {BEGIN} and {END} to put the results between.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


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
    readme = (root / "README.md").read_text(encoding="utf-8")
    if not found and with_block(readme, readme_block(root)) != readme:
        found.append("README.md does not show the published results.")
    return found


def _entry(record: Record, folder: Path, name: str) -> dict[str, Any]:
    """What ``study.json`` says of a notebook."""
    manifests = [read_manifest((folder / path).parent) for path in sorted(record.manifests)]
    return {
        "code": record.code,
        "first_run_seconds": round(record.first_run, 1),
        "extended_seconds": round(record.extra, 1),
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


def _title_and_question(notebook: Mapping[str, Any]) -> tuple[str, str]:
    """The title of a notebook and the question it opens with, from its first cell."""
    text = "".join(notebook["cells"][0]["source"])
    title, _, rest = text.partition("\n")
    question = re.search(r"[^*?]*?([A-Z][^*?]*\?)", rest.replace("Question.", ""))
    return title.lstrip("# ").strip(), " ".join(question.group(1).split()) if question else ""


def _claims(results: Path, names: Sequence[str]) -> pd.DataFrame:
    """All notebooks' verdicts in the ledger's order; one that was reached replaces one that was not run."""
    from mome_utils.claims import CLAIMS

    found: dict[str, dict[str, Any]] = {}
    for name in names:
        path = results / name / "claims.parquet"
        for row in pd.read_parquet(path).to_dict("records") if path.is_file() else []:
            if row["claim"] not in found or row["verdict"] != "not run":
                found[row["claim"]] = row
    return pd.DataFrame([found[claim] for claim in CLAIMS if claim in found])
