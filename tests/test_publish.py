"""Publishing a toy study for real, what publishing refuses, and that what is tracked belongs to its code."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from mome_utils.config import MomeError
from mome_utils.ledger import ledger
from mome_utils.publish import disagreements, merge_outputs, publish
from mome_utils.readme import RESULTS, readme_block, with_block
from mome_utils.runner import Request, read_notebook, run_study

ROOT = Path(__file__).resolve().parent.parent

PARAMETERS = '''profile: str = "laptop"  # how large
corpus: str = "embedded"  # which texts
languages: list = []  # codes
seeds: int = 0  # how many
overrides: dict = {}  # fields'''

OPEN = '''from matplotlib.figure import Figure
from mome_utils.intervals import Interval
from mome_utils.study import Study
study = Study.open("01_toy", profile=profile, corpus=corpus, languages=languages, seeds=seeds, quiet=True)'''

SETTLE = '''figure = Figure(figsize=(2, 1))
figure.add_subplot().plot([1, 2])
study.show(figure, "line", caption="A line.", alt="a line")
effect = Interval(estimate=0.5, low=0.4, high=0.6, seeds=3, documents=30)
study.settle({"C5a": effect})'''


def toy() -> nbformat.NotebookNode:
    """A notebook of the study in small."""
    new, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    return nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[
            new("# 1 · A toy\n\n**Question.** Does it\nwork at all?\n\nMore text?"),
            code(PARAMETERS, metadata={"tags": ["parameters"]}), code(OPEN), code(SETTLE), code("6 * 7"),
            code("1 / 0", metadata={"tags": ["exercise"]}), code("study.finish()"),
        ],
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one toy notebook, run at ``laptop``."""
    root = tmp_path_factory.mktemp("toy") / "repository"
    for language in ("en", "fr"):
        lines = [json.dumps({"id": f"{n}", "text": f"{language} {n}"}) for n in range(9)]
        (root / "texts").mkdir(parents=True, exist_ok=True)
        (root / "texts" / f"{language}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "notebooks").mkdir()
    nbformat.write(toy(), root / "notebooks" / "01_toy.ipynb")
    readme = "# Toy\n\n<!-- results:begin -->\n<!-- results:end -->\n\nLast line.\n"
    (root / "README.md").write_text(readme, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(root / "artifacts"))
        assert run_study(request_for(root), root=root, stream=io.StringIO()) == 1
    return root


@pytest.fixture
def repository(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change; the request stays the original's, since the corpus' place names the results."""
    root = tmp_path / "copy"
    shutil.copytree(original, root)
    monkeypatch.setenv("MOME_ARTIFACTS", str(root / "artifacts"))
    return root


def request_for(root: Path) -> Request:
    return Request(profile="laptop", corpus=str(root / "texts"))


def executed_copy(root: Path) -> Path:
    return next(root.glob("artifacts/*/notebooks/01_toy.ipynb"))


def test_publish_brings_outputs_tables_figures_and_readme_together(repository: Path, original: Path) -> None:
    sentence = publish(repository, request_for(original))
    assert sentence == "Published 1 notebooks with their figures and tables."
    published = nbformat.read(repository / "notebooks" / "01_toy.ipynb", as_version=4)
    nbformat.validate(published)
    source = toy()
    assert [cell.source for cell in published.cells] == [cell.source for cell in source.cells]
    assert [cell.metadata for cell in published.cells] == [cell.metadata for cell in source.cells]
    assert published.metadata == source.metadata
    counts = [cell.execution_count for cell in published.cells if cell.cell_type == "code"]
    assert counts == [1, 2, 3, 4, None, 5]
    assert published.cells[4].outputs[0]["data"]["text/plain"] == "42"
    assert (repository / "figures" / "01_toy" / "line.svg").is_file()
    claims = pd.read_parquet(repository / "data/results/laptop/01_toy/claims.parquet")
    assert list(claims["claim"]) == ["C5a"]
    study = json.loads((repository / "data/results/laptop/study.json").read_text(encoding="utf-8"))
    assert study["notebooks"]["01_toy"]["results"] == ["results/01_toy"]
    assert study["arms"] == "core" and study["notebooks"]["01_toy"]["extended_seconds"] == 0
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Toy\n") and readme.endswith("Last line.\n")
    assert "| [1 · A toy](notebooks/01_toy.ipynb) | Does it work at all? |" in readme
    assert "+0.5000 (+0.4000 to +0.6000) bits per byte | 0.01 | reproduced |" in readme
    assert str(original) not in (repository / "notebooks" / "01_toy.ipynb").read_text(encoding="utf-8")
    assert disagreements(repository) == []
    before = (repository / "notebooks" / "01_toy.ipynb").read_bytes()
    publish(repository, request_for(original))
    assert (repository / "notebooks" / "01_toy.ipynb").read_bytes() == before


def test_disagreements_name_what_no_longer_belongs_together(repository: Path, original: Path) -> None:
    assert "nothing has been published yet" in disagreements(repository)[0]
    publish(repository, request_for(original))
    path = repository / "notebooks" / "01_toy.ipynb"
    notebook = read_notebook(path)
    source = notebook["cells"][3]["source"]
    notebook["cells"][3]["source"] = ["0.5 == 1"]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert disagreements(repository) == ["01_toy: its code has changed since its outputs were published."]
    notebook["cells"][3]["source"] = source
    notebook["cells"][4]["execution_count"] = None
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert disagreements(repository) == ["01_toy: it is not published as it was executed."]
    publish(repository, request_for(original))
    (repository / "figures/01_toy/line.svg").write_text("<svg/>", encoding="utf-8")
    (repository / "data/results/laptop/01_toy/more.parquet").write_text("", encoding="utf-8")
    assert [sentence.split(" is ")[0] for sentence in disagreements(repository)] == [
        "figures/01_toy/line.svg", "data/results/laptop/01_toy/more.parquet"]
    publish(repository, request_for(original))
    readme = repository / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("+0.5000", "+0.4000"), encoding="utf-8")
    assert disagreements(repository) == ["README.md does not show the published results."]
    study = repository / "data/results/laptop/study.json"
    entries = json.loads(study.read_text(encoding="utf-8"))
    entries["notebooks"]["01_toy"]["sources"]["mome_utils.claims"] = "0"
    study.write_text(json.dumps(entries), encoding="utf-8")
    assert disagreements(repository)[0] == "01_toy: its results were made before mome_utils.claims changed."


BAD_OUTPUTS: list[tuple[dict[str, Any], str]] = [
    ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}, "an error"),
    ({"output_type": "stream", "name": "stderr", "text": "UserWarning: no"}, "a warning"),
    ({"output_type": "stream", "name": "stdout", "text": "in /some/place/data"}, "a path of this machine"),
    ({"output_type": "stream", "name": "stdout", "text": "in /home/someone"}, "a path of this machine"),
    ({"output_type": "display_data", "metadata": {},
      "data": {"text/html": "<a href='C:\\Users\\me'>"}}, "a path of this machine"),
    ({"output_type": "display_data", "metadata": {},
      "data": {"application/vnd.jupyter.widget-view+json": {}}}, "a widget"),
]


@pytest.mark.parametrize(("output", "sentence"), BAD_OUTPUTS)
def test_outputs_that_are_refused(output: dict[str, Any], sentence: str) -> None:
    source, done = toy(), toy()
    done.cells[2].outputs = [output]
    with pytest.raises(MomeError, match=f"x.ipynb cannot be published: code cell 2 shows {sentence}"):
        merge_outputs(source, done, "x.ipynb", ["/some/place"])


def test_nothing_is_written_when_publishing_is_refused(repository: Path, original: Path) -> None:
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    with pytest.raises(MomeError, match="Only a 'laptop' run is published"):
        publish(repository, Request(profile="smoke"))
    path = executed_copy(repository)
    notebook = read_notebook(path)
    notebook["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stderr", "text": ["no"]}]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(MomeError, match="shows a warning"):
        publish(repository, request_for(original))
    path.write_bytes(before[path])
    figure = next(repository.glob("artifacts/*/figures/01_toy/line.svg"))
    figure.write_text(f"<svg>{Path.home()}/x</svg>", encoding="utf-8")
    with pytest.raises(MomeError, match="line.svg cannot be published: it holds a path"):
        publish(repository, request_for(original))
    figure.write_bytes(before[figure])
    table = next(repository.glob("artifacts/*/results/01_toy")) / "large.parquet"
    table.write_bytes(bytes(5_100_000))
    with pytest.raises(MomeError, match="more than 5 MB"):
        publish(repository, request_for(original))
    table.unlink()
    source = repository / "notebooks" / "01_toy.ipynb"
    notebook = read_notebook(source)
    notebook["cells"][2]["source"] = ["pass"]
    source.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(MomeError, match=r"01_toy.ipynb cannot be published \(its code has changed\)"):
        publish(repository, request_for(original))
    source.write_bytes(before[source])
    (repository / "README.md").write_text("no markers", encoding="utf-8")
    with pytest.raises(MomeError, match="README.md needs the lines"):
        publish(repository, request_for(original))
    (repository / "README.md").write_bytes(before[repository / "README.md"])
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before


def test_the_readme_tells_the_time_of_the_extended_arms_apart(repository: Path, original: Path) -> None:
    publish(repository, request_for(original))
    path = repository / "data/results/laptop/study.json"
    study = json.loads(path.read_text(encoding="utf-8"))
    entries = ledger(repository / RESULTS)
    assert "extended" not in readme_block(repository, entries)
    study["arms"], study["notebooks"]["01_toy"]["extended_seconds"] = "extended", 1500.0
    path.write_text(json.dumps(study), encoding="utf-8")
    assert "(extended arms: 25 min 0 s more) |" in readme_block(repository, entries)
    assert "`--arms extended` trains the extended arms too, as was done here.\n" in readme_block(repository, entries)
    study["notebooks"]["02_again"] = study["notebooks"]["01_toy"] | {
        "tokens": {"runs/a": 3_000_000, "runs/b": 5_000_000, "runs/c": 6_000_000}, "extended": ["runs/b", "runs/c"],
    }
    study["notebooks"]["01_toy"] |= {"tokens": {"runs/c": 6_000_000}, "extended": []}  # core here, so core
    nbformat.write(toy(), repository / "notebooks" / "02_again.ipynb")
    path.write_text(json.dumps(study), encoding="utf-8")
    told = ("here. It trains 2 language models on 9 million tokens (with the extended arms 3 language models on 14 "
            "million tokens).")
    assert told in readme_block(repository, entries)


def test_the_results_block_is_replaced_and_the_rest_kept() -> None:
    text = "a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n"
    assert with_block(text, "new") == "a\n<!-- results:begin -->\nnew\n<!-- results:end -->\nb\n"
    assert with_block(with_block(text, "x"), "old") == text


def test_what_is_tracked_belongs_to_its_code() -> None:
    """Fails until the ``laptop`` run is published, and whenever code or notebooks have changed since."""
    assert disagreements(ROOT) == []
    assert readme_block(ROOT, ledger(ROOT / RESULTS)) in (ROOT / "README.md").read_text(encoding="utf-8")
    size = sum(file.stat().st_size for file in (ROOT / "data" / "results").rglob("*") if file.is_file())
    assert size < 5_000_000
