"""The runner on toy notebooks: order, skipping, stopping at an error, going on, staleness, the overview."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import papermill.engines
import pytest

from mome_utils import artifacts, runner
from mome_utils.artifacts import Store, file_digest
from mome_utils.config import MomeError
from mome_utils.overview import Overview, Plan, in_words, seconds_left
from mome_utils.records import Record, code_digest, is_stale, listing, read_record, stale_reason, tags
from mome_utils.runner import CellFailed, Request, run_study

PARAMETERS = '''profile: str = "laptop"  # how large
corpus: str = "embedded"  # which texts
languages: list = []  # codes
seeds: int = 0  # how many
overrides: dict = {}  # fields'''

#: What Study.finish() does, in small: name the results that the notebook used.
FINISH = '''import hashlib, json, os, pathlib
folder = next(pathlib.Path(os.environ["MOME_ARTIFACTS"]).glob(f"{profile}-*"))
names = [p for p in sorted(folder.glob("toy/*/manifest.json"))]
used = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
record = {"notebook": NAME, "manifests": used, "run_seconds": 1000.0, "extra_seconds": 7.0,
          "extended": []}
(folder / "notebooks" / f"{NAME}.touched.json").write_text(json.dumps(record))'''


def toy(name: str, *cells: str | tuple[str, str]) -> nbformat.NotebookNode:
    """A notebook with a parameters cell, the given cells (code, or (tag, code)), and one that records."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"# {name}"))
    notebook.cells.append(nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}))
    for cell in cells:
        tag, code = cell if isinstance(cell, tuple) else (None, cell)
        notebook.cells.append(nbformat.v4.new_code_cell(code, metadata={"tags": [tag]} if tag else {}))
    notebook.cells.append(nbformat.v4.new_code_cell(FINISH.replace("NAME", repr(name))))
    return notebook


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write toy notebooks and a corpus into a repository of their own."""
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "data" / "artifacts"))
    for language in ("en", "fr"):
        lines = [json.dumps({"id": f"{n}", "text": f"{language} {n}"}) for n in range(80)]
        artifacts.write_atomic(tmp_path / "data" / "corpus" / f"{language}.jsonl", "\n".join(lines) + "\n")

    def write(**notebooks: nbformat.NotebookNode) -> Path:
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        for name, notebook in notebooks.items():
            nbformat.write(notebook, tmp_path / "notebooks" / f"{name.strip('_')}.ipynb")
        return tmp_path

    return write


def request(root: Path, **changes: Any) -> Request:
    return Request(profile="smoke", corpus=str(root / "data" / "corpus"), **changes)


def run(root: Path, **options: Any) -> tuple[int, str]:
    """Number of notebooks that ran, and what was shown."""
    changes = options.pop("changes", {})
    stream = io.StringIO()
    return run_study(request(root, **changes), root=root, stream=stream, **options), stream.getvalue()


def executed(root: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(request(root).resolve()[1] / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> str:
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))


def test_runs_in_order_with_this_interpreter_then_skips_all(study: Callable[..., Path]) -> None:
    where = "import os, sys; print(profile, sys.executable, os.getcwd())"
    root = study(_01_first=toy("01_first", where), _02_second=toy("02_second", "print(6 * 7)"))
    ran, shown = run(root)
    assert ran == 2
    assert outputs(executed(root, "01_first")).split() == ["smoke", sys.executable, str(root)]
    assert shown.index("[1/2] 01_first: finished") < shown.index("[2/2] 02_second: started (not run yet)")
    again, shown = run(root)
    assert again == 0
    assert shown.count("up to date") == 2
    assert run(root, force=True, only=["2"])[0] == 1
    record = read_record(runner.record_path(request(root).resolve()[1], Path("02_second.ipynb")))
    assert record is not None
    assert 0 < record.seconds < 60
    assert 1000 < record.first_run < 1060  # its own time and that of the training it found done
    assert record.extra == 7


def test_arms_reach_the_notebooks_that_choose_them_and_make_only_those_stale(study: Callable[..., Path]) -> None:
    chooser = toy("02_chooser", "import os; print(arms, os.environ['MOME_STATIC'])")
    chooser.cells[1].source += '\narms: str = "core"  # or extended'
    root = study(_01_plain=toy("01_plain"), _02_chooser=chooser)
    assert run(root)[0] == 2
    kept = runner.record_path(request(root).resolve()[1], Path("02_chooser.ipynb"))
    first = read_record(kept)
    assert outputs(executed(root, "02_chooser")).split() == ["core", "1"]
    ran, shown = run(root, changes={"arms": "extended"})
    assert ran == 1 and "01_plain: up to date" in shown
    assert "02_chooser: started (its parameters have changed)" in shown
    assert outputs(executed(root, "02_chooser")).split() == ["extended", "1"]
    second = read_record(kept)
    assert first is not None and second is not None and first.cells != second.cells
    assert second.first_run == first.first_run  # what the extended arms took is no part of it
    with pytest.raises(MomeError, match="'core' or 'extended', not 'all'"):
        request(root, arms="all")


def test_stops_at_a_failing_cell_and_goes_on_from_there(study: Callable[..., Path]) -> None:
    root = study(
        _01_first=toy("01_first", "print('one')"),
        _02_second=toy("02_second", "print('before')", "raise ValueError('no such thing\\nsecond line')"),
        _03_third=toy("03_third", "print('three')"),
    )
    with pytest.raises(CellFailed) as failure:
        run(root)
    message = str(failure.value)
    assert "notebooks/02_second.ipynb stopped at code cell 4: ValueError: no such thing" in message
    assert re.search("half-executed notebook is data/artifacts/smoke-[0-9a-f]{8}/notebooks/02_sec", message)
    assert str(root) not in message
    assert "before" in outputs(executed(root, "02_second"))
    assert not list(root.glob("data/artifacts/*/notebooks/03_third.ipynb"))
    study(_02_second=toy("02_second", "print('before')", "print('mended')"))
    ran, shown = run(root)
    assert ran == 2
    assert "01_first: up to date" in shown
    assert "mended" in outputs(executed(root, "02_second"))


def test_a_quick_notebook_is_saved_a_few_times_and_not_twice_a_cell(
    study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    write = papermill.engines.write_ipynb
    monkeypatch.setattr(papermill.engines, "write_ipynb", lambda nb, path: (saved.append(path), write(nb, path)))
    root = study(_01_first=toy("01_first", *(f"print('cell {i}')" for i in range(20))))
    assert run(root)[0] == 1
    assert 1 <= len(saved) <= 8  # every five seconds, and at the end; papermill alone: more than forty times
    assert "cell 19" in outputs(executed(root, "01_first"))


def test_a_forced_run_that_fails_is_not_mistaken_for_a_finished_one(study: Callable[..., Path]) -> None:
    root = study(_01_first=toy("01_first", "import pathlib; assert pathlib.Path('there').exists()"))
    (root / "there").touch()
    assert run(root)[0] == 1
    (root / "there").unlink()
    with pytest.raises(CellFailed, match="AssertionError"):
        run(root, force=True)
    (root / "there").touch()
    ran, shown = run(root)
    assert ran == 1
    assert "its last run did not get to its end" in shown


def test_a_dead_kernel_is_reported_like_a_failing_cell(study: Callable[..., Path]) -> None:
    root = study(_01_first=toy("01_first", "import os; os._exit(1)"))
    with pytest.raises(CellFailed, match="01_first.ipynb stopped at code cell 3: its kernel died"):
        run(root)


def test_exercises_are_shown_and_not_run(study: Callable[..., Path]) -> None:
    cells = [("exercise", "1 / 0"), ("solution", "print('solved')"), "print('end')"]
    root = study(_01_first=toy("01_first", *cells))
    run(root)
    done = executed(root, "01_first")
    assert [cell.source for cell in done.cells if "solution" in tags(cell)] == ["print('solved')"]
    assert outputs(done) == "end\n"
    runner.run_notebook(
        root / "notebooks/01_first.ipynb", root / "all.ipynb", request(root).parameters(), root=root,
        skip=lambda cell: "exercise" in tags(cell),
    )
    assert "solved" in outputs(nbformat.read(root / "all.ipynb", as_version=4))


def test_a_notebook_without_finish_is_named(study: Callable[..., Path]) -> None:
    notebook = toy("01_first")
    notebook.cells.pop()
    with pytest.raises(MomeError, match="01_first.ipynb left no record"):
        run(study(_01_first=notebook))


def test_only_and_bad_requests(study: Callable[..., Path], tmp_path: Path) -> None:
    root = study(_01_first=toy("01_first"), _02_second=toy("02_second"))
    assert [path.stem for path in runner.select_notebooks(root, ["2"])] == ["02_second"]
    assert len(runner.select_notebooks(root, ["02", "01_first"])) == 2
    bad: list[tuple[dict[str, Any], str]] = [
        ({"profile": "desktop"}, "no profile 'desktop'"),
        ({"profile": "smoke", "corpus": str(tmp_path / "nowhere")}, "nowhere"),
        ({"profile": "smoke", "seeds": -1}, "seeds"),
        ({"profile": "smoke", "overrides": {"colour": 3}}, "no field 'colour'"),
        ({"profile": "smoke", "corpus": str(root / "data/corpus"), "languages": ("en", "xx")}, "xx"),
    ]
    for values, sentence in bad:
        with pytest.raises(MomeError, match=sentence):
            run_study(Request(**values), root=root, stream=io.StringIO())
    with pytest.raises(MomeError, match="no notebook '07'"):
        run(root, only=["07"])
    assert not (root / "data" / "artifacts").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that a stop button could send")
def test_an_interrupt_ends_the_kernel(study: Callable[..., Path]) -> None:
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    root = study(_01_first=toy("01_first", code))
    # A test that itself runs in the background of a shell has inherited that interrupts are ignored.
    script = ("import signal, sys\nfrom pathlib import Path\nfrom mome_utils.runner import Request, run_study\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "root = Path(sys.argv[1])\n"
              "run_study(Request(profile='smoke', corpus=str(root / 'data/corpus')), root=root)")
    process = subprocess.Popen([sys.executable, "-c", script, str(root)], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    waiting_ends = time.monotonic() + 60
    while not (root / "pid").is_file() and time.monotonic() < waiting_ends:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.kill(int((root / "pid").read_text(encoding="utf-8")), 0)


# --- staleness


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Record, Path, Path]:
    """A notebook, its record, the profile's folder, and the module that made the one result it read."""
    source = tmp_path / "toy_module.py"
    source.write_text('"""Doc."""\nVALUE = 1\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "store"
    with Store(folder).create("toy", "abc", inputs={}, parameters={}, modules=["toy_module"]) as writer:
        (writer.folder / "rows.csv").write_text("1,2\n", encoding="utf-8")
    notebook = toy("01_first", "a = 1", ("exercise", "b = 2"))
    manifest = "toy/abc/manifest.json"
    used = {manifest: file_digest(folder / manifest)}
    record = Record("01_first", code_digest(notebook), "p", used, [1.0, 2.0])
    return notebook, record, folder, source


def test_what_changes_nothing_is_not_stale(stored: tuple[dict[str, Any], Record, Path, Path]) -> None:
    notebook, record, folder, source = stored
    notebook["cells"][0]["source"] = "# another title"
    notebook["cells"][3]["source"] = "b = 3  # an exercise"
    injected = nbformat.v4.new_code_cell("seeds = 3", metadata={"tags": ["injected-parameters"]})
    notebook["cells"].insert(2, injected)
    notebook["cells"][-1]["outputs"] = [nbformat.v4.new_output("stream", text="1")]
    source.write_text('"""Another text."""\nVALUE = 1  # a comment\n', encoding="utf-8")
    assert stale_reason(notebook, "p", record, folder) is None
    assert not is_stale(notebook, "p", record, folder)


def test_what_makes_a_notebook_stale(stored: tuple[dict[str, Any], Record, Path, Path]) -> None:
    notebook, record, folder, source = stored
    assert stale_reason(notebook, "p", None, folder) == "not run yet"
    assert stale_reason(notebook, "q", record, folder) == "its parameters have changed"
    changed = toy("01_first", "a = 2", ("exercise", "b = 2"))
    assert stale_reason(changed, "p", record, folder) == "its code has changed"
    source.write_text("VALUE = 2\n", encoding="utf-8")
    assert stale_reason(notebook, "p", record, folder) == "toy/abc was made by code that has changed"
    source.unlink()
    assert stale_reason(notebook, "p", record, folder) is not None
    source.write_text("VALUE = 1\n", encoding="utf-8")
    assert stale_reason(notebook, "p", record, folder) is None
    (folder / "toy/abc/rows.csv").write_text("1\n", encoding="utf-8")
    assert stale_reason(notebook, "p", record, folder) == "toy/abc is damaged (rows.csv)"
    (folder / "toy/abc/rows.csv").unlink()
    assert is_stale(notebook, "p", record, folder)
    (folder / "toy/abc/manifest.json").write_text("{}", encoding="utf-8")
    assert stale_reason(notebook, "p", record, folder) == "toy/abc was made again"
    (folder / "toy/abc/manifest.json").unlink()
    assert stale_reason(notebook, "p", record, folder) == "toy/abc is gone"


def test_the_parameters_digest_follows_meaning_and_not_spelling(study: Callable[..., Path]) -> None:
    root = study()
    plain = request(root).resolve()[0]
    assert request(root, overrides={"max_diff_percent": "5"}).resolve()[0] == plain
    assert request(root, seeds=1).resolve()[0] == plain
    assert request(root, languages=("en", "fr")).resolve()[0] == plain
    assert request(root, seeds=2).resolve()[0] != plain
    assert request(root, overrides={"max_diff_percent": 4}).resolve()[0] != plain
    corpus = root / "data/corpus/en.jsonl"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace('"en ', '"English '), encoding="utf-8")
    assert request(root).resolve()[0] != plain


def test_an_unreadable_record_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "x.run.json"
    assert read_record(path) is None
    for text in ("", "{}", "[1]", '{"notebook": 1}'):
        path.write_text(text, encoding="utf-8")
        assert read_record(path) is None


# --- the overview


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left() -> None:
    assert seconds_left(spent=10, done=0, remaining=100, measured=False) is None
    assert seconds_left(spent=10, done=50, remaining=100, measured=False) == 20
    assert seconds_left(spent=10, done=50, remaining=100, measured=True) == 100
    assert [in_words(n) for n in (0.4, 59.4, 95, 4000)] == ["0 s", "59 s", "1 min 35 s", "1 h 6 min"]


def test_overview_on_a_terminal_rewrites_one_line() -> None:
    now = [0.0]
    plans = [Plan("01_a", "not run yet", (10.0, 30.0), True), Plan("02_b", "not run yet", (20.0,), True),
             Plan("03_c", None, (50.0,), True)]
    stream = Terminal()
    overview = Overview(plans, stream, clock=lambda: now[0])
    overview.begin(plans[0])
    overview.cell(0)
    now[0] = 12.0
    overview.cell(1)
    assert overview.line() == "[1/3] 01_a: cell 2/2, 12 s so far, about 50 s left"
    now[0] = 22.0
    assert overview.line() == "[1/3] 01_a: cell 2/2, 22 s so far, about 40 s left"
    overview.finished(plans[0])
    overview.begin(plans[1])
    assert overview.line() == "[2/3] 02_b: cell 1/1, 22 s so far, about 20 s left"
    overview.close()
    permanent = [line for line in stream.getvalue().split("\r\x1b[2K") if line.endswith("\n")]
    assert permanent == ["[1/3] 01_a: finished in 22 s, about 20 s left\n"]


def test_overview_before_anything_was_measured() -> None:
    now = [0.0]
    plans = [Plan("01_a", "not run yet", (30.0, 30.0), False), Plan("02_b", "not run yet", (60.0,), False)]
    overview = Overview(plans, io.StringIO(), clock=lambda: now[0])
    overview.begin(plans[0])
    assert "estimating the time left" in overview.line()
    now[0] = 5.0
    overview.cell(1)
    assert "5 s so far, about 15 s left" in overview.line()


def test_a_notebook_that_reads_every_result_is_stale_when_there_are_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("01_one", "09_all"):
        with store.create("results", name, inputs={}, parameters={}, modules=[]):
            pass
    notebook = toy("09_all")
    record = Record("09_all", code_digest(notebook), "p", {"results/*": listing(tmp_path / "results", "09_all")}, [1.0])
    assert stale_reason(notebook, "p", record, tmp_path) is None
    with store.create("results", "02_two", inputs={}, parameters={}, modules=[]):
        pass
    assert stale_reason(notebook, "p", record, tmp_path) == "results are others now"
