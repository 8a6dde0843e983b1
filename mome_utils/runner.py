"""Run the study: its notebooks in order, each only when it is stale, with a live overview.

The notebooks are executed by papermill through an engine of its own, which differs from papermill's in three
ways: the kernel is always the running interpreter, cells tagged ``exercise`` or ``solution`` are shown but
not run, and the overview hears of every cell.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import papermill
from jupyter_client.client import KernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from mome_utils.artifacts import digest, source_digest
from mome_utils.config import MomeError
from mome_utils.kernels import Kernels
from mome_utils.overview import BUDGET_SECONDS, Overview, Plan
from mome_utils.records import Record, code_digest, is_skipped, read_record, stale_reason, tags, write_record
from mome_utils.study import Study

__all__ = ["CellFailed", "Request", "own_parameters", "plan_study", "read_notebook", "record_path", "run_notebook",
           "run_study", "select_notebooks"]

ENGINE = "mome"


class CellFailed(Exception):
    """A cell raised: the message says which, why, and where the half-executed notebook lies."""


@dataclass(frozen=True)
class Request:
    """What to run the study with: the parameters that all notebooks share.

    Attributes:
        profile: a preset's name.
        corpus: ``embedded``, or a folder.
        languages: language codes in order; empty for all.
        seeds: number of seeds; 0 for the profile's.
        overrides: fields of the profile to replace.
        arms: ``core``, or ``extended`` for what notebooks keep beyond their budget.
        further: other parameters, for those notebooks that have them.
    """

    profile: str = "laptop"
    corpus: str = "embedded"
    languages: tuple[str, ...] = ()
    seeds: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arms: str = "core"
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arms not in ("core", "extended"):
            raise MomeError(f"The arms must be 'core' or 'extended', not '{self.arms}'.")

    def parameters(self, notebook: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The values of the notebooks' common parameters, with those of its own for one notebook."""
        common = {"profile": self.profile, "corpus": self.corpus, "languages": list(self.languages),
                  "seeds": self.seeds, "overrides": dict(self.overrides)}
        return common | self._chosen(notebook)

    def _chosen(self, notebook: Mapping[str, Any] | None) -> dict[str, Any]:
        """The parameters beyond the common ones that a notebook has."""
        own = own_parameters(notebook) if notebook is not None else frozenset()
        return {name: value for name, value in {"arms": self.arms, **self.further}.items() if name in own}

    def resolve(self) -> tuple[str, Path]:
        """What the common parameters mean now, as a digest, and the folder that their results lie in.

        The digest covers the resolved profile (its seeds among them), the corpus' content and the recipes
        that turn both into runs. A notebook's own digest is :meth:`digest_of`.

        Raises:
            MomeError: a parameter is wrong; so call it before work starts.
        """
        study = Study.open("", **self.parameters(), quiet=True)
        recipes = source_digest("mome_utils.recipes", "mome_utils.recipes_continual")
        return digest([study.profile, study.corpus.fingerprint, study.languages, recipes]), study.store.root

    def digest_of(self, notebook: Mapping[str, Any], resolved: str) -> str:
        """What decides a run of this notebook: the ``resolved`` common parameters, and those of its own."""
        chosen = self._chosen(notebook)
        if not chosen:
            return resolved
        return digest([resolved, self.arms] if list(chosen) == ["arms"] else [resolved, chosen])


def own_parameters(notebook: Mapping[str, Any]) -> frozenset[str]:
    """Names of a notebook's parameters: the annotated assignments of its ``parameters`` cell."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if "parameters" in tags(cell)]
    return frozenset(re.findall(r"^(\w+)\s*:[^=\n]+=", "\n".join(cells), re.MULTILINE))


def select_notebooks(root: Path, only: Sequence[str] = ()) -> list[Path]:
    """Source notebooks in order; ``only`` keeps those of the given numbers (``03``) or names.

    Raises:
        MomeError: there is no such notebook, or none at all.
    """
    found = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise MomeError("There are no notebooks here: clone the repository and run 'mome' inside it.")
    for wanted in only:
        if not any(_is_called(path, wanted) for path in found):
            numbers = ", ".join(path.stem[:2] for path in found)
            raise MomeError(f"There is no notebook '{wanted}': give numbers among {numbers}.")
    return [path for path in found if not only or any(_is_called(path, wanted) for wanted in only)]


def _is_called(path: Path, wanted: str) -> bool:
    return path.stem[:2] == wanted.zfill(2) or path.stem == wanted.removesuffix(".ipynb")


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook as JSON data."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def plan_study(
    notebooks: Sequence[Path], request: Request, resolved: str, folder: Path, *, force: bool = False
) -> list[Plan]:
    """For each notebook whether it has to run, why, and how long that should take.

    A notebook that has not been timed is expected to take its budget, scaled like those that have been.

    Args:
        notebooks: source notebooks.
        request: the run; only at the profile ``laptop`` the budget is a time.
        resolved: digest of its common parameters, see :meth:`Request.resolve`.
        folder: the folder of its results.
        force: run even what is not stale.
    """
    plans = []
    for path in notebooks:
        source = read_notebook(path)
        reason = _reason(path, request.digest_of(source, resolved), folder) or ("asked for" if force else None)
        # One more than the source has: papermill's own cell, which sets the parameters.
        cells = 1 + sum(cell["cell_type"] == "code" and not is_skipped(cell) for cell in source["cells"])
        record = read_record(record_path(folder, path))
        measured = record is not None and len(record.cells) == cells
        budget = BUDGET_SECONDS.get(path.stem[:2], 60)
        expected = tuple(record.cells) if record is not None and measured else (budget / cells,) * cells
        plans.append(Plan(path.stem, reason, expected, measured))
    timed = [plan for plan in plans if plan.measured]
    scale = sum(p.seconds for p in timed) / sum(BUDGET_SECONDS.get(p.name[:2], 60) for p in timed) if timed else 1
    return [
        plan if plan.measured else
        dataclasses.replace(plan, expected=[t * scale for t in plan.expected], measured=request.profile == "laptop")
        for plan in plans
    ]


def _reason(path: Path, parameters: str, folder: Path) -> str | None:
    """Why this notebook has to run now, or ``None``."""
    reason = stale_reason(read_notebook(path), parameters, read_record(record_path(folder, path)), folder)
    if reason is None and not (folder / "notebooks" / path.name).is_file():
        return "its executed copy is gone"
    return reason


def run_study(
    request: Request, *, root: Path, only: Sequence[str] = (), force: bool = False,
    stream: TextIO | None = None,
) -> int:
    """Run every notebook that is stale, in order.

    Returns:
        The number of notebooks that ran.

    Raises:
        MomeError: the request is wrong (before any work).
        CellFailed: a cell raised; the notebooks before it are finished and will be skipped the next time.
    """
    notebooks = select_notebooks(root, only)
    resolved, folder = request.resolve()
    plans = plan_study(notebooks, request, resolved, folder, force=force)
    ran = 0
    with closing(Overview(plans, stream or sys.stdout)) as overview, Kernels(root) as kernels:
        for index, path in enumerate(notebooks):
            source = read_notebook(path)
            parameters = request.digest_of(source, resolved)
            # Looked at again: what ran before this one may have made what it reads anew.
            reason = _reason(path, parameters, folder) or ("asked for" if force else None)
            plan = plans[index] = dataclasses.replace(plans[index], reason=reason)
            if plan.reason is None:
                overview.skipped(plan)
                continue
            overview.begin(plan)
            _open_record(folder, path)
            _touched_path(folder, path).unlink(missing_ok=True)
            # Figures of an earlier run that this one does not draw must not be taken for its own.
            shutil.rmtree(folder / "figures" / path.stem, ignore_errors=True)
            # The next kernel gets ready in the second half: until then its third of a gigabyte is better used.
            ahead = len(plan.expected) // 2 if any(later.reason for later in plans[index + 1:]) else None

            def on_cell(number: int, ahead: int | None = ahead) -> None:
                overview.cell(number)
                if number == ahead:
                    kernels.prepare()

            cells = run_notebook(
                path, folder / "notebooks" / path.name, request.parameters(source), root=root, on_cell=on_cell,
                kernels=kernels,
            )
            core = dataclasses.replace(request, arms="core").digest_of(source, resolved)
            _keep_record(folder, path, Record(path.stem, code_digest(source), parameters, {}, cells), core)
            overview.finished(plan)
            ran += 1
    return ran


def run_notebook(
    source: Path, output: Path, parameters: Mapping[str, Any], *, root: Path,
    on_cell: Callable[[int], None] = lambda number: None,
    skip: Callable[[Mapping[str, Any]], bool] = is_skipped, kernels: Kernels | None = None,
) -> list[float]:
    """Execute ``source`` into ``output``, which is saved every few seconds and at the end, an error's too.

    Args:
        source: the notebook.
        output: where its executed copy goes.
        parameters: values for its ``parameters`` cell.
        root: working directory of the kernel.
        on_cell: called with the number of each executed code cell (from 0) when it starts.
        skip: which cells not to execute.
        kernels: lends the kernel; one that is started and ended here, if not given.

    Returns:
        Seconds of each executed code cell.

    Raises:
        CellFailed: with the cell, the error and the place of the half-executed notebook.
    """
    if kernels is None:
        with Kernels(root) as own:
            return run_notebook(source, output, parameters, root=root, on_cell=on_cell, skip=skip, kernels=own)
    output.parent.mkdir(parents=True, exist_ok=True)
    times: list[float] = []

    def begin() -> None:
        on_cell(len(times))
        times.append(time.monotonic())

    def end() -> None:
        times[-1] = time.monotonic() - times[-1]

    try:
        papermill.execute_notebook(
            source, output, parameters=dict(parameters), engine_name=ENGINE, progress_bar=False, cwd=root,
            kernels=kernels, begin=begin, end=end, skip=skip,
        )
    except PapermillExecutionError as error:
        message = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        message = "its kernel died (often for want of memory)"
    else:
        return times
    lines = [line for line in message.splitlines() if line.strip()][:4]
    raise CellFailed("\n".join([
        f"{_relative(source, root)} stopped at code cell {len(times)}: {lines[0]}",
        *(f"    {line}" for line in lines[1:]),
        f"The half-executed notebook is {_relative(output, root)}.",
        "Mend the cause and give the same command again: it goes on from there.",
    ]))


class _Client(PapermillNotebookClient):
    """papermill's client with a given kernel, skipped cells, and two callbacks around each executed cell."""

    def __init__(
        self, manager: NotebookExecutionManager, kernel: AsyncKernelManager, begin: Callable[[], None],
        end: Callable[[], None], skip: Callable[[Mapping[str, Any]], bool], **kwargs: Any,
    ) -> None:
        super().__init__(manager, km=kernel, **kwargs)
        self._begin, self._end, self._skip = begin, end, skip

    def execute(self, **kwargs: Any) -> Any:
        try:
            return super().execute(**kwargs)
        finally:
            # nbclient leaves the client of a kernel that was handed to it open.
            client: KernelClient | None = self.kc
            if client is not None:
                client.stop_channels()

    def execute_cell(self, cell: Any, cell_index: int, **kwargs: Any) -> Any:
        if cell.cell_type != "code" or self._skip(cell):
            return cell
        self._begin()
        try:
            return super().execute_cell(cell, cell_index, **kwargs)
        finally:
            self._end()


class StudyEngine(NBClientEngine):
    """The papermill engine of the study; see the module's docstring."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, *, kernels: Kernels,
        begin: Callable[[], None], end: Callable[[], None], skip: Callable[[Mapping[str, Any]], bool],
        start_timeout: int = 120, **_: Any,
    ) -> Any:
        """Execute the notebook that ``nb_man`` holds."""
        with _saved_at_times(nb_man), kernels.lend() as kernel:
            return _Client(nb_man, kernel, begin, end, skip, timeout=None, startup_timeout=start_timeout).execute()


@contextmanager
def _saved_at_times(nb_man: NotebookExecutionManager, pause: float = 5.0) -> Iterator[None]:
    """Let the notebook be saved every ``pause`` seconds at most, and at the end, whatever ends it.

    papermill saves it before and after each cell, prose included: megabytes, a hundred times over.
    """
    save, last = nb_man.save, time.monotonic()

    def save_at_times(**kwargs: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= pause:
            save(**kwargs)
            last = time.monotonic()

    nb_man.save = save_at_times
    try:
        yield
    finally:
        nb_man.save = save
        save()


papermill_engines.register(ENGINE, StudyEngine)


def record_path(folder: Path, notebook: Path) -> Path:
    """Where the :class:`~mome_utils.records.Record` of a notebook's last finished run lies."""
    return folder / "notebooks" / f"{notebook.stem}.run.json"


def _touched_path(folder: Path, notebook: Path) -> Path:
    return folder / "notebooks" / f"{notebook.stem}.touched.json"


def _open_record(folder: Path, notebook: Path) -> None:
    """Note that the notebook runs; times of its last run are kept for the overview."""
    before = read_record(record_path(folder, notebook))
    if before is not None:
        write_record(record_path(folder, notebook), dataclasses.replace(before, finished=False))


def _keep_record(folder: Path, notebook: Path, record: Record, core: str) -> None:
    """Complete the record with what ``Study.finish`` noted, and write it.

    ``core`` is the digest of the same parameters without extended arms.
    """
    path = _touched_path(folder, notebook)
    if not path.is_file():
        raise MomeError(
            f"notebooks/{notebook.name} left no record of its results: end it with study.finish()."
        )
    touched = json.loads(path.read_text(encoding="utf-8"))
    before = read_record(record_path(folder, notebook))
    first, extra = record.seconds + touched["run_seconds"], touched["extra_seconds"]
    if before is not None and before.code == record.code:
        if before.parameters == record.parameters:  # the last run found results that an earlier one had made
            first, extra = max(first, before.first_run), max(extra, before.extra)
        elif before.parameters == core:  # its own time, which now holds the scoring of extended arms, is known
            first = before.first_run
    complete = dataclasses.replace(
        record, manifests=touched["manifests"], first_run=first, extra=extra, extended=touched["extended"]
    )
    write_record(record_path(folder, notebook), complete)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
