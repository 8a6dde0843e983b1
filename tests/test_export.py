"""A mixture that leaves the study: complete, and nothing but data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SmokeStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from mome_utils.__main__ import main
from mome_utils.recipes import student_spec
from mome_utils.runs import train_or_load
from mome_utils.study import Study

READER = """
import sys, json, torch
import mome_utils
from transformers import pipeline
speak = pipeline("text-generation", model=sys.argv[1], device="cpu")
told = speak(["The river", "def area("], do_sample=False, max_new_tokens=6)
print(json.dumps([out[0]["generated_text"] for out in told]))
"""


@pytest.mark.parametrize("variant", ["ple", "jeet", "moe_ce"])
def test_an_exported_mixture_is_read_by_transformers(
    variant: str, use_smoke_store: SmokeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    assert main(["export", variant, "--profile", "smoke", "--out", str(out)]) == 0
    assert "experts en, fr, de, py" in capsys.readouterr().out
    assert {path.suffix for path in out.iterdir()} <= {".json", ".safetensors"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    study = Study.open("", profile="smoke", quiet=True)
    ids = torch.tensor([study.data().tokenizer("def area(radius):\n    return radius")["input_ids"]])
    assert tokenizer("def area(radius):\n    return radius")["input_ids"] == ids[0].tolist()
    assert model.languages[model.route(ids).item()] == "py"
    if variant == "ple":
        expert = train_or_load(student_spec(study, "py", "fixed", 0), study.store, study.data()).model()
        with torch.inference_mode():
            assert torch.equal(model(ids).logits, expert(ids).logits)


def test_another_process_generates_with_it(use_smoke_store: SmokeStore, tmp_path: Path) -> None:
    out = tmp_path / "mixture"
    assert main(["export", "jeet", "--profile", "smoke", "--out", str(out)]) == 0
    done = subprocess.run([sys.executable, "-c", READER, str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    texts = json.loads(done.stdout.splitlines()[-1])
    assert texts[0].startswith("The river") and texts[1].startswith("def area(") and len(texts[0]) > len("The river")


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["moe"], "There is no MoE variant 'moe': choose one of ple, jeet, moe_ce."),
    (["jeet", "--seed", "7"], "The study has the seeds 0: choose one of them, not 7."),
])
def test_what_cannot_be_exported(
    arguments: list[str], sentence: str, use_smoke_store: SmokeStore, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mixture"
    assert main(["export", *arguments, "--profile", "smoke", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"mome: {sentence}\n"
    assert not out.exists()


def test_nothing_is_written_over(
    use_smoke_store: SmokeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
    assert main(["export", "jeet", "--profile", "smoke", "--out", str(tmp_path)]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(("variant", "notebook"), [("ple", "03_kd_alpha_comparison"), ("jeet", "05_moe_variants")])
def test_what_is_not_trained_is_named_and_not_trained(
    variant: str, notebook: str, smoke_store: SmokeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "artifacts" / "smoke"
    shutil.copytree(smoke_store.folder / "dataset", store / "dataset")
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path / "artifacts"))
    assert main(["export", variant, "--profile", "smoke", "--out", str(tmp_path / "mixture")]) == 2
    assert capsys.readouterr().err.endswith(f"run notebooks/{notebook}.ipynb first.\n")
    assert not (tmp_path / "mixture").exists() and not (store / "runs").exists()
