"""One run by two processes (gloo) is the run of one: same sequences, same losses, same weights up to rounding."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from mome_utils import recipes
from mome_utils.artifacts import canonical_json
from mome_utils.config import MomeError
from mome_utils.distillation import Objective
from mome_utils.distributed import Share, check_processes, check_shards
from mome_utils.launch import read_spec, train_together
from mome_utils.run_log import LOG
from mome_utils.runs import Run, run_key, train_or_load
from mome_utils.study import Study

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "expert": [1, 16, 2], "teacher_epochs": 0.1, "student_epochs": 0.1, "teacher_batch": 4, "student_batch": 4,
    "evaluations": 2, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}
#: What rounding may do to a float32 run of a dozen steps: sums of a batch are made in two parts.
TOLERANCE = dict(rtol=1e-5, atol=2e-6)
#: Adam divides by the root of a running square: where gradients are near 0 their rounding moves a weight further.
WEIGHTS = dict(rtol=1e-4, atol=2e-5)


def launched(artifacts: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``accelerate launch`` of two processes on this machine's processor, with torch's launcher on a free port."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "mome_utils", "train", *arguments,
    ]
    environment = os.environ | {
        "MOME_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by one process and by two, by name: (alone, together)."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOME_ARTIFACTS", str(folder))
        study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
        study.build_data()
        teacher = study.runs([recipes.teacher_spec(study, 0)])
        study.cache_teachers(teacher)
    student = recipes.student_spec(study, "en", "fixed", 0)
    specs = {
        "teacher": teacher[0].spec,
        "adaptive": dataclasses.replace(student, objective=Objective("reverse_kl", "uncertainty"), snapshots=()),
        "norms": dataclasses.replace(student, objective=Objective("soft_ce", "gradient_norm"), snapshots=()),
        "released": recipes.student_spec(study, "en", "as_released", 0),
        "mixture": recipes.moe_spec(study, "moe_ce", 0),
    }
    files, arguments = folder / "specs", []
    files.mkdir()
    for name, spec in specs.items():
        (files / f"{name}.json").write_text(canonical_json(dataclasses.replace(spec, processes=2)), encoding="utf-8")
        arguments += ["--spec", str(files / f"{name}.json")]
    settings = [part for name, value in TINY.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    done = launched(folder, "--profile", "smoke", "--languages", "en,py", *settings, *arguments)
    assert done.returncode == 0, done.stderr[-9000:]
    found: dict = {"study": study}
    for name, spec in specs.items():
        together = read_spec(files / f"{name}.json")
        assert f"{run_key(together)}: " in done.stdout
        folder_of = study.store.load("runs", run_key(together))
        assert folder_of is not None
        found[name] = (train_or_load(spec, study.store, study.data()), Run(together, run_key(together), folder_of))
    assert len(done.stdout.splitlines()) == len(specs), "the main process alone reports"
    return found


def test_the_main_process_makes_the_teacher_that_notebooks_find(runs, monkeypatch):
    study = runs["study"]
    monkeypatch.setenv("MOME_ARTIFACTS", str(study.store.root.parent))
    settings = dict(profile="smoke", languages=["en", "py"])
    told = Study.open("test", **settings, overrides=TINY | {"teacher_processes": 2}, quiet=True)
    assert run_key(recipes.teacher_spec(told, 0)) == runs["teacher"][1].key
    (line,) = train_together(settings | {"overrides": TINY}, seed=0)  # one process: the teacher of the other tests
    assert line.startswith(f"{runs['teacher'][0].key}: ") and line.endswith("by 1 process.")


@pytest.mark.parametrize("name", ["teacher", "adaptive", "norms", "released", "mixture"])
def test_two_processes_train_as_one_does(runs, name):
    alone, together = runs[name]
    assert alone.key != together.key, "the last digits differ, so the names do"
    assert together.metrics["step"] == alone.metrics["step"]
    assert (together.folder / LOG).read_text(encoding="utf-8").count("started: ") == 1
    one, two = alone.history(), together.history()
    assert list(one) == list(two) and len(one) == alone.spec.steps
    np.testing.assert_allclose(two.to_numpy(), one.to_numpy(), **TOLERANCE)
    files = sorted(path.name for path in alone.folder.glob("*.safetensors"))  # a mixture has several
    assert files and files == sorted(path.name for path in together.folder.glob("*.safetensors"))
    for file in files:
        torch.testing.assert_close(load_file(together.folder / file), load_file(alone.folder / file), **WEIGHTS)


def test_each_process_takes_its_part_of_every_batch():
    for parts, count in ((1, 2), (4, 2), (2, 4), (4, 4), (6, 3)):
        shares = [Share(parts, count, rank) for rank in range(count)]
        held = [part for share in shares for part in range(parts)[share.mine]]
        assert held == sorted(held) and {held.count(part) for part in range(parts)} == {shares[0].holders}
        assert Share(parts).mine == slice(0, parts) and Share(parts).whole([[1.0] * parts], None) == [[1.0] * parts]
    with pytest.raises(MomeError, match="3 micro-batches cannot be shared by 2 processes"):
        Share(3, 2)


def test_what_cannot_be_shared_is_refused_in_a_sentence(runs):
    student, teacher = runs["released"][0].spec, runs["teacher"][0].spec
    with pytest.raises(MomeError, match="A batch of 4 sequences cannot be shared equally by 3 processes"):
        dataclasses.replace(teacher, processes=3)
    with pytest.raises(MomeError, match="looks at whole micro-batches, 4 in a batch"):
        dataclasses.replace(student, processes=8, batch_size=16)
    with pytest.raises(MomeError, match="is not compiled"):
        dataclasses.replace(teacher, processes=2, compiled=True)
    with pytest.raises(MomeError, match="belongs to 2 processes, and 1 would train it.*--num_processes 2"):
        check_processes(2, 1)
    with pytest.raises(MomeError, match="belongs to 1 process, and 2 would train it.*alone"):
        check_processes(1, 2)


def test_files_that_are_no_spec_of_this_study_are_refused(runs, tmp_path, monkeypatch):
    study, spec = runs["study"], runs["teacher"][0].spec
    monkeypatch.setenv("MOME_ARTIFACTS", str(study.store.root.parent))
    assert read_spec(runs["adaptive"][0].folder / "manifest.json") == runs["adaptive"][0].spec
    (tmp_path / "half.json").write_text('{"parameters": {"steps": 3}}', encoding="utf-8")
    for name in ("absent.json", "half.json"):
        with pytest.raises(MomeError, match="cannot be read as the spec of a run"):
            read_spec(tmp_path / name)
    other = tmp_path / "other.json"
    settings = dict(profile="smoke", languages=["en", "py"], overrides=TINY)
    for change, match in (({"data": "another"}, "of another data set"), ({"processes": 2}, "belongs to 2 processes")):
        other.write_text(canonical_json(dataclasses.replace(spec, **change)), encoding="utf-8")
        with pytest.raises(MomeError, match=match):
            list(train_together(settings, files=[other]))


@pytest.mark.parametrize("name", ["accelerate_fsdp", "accelerate_multinode"])
def test_accelerate_reads_the_launch_configurations(name, monkeypatch):
    file = ROOT / "mome_utils" / "configs" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(file))  # it refuses settings that it does not know
    arguments, *_ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(["--config_file", str(file), "-m", "mome_utils", "train"])
    )
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    if name == "accelerate_multinode":
        assert (config.distributed_type, arguments.multi_gpu) == (DistributedType.MULTI_GPU, True)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 0)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "127.0.0.1:29500")
        return
    assert (config.distributed_type, arguments.use_fsdp, arguments.nproc_per_node) == (DistributedType.FSDP, True, "8")
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()  # as the launched processes make it
    check_shards("gpt2", plugin)
    assert plugin.transformer_cls_names_to_wrap == ["GPT2Block"] and plugin.reshard_after_forward is True
    with pytest.raises(MomeError, match="A mixture is not trained in shards"):
        check_shards("jeet", plugin)
    plugin.fsdp_version = 1
    with pytest.raises(MomeError, match="fsdp_version: 2"):
        check_shards("gpt2", plugin)
