"""The notebooks: how they are written, and that all of them run, together, alone, with every solution."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest
import torch
from conftest import ROOT, SmokeStore
from transformers import AutoModelForCausalLM

from mome_utils.publish import merge_outputs
from mome_utils.records import is_skipped, tags
from mome_utils.runner import CellFailed, Request, read_notebook, run_notebook, run_study
from mome_utils.study import Study

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

COMMON = ["profile", "corpus", "languages", "seeds", "overrides"]
SMOKE = Request(profile="smoke")


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


# --- how they are written


def test_those_of_the_study_are_there() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert [name[:2] for name in names] == [f"{n:02d}" for n in range(1, len(names) + 1)]
    assert names == ["01_dataset_creation", "02_teacher_training", "03_kd_alpha_comparison",
                     "04_router_bakeoff", "05_moe_variants", "06_forgetting_curves",
                     "07_representation_similarity", "08_position_bias", "09_claims_ledger"]


@each_notebook
def test_every_parameter_is_typed_and_explained(path: Path) -> None:
    assert [tags(cell) for cell in code_cells(path)].count({"parameters"}) == 1
    parameters = papermill.inspect_notebook(path)
    assert list(parameters)[:5] == COMMON
    for name, parameter in parameters.items():
        assert parameter["inferred_type_name"] not in ("None", ""), name
        assert len(parameter["help"]) > 10, name


@each_notebook
def test_form(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source
    runs = [cell for cell in code_cells(path) if not is_skipped(cell)]
    assert runs[-1].source.rstrip().endswith("study.finish()")
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 25, cell.source
    for cell in runs:
        defined = [node for node in ast.parse(cell.source).body
                   if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        assert not defined, f"a helper belongs into the package: {cell.source}"


@each_notebook
def test_every_exercise_has_a_folded_solution(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    exercises = [cell for cell in cells if "exercise" in tags(cell)]
    solutions = [cell for cell in cells if "solution" in tags(cell)]
    assert len(exercises) >= 2
    assert len(solutions) >= 2
    for cell in solutions:
        if cell.cell_type == "code":
            assert cell.metadata.get("jupyter", {}).get("source_hidden") is True


# --- the study as a whole


def test_the_study_runs_every_notebook(smoke_store: SmokeStore) -> None:
    for number, path in enumerate(NOTEBOOKS, 1):
        assert f"[{number}/{len(NOTEBOOKS)}] {path.stem}: " in smoke_store.shown
        assert (smoke_store.folder / "notebooks" / path.name).is_file()
        assert (smoke_store.folder / "results" / path.stem / "manifest.json").is_file()


def test_a_smoke_run_changes_no_tracked_file(smoke_store: SmokeStore) -> None:
    assert smoke_store.changed == ()


def test_a_second_run_has_nothing_to_do(use_smoke_store: SmokeStore) -> None:
    stream = io.StringIO()
    assert run_study(SMOKE, root=ROOT, stream=stream) == 0
    assert stream.getvalue().count("up to date") == len(NOTEBOOKS)


@each_notebook
def test_what_a_run_shows_could_be_published(path: Path, smoke_store: SmokeStore) -> None:
    executed = read_notebook(smoke_store.folder / "notebooks" / path.name)
    places = [str(ROOT), str(smoke_store.artifacts), sys.prefix]
    merged = merge_outputs(read_notebook(path), executed, path.name, places)
    images = [output for cell in merged["cells"] for output in cell.get("outputs", ())
              if "image/png" in output.get("data", {})]
    assert images
    for image in images:
        assert len(image["metadata"]["image/png"].get("alt", "")) > 10


def test_a_random_score_is_what_its_saved_model_says(use_smoke_store: SmokeStore) -> None:
    """Any row of any score table, computed again from the saved weights, window by window in float64."""
    choice = random.Random()
    tables = [path.parent for path in sorted(use_smoke_store.folder.glob("scores/*/manifest.json"))
              if {"run", "step"} <= json.loads(path.read_text(encoding="utf-8"))["parameters"].keys()]
    table = choice.choice(tables)
    made = json.loads((table / "manifest.json").read_text(encoding="utf-8"))["parameters"]
    row = pd.read_parquet(table / "rows.parquet").sample(1, random_state=choice.randrange(10**6)).iloc[0]
    run = use_smoke_store.folder / "runs" / made["run"]
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2"
    model = AutoModelForCausalLM.from_pretrained(run / f"snapshots/step-{made['step']:06d}" if made["step"] else run)
    study = Study.open("", profile="smoke", quiet=True)
    documents = study.data().documents(made["split"], row["language"])
    text = next(document.text for document in documents if document.id == row["document"])
    tokenizer = study.data().tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    assert ids[0, 1] != tokenizer.bos_token_id
    size, stride, nats, scored = study.profile.block_size, study.profile.stride, 0.0, 1
    for start in range(0, ids.shape[1], stride):
        end = min(start + size, ids.shape[1])
        with torch.no_grad():
            log_p = model.double()(input_ids=ids[:, start:end]).logits[0].log_softmax(-1)
        nats -= sum(float(log_p[t - 1 - start, ids[0, t]]) for t in range(scored, end))
        scored = max(scored, end)
    assert row["nats"] == pytest.approx(nats, rel=1e-4), f"{table.name}: {row.to_dict()}"
    assert row["bytes"] == len(text.encode())
    assert row["tokens"] == ids.shape[1] - 1


# --- one notebook alone


def run_alone(path: Path, output: Path, **options: Any) -> nbformat.NotebookNode:
    run_notebook(path, output, SMOKE.parameters(), root=ROOT, **options)
    return nbformat.read(output, as_version=4)


@each_notebook
def test_every_solution_runs(path: Path, smoke_copy: Path, tmp_path: Path) -> None:
    done = run_alone(path, tmp_path / path.name, skip=lambda cell: "exercise" in tags(cell))
    solutions = [cell for cell in done.cells if "solution" in tags(cell) and cell.cell_type == "code"]
    assert solutions
    assert all(cell.execution_count for cell in solutions)


@each_notebook
def test_plain_papermill_from_where_the_notebooks_are(path: Path, smoke_copy: Path, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if not any(importlib.metadata.distributions(name="mome-utils")):
        environment["PYTHONPATH"] = str(ROOT)  # tested without having been installed
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(path), str(out),
               "-p", "profile", "smoke", "--no-progress-bar"]
    done = subprocess.run(command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "injected-parameters" in out.read_text(encoding="utf-8")
    assert not (ROOT / "notebooks" / "data").exists()


@each_notebook
def test_help_of_a_notebook_reads_like_documentation(path: Path) -> None:
    command = [sys.executable, "-m", "papermill", "--help-notebook", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'profile: str (default "laptop")' in shown
    assert "smoke" in shown
    assert "Unknown type" not in shown


@pytest.mark.parametrize(("present", "named"), [
    ([], "01_dataset_creation"), (["dataset"], "04_router_bakeoff"),
    (["dataset", "router"], "02_teacher_training"),
])
def test_a_notebook_names_the_one_to_run_first(
    present: list[str], named: str, smoke_store: SmokeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in present:
        shutil.copytree(smoke_store.folder / stage, tmp_path / "artifacts" / "smoke" / stage)
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    path = ROOT / "notebooks" / "05_moe_variants.ipynb"
    with pytest.raises(CellFailed) as failure:
        run_alone(path, tmp_path / path.name)
    sentence = str(failure.value).splitlines()[0]
    assert sentence.endswith(f"run notebooks/{named}.ipynb first.")
    assert "MissingArtifact" in sentence


@pytest.mark.long
def test_the_study_runs_on_texts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two languages, no ids, no groups, no titles: nothing is aligned, and every notebook runs all the same."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for code, language in (("xx", "fr"), ("yy", "py")):
        lines = (ROOT / "data" / "corpus" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [json.dumps({"text": json.loads(line)["text"]}) for line in lines[::8]]
        (texts / f"{code}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.chdir(ROOT)
    request = Request(profile="smoke", corpus=str(texts), overrides={"common_documents": False})
    assert run_study(request, root=ROOT, stream=io.StringIO()) == len(NOTEBOOKS)
    folder = request.resolve()[1]
    rows = pd.read_parquet(folder / "results" / "02_teacher_training" / "test_rows.parquet")
    assert set(rows["language"]) == {"xx", "yy"}
    claims = {name: pd.read_parquet(folder / "results" / name / "claims.parquet").set_index("claim")["verdict"]
              for name in ("03_kd_alpha_comparison", "06_forgetting_curves")}
    assert set(claims["06_forgetting_curves"][["C6", "C7", "C8"]]) == {"undecided at this scale"}  # one seed
