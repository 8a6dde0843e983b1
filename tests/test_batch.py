"""A batch: which runs a grid means, that each has outputs of its own, that nothing is made twice, and going on."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mome_utils.__main__ import main
from mome_utils.batch import DONE, WAITING, grid, run_batch
from mome_utils.claims import CLAIMS
from mome_utils.config import MomeError
from mome_utils.runner import Request, own_parameters

PARAMETERS = '''profile: str = "laptop"  # how large
corpus: str = "embedded"  # which texts
languages: list = []  # codes
seeds: int = 0  # how many
overrides: dict = {}  # fields'''

WORK = '''from mome_utils.intervals import Interval
from mome_utils.study import Study
if words == 13:
    raise ValueError("unlucky")
study = Study.open("01_toy", profile=profile, corpus=corpus, languages=languages, seeds=seeds, overrides=overrides)
if not study.store.has("runs", "one"):
    with study.store.create("runs", "one", inputs={}, parameters={}, modules=[]):
        print("trained")
study.settle({"C5a": Interval(words / 100, words / 100 - 0.001, words / 100 + 0.001, 3, 30)})'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one toy notebook that has a parameter of its own."""
    for language in ("en", "fr"):
        path = tmp_path / "texts" / f"{language}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"id": f"t{n}", "text": "\n\n".join(f"{language} {n} part {part}." for part in range(9))})
                 for n in range(80)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    code = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[nbformat.v4.new_markdown_cell("# A toy\n\nDoes it work?"),
               code(f"{PARAMETERS}\nwords: int = 8  # how many words", metadata={"tags": ["parameters"]}),
               code(WORK), code("study.finish()")])
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "mome_utils").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_toy.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path


def base(root: Path) -> Request:
    return Request(profile="smoke", corpus=str(root / "texts"))


def test_a_grid_is_every_combination_with_its_parameters_where_they_belong(checkout: Path) -> None:
    axes = {"seeds": [1, 3], "max_diff_percent": [3, 5.5], "words": [4], "languages": ["fr+en"]}
    points = grid(axes, base(checkout), checkout)
    assert [point.name for point in points] == [
        f"seeds-{s}_max_diff_percent-{d}_words-4_languages-fr+en" for s in (1, 3) for d in (3, 5.5)]
    last = points[-1].request
    assert (last.profile, last.seeds, last.languages) == ("smoke", 3, ("fr", "en"))
    assert last.overrides == {"max_diff_percent": 5.5} and last.further == {"words": 4}
    corpora = grid({"corpus": ["texts", "other/texts"]}, base(checkout), checkout)
    assert len({point.name for point in corpora}) == 2  # folders of one name stay apart
    assert corpora[0].request.corpus == str(checkout / "texts")


@pytest.mark.parametrize(("axes", "sentence"), [
    ({"colour": ["red"]}, "no 'colour' to vary"), ({"overrides": [{}]}, "no 'overrides' to vary"),
    ({"seeds": []}, "'seeds' needs one value or more"), ({"seeds": [1, 1]}, "each once"),
])
def test_a_grid_that_cannot_be_is_refused(axes: dict, sentence: str, checkout: Path) -> None:
    with pytest.raises(MomeError, match=sentence):
        grid(axes, base(checkout), checkout)


def test_a_notebooks_own_parameters_decide_its_run_and_no_other() -> None:
    plain, chooser = ({"cells": [{"source": source, "metadata": {"tags": ["parameters"]}, "cell_type": "code"}]}
                      for source in (PARAMETERS, f'{PARAMETERS}\nwords: int = 8  # x\narms: str = "core"  # y'))
    assert own_parameters(chooser) - own_parameters(plain) == {"words", "arms"}
    few, many = Request(further={"words": 2}), Request(further={"words": 9})
    assert few.parameters(chooser)["words"] == 2 and "words" not in few.parameters(plain)
    assert few.digest_of(plain, "x") == many.digest_of(plain, "x") == Request().digest_of(plain, "x") == "x"
    assert len({one.digest_of(chooser, "x") for one in (few, many, Request())}) == 3


def test_points_have_outputs_of_their_own_and_one_store(checkout: Path) -> None:
    points = grid({"words": [3, 13, 0]}, base(checkout), checkout)
    out, stream = checkout / "out", io.StringIO()
    states = run_batch(points, out, root=checkout, stream=stream)
    assert states["words-3"] == states["words-0"] == DONE
    assert "stopped at code cell 3: ValueError: unlucky" in states["words-13"]
    assert os.environ["MOME_ARTIFACTS"] == str(checkout / "artifacts")
    assert len(list(checkout.glob("artifacts/*/runs/*/manifest.json"))) == 1
    executed = [path.read_text(encoding="utf-8") for path in out.glob("*/*/notebooks/01_toy.ipynb")]
    assert sum('"trained\\n"' in text for text in executed) == 1
    assert not list(checkout.glob("artifacts/*/results"))
    for name in ("words-3", "words-0"):
        assert len(list(out.glob(f"{name}/*/results/01_toy/claims.parquet"))) == 1
    table = pd.read_csv(out / "claims.csv")
    assert len(table) == 3 * len(CLAIMS)
    found = table[table["claim"] == "C5a"].set_index("point")
    assert found.loc["words-3", "verdict"] == "reproduced" and found.loc["words-3", "words"] == 3
    assert found.loc["words-0", "verdict"] == "not reproduced" and found.loc["words-13", "verdict"] == "not run"
    page = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#]+)"', page)
    assert sum(link.endswith("report/index.html") for link in links) == 3
    assert all((out / link).is_file() for link in links)


def test_a_stopped_batch_goes_on(checkout: Path) -> None:
    class Stopping(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("(2/"):
                raise KeyboardInterrupt
            return super().write(text)

    points, out = grid({"words": [3, 4]}, base(checkout), checkout), checkout / "out"
    with pytest.raises(KeyboardInterrupt):
        run_batch(points, out, root=checkout, stream=Stopping())
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count(f"<td>{DONE}</td>") == page.count(f"<td>{WAITING}</td>") == 1
    stream = io.StringIO()
    assert set(run_batch(points, out, root=checkout, stream=stream).values()) == {DONE}
    shown = stream.getvalue().partition("(2/2) words-4")
    assert "01_toy: up to date" in shown[0] and "01_toy: started (not run yet)" in shown[2]


def test_the_command_line_of_a_batch(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["batch", "--profile", "smoke", "--corpus", "texts", "--out", "out"]
    for more, sentence in ((["--vary", "colour=red"], "no 'colour' to vary"), ([], "nothing to vary"),
                           (["--vary", "words"], "--vary needs FIELD=VALUE"), (["--grid", "no.json"], "cannot be read"),
                           (["--vary", "words=1", "--only", "9"], "no notebook '9'"),
                           (["--vary", "max_diff_percent=3,many"], "max_diff_percent")):
        assert main([*command, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert not (checkout / "out").exists()
    (checkout / "grid.json").write_text('{"words": [13]}', encoding="utf-8")
    assert main([*command, "--grid", "grid.json"]) == 1
    assert "0 of 1 runs are done: out/index.html" in capsys.readouterr().out
