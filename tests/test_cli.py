"""The command line: what it does, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mome_utils.__main__ import main

PARAMETERS = '''profile: str = "laptop"  # how large
corpus: str = "embedded"  # which texts
languages: list = []  # codes
seeds: int = 0  # how many
overrides: dict = {}  # fields'''


def texts(folder: Path, *languages: str, count: int = 40) -> Path:
    """A corpus of aligned documents of a few paragraphs."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in languages:
        with open(folder / f"{language}.jsonl", "w", encoding="utf-8") as stream:
            for number in range(count):
                paragraphs = [f"{language} number {number} and part {part}." for part in range(2 + number % 7)]
                stream.write(json.dumps({"id": f"t{number}", "text": "\n\n".join(paragraphs)}) + "\n")
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a checkout with one notebook, and a corpus in ``texts``."""
    texts(tmp_path / "texts", "en", "fr")
    (tmp_path / "mome_utils").mkdir()
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("print(profile, seeds, overrides, languages)\nraise ValueError('not now')")]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})
    nbformat.write(notebook, tmp_path / "notebooks" / "01_toy.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command which cannot work writes."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mome: ") and shown.err.count("\n") == 1
    return shown.err


def test_study_reports_a_failing_cell_with_exit_code_1(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["study", "--profile", "smoke", "--corpus", "texts", "--languages", "fr,en", "--seeds", "2",
                 "--set", "max_diff_percent=3", "--set", "dtype=float32"]
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "notebooks/01_toy.ipynb stopped at code cell 3: ValueError: not now" in shown.err
    executed = nbformat.read(next(checkout.glob("artifacts/*/notebooks/01_toy.ipynb")), as_version=4)
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", ()))
    assert printed == "smoke 2 {'max_diff_percent': 3, 'dtype': 'float32'} ['fr', 'en']\n"
    assert main(["status", "--profile", "smoke", "--corpus", "texts"]) == 0
    assert capsys.readouterr().out.split() == ["01_toy", "not", "run", "yet"]


def test_study_ends_with_the_ledger_and_the_path_of_its_report(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "notebooks" / "01_toy.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = """from mome_utils.study import Study
study = Study.open("01_toy", profile=profile, corpus=corpus, quiet=True)
study.finish()"""
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# A toy"))
    nbformat.write(notebook, path)
    run = ["--profile", "smoke", "--corpus", "texts"]
    assert main(["study", *run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "C1    not run" in lines and "N3    not run" in lines
    report = re.fullmatch(r"The report is (artifacts/smoke-[0-9a-f]{8}/report/index\.html)", lines[-1])
    assert report is not None
    assert 'href="01_toy.html"' in (checkout / report.group(1)).read_text(encoding="utf-8")
    shutil.rmtree(checkout / "artifacts" / report.group(1).split("/")[1] / "report")
    assert main(["report", *run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1] and (checkout / report.group(1)).is_file()
    assert "run 'mome study' and 'mome publish' first" in complaint(capsys, "report")


def test_bad_requests_of_a_study_are_refused_before_it_starts(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["study", "--profile", "smoke", "--corpus"]
    assert "no profile 'desktop'" in complaint(capsys, "study", "--profile", "desktop", "--corpus", "texts")
    assert "nowhere" in complaint(capsys, *corpus, "nowhere")
    assert "xx" in complaint(capsys, *corpus, "texts", "--languages", "en,xx")
    assert "no field 'colour'" in complaint(capsys, *corpus, "texts", "--set", "colour=red")
    assert "FIELD=VALUE" in complaint(capsys, *corpus, "texts", "--set", "colour")
    assert "max_diff_percent" in complaint(capsys, *corpus, "texts", "--set", "max_diff_percent=many")
    assert "seeds" in complaint(capsys, *corpus, "texts", "--seeds", "-1")
    assert "no notebook '9'" in complaint(capsys, *corpus, "texts", "--only", "9,01")
    texts(checkout / "one", "en")
    assert "at least 2 languages" in complaint(capsys, *corpus, "one")
    texts(checkout / "empty", "en", "fr")
    (checkout / "empty" / "fr.jsonl").write_text("", encoding="utf-8")
    assert "fr" in complaint(capsys, *corpus, "empty")
    texts(checkout / "latin", "en", "fr")
    (checkout / "latin" / "fr.jsonl").write_bytes('{"id": "1", "text": "été"}\n'.encode("latin-1"))
    assert "UTF-8" in complaint(capsys, *corpus, "latin")
    assert not (checkout / "artifacts").exists()


def test_publish_wants_a_finished_laptop_run(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    assert "run 'mome study' first" in complaint(capsys, "publish")


def test_dataset(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["dataset", "--corpus", "texts", "--langs", "en,fr", "--max-diff-percent", "10", "--common",
               "--vocab-size", "300"]
    assert main([*command, "--out", "made"]) == 0
    assert re.fullmatch(r"The data set is in made: en, fr, at most \d\.\d % apart in tokens\.\n",
                        capsys.readouterr().out)
    tokens = {}
    for language in ("en", "fr"):
        parts = [pd.read_parquet(checkout / "made" / split / f"{language}.parquet")
                 for split in ("train", "validation", "test")]
        tokens[language] = {split: set(part["id"]) for split, part in zip("tvs", parts, strict=True)}
        assert not tokens[language]["t"] & tokens[language]["s"]
    assert tokens["en"] == tokens["fr"]
    manifest = json.loads((checkout / "made" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["max_diff_percent"] == 10
    assert (checkout / "made" / "tokenizer" / "tokenizer.json").is_file()
    assert "made" in complaint(capsys, *command, "--out", "made")


def test_dataset_refuses_what_cannot_be_done(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "made"]
    assert "nowhere" in complaint(capsys, "dataset", "--corpus", "nowhere", *out)
    assert "xx" in complaint(capsys, "dataset", "--corpus", "texts", "--langs", "en,xx", *out)
    assert "max_diff_percent" in complaint(capsys, "dataset", "--corpus", "texts", "--max-diff-percent", "-1", *out)
    texts(checkout / "apart", "en", "fr")
    lines = (checkout / "apart" / "fr.jsonl").read_text(encoding="utf-8").replace('"id": "t', '"id": "u')
    (checkout / "apart" / "fr.jsonl").write_text(lines, encoding="utf-8")
    assert "No document id exists in all" in complaint(capsys, "dataset", "--corpus", "apart", "--common", *out)
    assert not (checkout / "made").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["study", "--help"], ["dataset", "--help"], ["--version"]])
def test_help_comes_without_loading_anything_heavy(arguments: list[str]) -> None:
    code = ("import sys\nfrom mome_utils.__main__ import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n"
            "    print(sorted({'torch', 'pandas', 'transformers', 'papermill'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "mome" in shown.stdout


def test_an_unknown_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["studdy"])
    assert stop.value.code == 2
    assert "study" in capsys.readouterr().err
