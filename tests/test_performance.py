"""The README's performance table says what the stored benchmarks say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mome_utils import bench
from mome_utils.__main__ import main
from mome_utils.config import MomeError
from mome_utils.performance import BENCHMARK_FOLDER, performance_block, with_performance

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_shows_the_stored_benchmarks():
    assert performance_block(ROOT) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_stored_benchmark_is_in_the_table_or_compares_nothing():
    shown = performance_block(ROOT)
    for path in (ROOT / BENCHMARK_FOLDER).glob("*.json"):
        compared = any("ratio" in row for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
        assert (f"(`{path.stem}`)" in shown) == compared


def test_a_benchmark_renews_the_table(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("a\n<!-- performance:begin --><!-- performance:end -->\nb\n", encoding="utf-8")
    row = {"sequences": 9, "vocabulary": 4096, "ratio": 161.84, "lowest": 144.9, "highest": 189.8}
    monkeypatch.setattr(bench, "BENCHMARKS", {"router": lambda root, rounds: [row]})
    monkeypatch.setattr("mome_utils.places.project_root", lambda: tmp_path)
    assert main(["bench", "router"]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    line = "routing 9 sequences, vocabulary 4,096 (`router`) | the published pipeline | 162 × faster (145 to 190)"
    assert f"| {line} |" in text and text.startswith("a\n") and text.endswith("\nb\n")


def test_each_row_of_data_set_and_generation_says_what_it_is(tmp_path):
    ratio = {"ratio": 2.0, "lowest": 1.5, "highest": 2.5}
    rows = {
        "dataset": {"documents": 1600, "textbook": "by batch"} | ratio,
        "generate": {"variant": "ple", "prompts": 8} | ratio,
    }
    (tmp_path / BENCHMARK_FOLDER).mkdir(parents=True)
    for name, row in rows.items():
        content = {"benchmark": name, "machine": bench.machine(), "rows": [row]}
        (tmp_path / BENCHMARK_FOLDER / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    lines = performance_block(tmp_path).splitlines()[2:4]
    assert lines == [
        "| 1,600 documents balanced and in blocks (`dataset`) | the textbook's way, tokenized by batch | "
        "2 × faster (1.5 to 2.5) |",
        "| ple continues prompts of all languages, 8 at once (`generate`) | one prompt after the other | "
        "2 × faster (1.5 to 2.5) |",
    ]


def test_operations_that_a_step_spares_are_counted_and_equal_ones_are_not_mentioned(tmp_path):
    # Ours: 200 tokens/s at 40 % of the rate; beside it 100 at 50 %: 0.002 against 0.005 rate-seconds a token.
    row = {"measured": "kd, ours, eager", "against": "kd, textbook, eager", "ratio": 2.0, "lowest": 1.5, "highest": 2.5,
           "tokens_per_s": 200.0, "against_tokens_per_s": 100.0, "matrix_rate": 0.4, "against_matrix_rate": 0.5}
    rows = [row, row | {"tokens_per_s": 100.0, "matrix_rate": 0.5}]
    (tmp_path / BENCHMARK_FOLDER).mkdir(parents=True)
    content = {"benchmark": "kd", "machine": bench.machine(), "rows": rows}
    (tmp_path / BENCHMARK_FOLDER / "kd.json").write_text(json.dumps(content), encoding="utf-8")
    results = [line.split(" | ")[2] for line in performance_block(tmp_path).splitlines()[2:4]]
    assert results == ["2 × faster (1.5 to 2.5) with 2.5 × fewer operations, 40% of the matrix rate |",
                       "2 × faster (1.5 to 2.5), 50% of the matrix rate |"]


def test_a_gpu_is_named_and_its_teacher_compared_with_its_matrix_rate(tmp_path):
    row = {"device": "A GPU", "ratio": 1.6, "lowest": 1.5, "highest": 1.75, "matrix_rate": 0.47}
    rows = [row | {"measured": "teacher training", "against": "itself"},
            row | {"measured": "distillation, cached teacher", "against": "teacher in each step"}]
    folder = tmp_path / BENCHMARK_FOLDER
    folder.mkdir(parents=True)
    content = {"machine": {"processor": "x", "cores": 16, "torch": "2"}, "rows": rows}
    (folder / "gpu.json").write_text(json.dumps(content), encoding="utf-8")
    block = performance_block(tmp_path)
    assert "| teacher training on A GPU (`gpu`) | the device's own rate of matrix products | 47% |" in block
    line = "distillation, cached teacher on A GPU (`gpu`) | teacher in each step | 1.6 × faster (1.5 to 1.75)"
    assert f"| {line} |" in block


def test_a_readme_without_markers_is_refused(tmp_path):
    shutil.copytree(ROOT / BENCHMARK_FOLDER, tmp_path / BENCHMARK_FOLDER)
    with pytest.raises(MomeError, match="to put the benchmarks between"):
        with_performance("no markers", performance_block(tmp_path))
