"""``mome batch``: the study over a grid of settings, each point with outputs of its own, and one page over all of them.

A point of the grid is a run of the study. Its notebooks, tables, figures and report lie in ``<out>/<point>``; what is
costly and named by all that decides it (data sets, trained models, their states and scores) stays in the one store
of the checkout, so that two points which differ in one notebook's parameter train nothing twice. A batch that was
stopped goes on where it was: every point knows which of its notebooks are up to date, as any run of the study does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mome_utils.artifacts import digest, write_atomic
from mome_utils.config import MomeError, Profile
from mome_utils.ledger import ledger, ledger_table
from mome_utils.pages import INDEX, html_table, page
from mome_utils.places import artifacts_root, study_folder
from mome_utils.readme import effect_text
from mome_utils.report import DIGITS, write_pages
from mome_utils.runner import CellFailed, Request, own_parameters, read_notebook, run_study, select_notebooks

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Point", "grid", "run_batch"]

#: Stages whose results are named by all that decides them, so that any point may use what another has made.
SHARED = ("dataset", "router", "runs", "scores", "teacher_states")
_REQUEST = ("profile", "corpus", "languages", "seeds", "arms")
_PROFILE = tuple(field.name for field in dataclasses.fields(Profile) if field.name not in ("name", "seeds"))
#: What a point can be; :func:`run_batch` says which.
WAITING, DONE = "not run yet", "done"


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Attributes:
        name: its folder, made of its values.
        values: what it was given, by axis.
        request: the run of the study that it is.
    """

    name: str
    values: Mapping[str, Any]
    request: Request


def grid(axes: Mapping[str, Sequence[Any]], base: Request, root: Path) -> list[Point]:
    """All combinations of the axes' values as runs of the study, the last axis changing fastest.

    Args:
        axes: name to values. A name is a common parameter (``profile, corpus, languages, seeds, arms``), a field of the
            profile (``max_diff_percent``, …) or any other parameter of a notebook.
        base: the run that the points differ from.
        root: the checkout, whose notebooks' parameters may be named.

    Raises:
        MomeError: an axis has no or repeated values, or is nothing that could be varied; a corpus is not there.
    """
    known = {name for path in select_notebooks(root) for name in own_parameters(read_notebook(path))}
    for name, several in axes.items():
        if name not in (*_REQUEST, *_PROFILE) and name not in known - {"overrides"}:
            raise MomeError(f"There is no '{name}' to vary: name a parameter of a notebook or a field of the profile.")
        if not several or len({digest([value]) for value in several}) < len(several):
            raise MomeError(f"'{name}' needs one value or more, each once: for example --vary seeds=1,3.")
    points = []
    for chosen in itertools.product(*axes.values()):
        values: dict[str, Any] = dict(zip(axes, chosen, strict=True))
        points.append(Point(_folder_name(values), values, _request(base, values)))
    names = [point.name for point in points]
    return [point if names.count(point.name) == 1 else
            dataclasses.replace(point, name=f"{point.name}-{digest(dict(point.values))[:6]}") for point in points]


def run_batch(
    points: Sequence[Point], out: Path, *, root: Path, only: Sequence[str] = (), stream: TextIO | None = None
) -> dict[str, str]:
    """Run every point that is not up to date, and write ``<out>/index.html`` and ``<out>/claims.csv`` after each.

    A point that fails does not keep the others from running.

    Args:
        points: of a :func:`grid`.
        out: the folder of the batch.
        root: the checkout.
        only: run these notebooks alone, by number or name.
        stream: where to say how far it is; by default the terminal.

    Returns:
        Name of each point to ``done``, or to the first line of why it stopped.

    Raises:
        MomeError: a point cannot be what it asks for; before any work.
    """
    stream = stream or sys.stdout
    select_notebooks(root, only)
    for point in points:
        point.request.resolve()
    store = artifacts_root()
    states = dict.fromkeys((point.name for point in points), WAITING)
    _write_index(points, states, out)
    for place, point in enumerate(points, 1):
        stream.write(f"({place}/{len(points)}) {point.name}\n")
        with _own_outputs(point, out, store):
            try:
                run_study(point.request, root=root, only=only, stream=stream)
                states[point.name] = DONE
            except CellFailed as error:
                states[point.name] = str(error).splitlines()[0]
                stream.write(f"{error}\n")
            write_pages(_folder(point, out), root)
        _write_index(points, states, out)
    return states


def _request(base: Request, values: Mapping[str, Any]) -> Request:
    """``base`` with the values of a point."""
    changes: dict[str, Any] = {name: value for name, value in values.items() if name in _REQUEST}
    if isinstance(changes.get("languages"), str):
        changes["languages"] = changes["languages"].split("+")
    if "languages" in changes:
        changes["languages"] = tuple(changes["languages"])
    if changes.get("corpus", "embedded") != "embedded":
        changes["corpus"] = str(Path(changes["corpus"]).expanduser().resolve())
    fields = {name: value for name, value in values.items() if name in _PROFILE}
    rest = {name: value for name, value in values.items() if name not in (*_REQUEST, *_PROFILE)}
    overrides, further = {**base.overrides, **fields}, {**base.further, **rest}
    return dataclasses.replace(base, **changes, overrides=overrides, further=further)


def _folder_name(values: Mapping[str, Any]) -> str:
    """A readable name for a folder: ``seeds-1_max_diff_percent-3``."""
    parts = []
    for name, value in values.items():
        text = Path(value).name if name == "corpus" else "+".join(map(str, value)) if isinstance(value, (list, tuple)) \
            else str(value)
        parts.append(f"{name}-{text}")
    plain = re.sub(r"[^\w.+-]+", "-", "_".join(parts)) or "base"
    return plain if len(plain) <= 80 else f"{plain[:72]}-{digest(dict(values))[:6]}"


def _folder(point: Point, out: Path) -> Path:
    """Where a point's notebooks, tables and figures lie."""
    return out / point.name / study_folder(point.request.profile, point.request.corpus).name


@contextmanager
def _own_outputs(point: Point, out: Path, store: Path) -> Iterator[None]:
    """Let the study write to the point's own folder inside the block, with the shared stages linked into it."""
    folder = _folder(point, out)
    folder.mkdir(parents=True, exist_ok=True)
    for stage in SHARED:
        shared = store / folder.name / stage
        shared.mkdir(parents=True, exist_ok=True)
        link = folder / stage
        if not link.exists():
            try:
                link.symlink_to(shared.resolve(), target_is_directory=True)
            except OSError:
                raise MomeError(
                    f"The folder {link.name} of a point cannot be linked to the store: allow symbolic links "
                    "(on Windows: the developer mode), or put --out on a file system that has them."
                ) from None
    before = os.environ.get("MOME_ARTIFACTS")
    os.environ["MOME_ARTIFACTS"] = str(folder.parent)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MOME_ARTIFACTS"]
        else:
            os.environ["MOME_ARTIFACTS"] = before


def _write_index(points: Sequence[Point], states: Mapping[str, str], out: Path) -> None:
    """The page over all points, and their ledgers in one table."""
    import pandas as pd

    axes = list(points[0].values) if points else []
    tables, overview, claims = [], [], []
    for point in points:
        folder = _folder(point, out)
        entries = ledger(folder / "results")
        given = {name: _shown(value) for name, value in point.values.items()}
        tables.append(_with_point(ledger_table(entries), point.name, given, states[point.name]))
        report = folder / "report" / INDEX
        where = escape(report.relative_to(out).as_posix())
        name = f'<a href="{where}">{escape(point.name)}</a>' if report.is_file() else escape(point.name)
        overview.append([name, *map(escape, given.values()), escape(states[point.name])])
        claims.append([f'<span title="{escape(effect_text(entry))}">{escape(entry.verdict)}</span>'
                       for entry in entries.values()])
    combined = pd.concat(tables, ignore_index=True)
    write_atomic(out / "claims.csv", combined.to_csv(index=False, float_format=DIGITS, lineterminator="\n"))
    ids = list(dict.fromkeys(combined["claim"]))
    across = [[claim, *(cells[place] for cells in claims)] for place, claim in enumerate(ids)]
    body = (f"<h1>A batch of {len(points)} runs</h1>\n{html_table(['Run', *axes, 'State'], overview)}\n"
            '<h2>Verdicts</h2>\n<p>Point at a verdict for its effect; all numbers: <a href="claims.csv">claims.csv</a>.'
            f"</p>\n{html_table(['Claim', *(point.name for point in points)], across)}")
    write_atomic(out / INDEX, page("Batch", body, {INDEX: "Batch"}, INDEX))


def _with_point(table: pd.DataFrame, name: str, given: Mapping[str, str], state: str) -> pd.DataFrame:
    """A ledger with columns before it that say which point it is of."""
    before = {"point": name, **given, "state": state}
    for place, (column, value) in enumerate(before.items()):
        table.insert(place, column if column not in table.columns else f"{column} (axis)", value)
    return table


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
