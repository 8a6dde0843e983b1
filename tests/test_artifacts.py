"""The store: keys, integrity, and writes that are whole or not there."""

import json
import sys

import pytest

from mome_utils.artifacts import (
    DamagedArtifact,
    MissingArtifact,
    Store,
    digest,
    read_manifest,
    source_digest,
    write_atomic,
    write_folder_atomic,
)
from mome_utils.config import Shape


def make(store, key="k", text="content"):
    with store.create("stage", key, inputs={"from": "x"}, parameters={"a": 1}, modules=["mome_utils.models"]) as result:
        (result.folder / "sub").mkdir()
        (result.folder / "sub" / "file.txt").write_text(text, encoding="utf-8")
        result.metrics["score"] = 0.5


def test_digest_follows_values_not_order():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})
    assert digest(Shape(1, 2, 1)) != digest(Shape(2, 2, 1))
    with pytest.raises(TypeError):
        digest({"f": open})


def test_a_finished_result_loads_and_tells_what_it_is(tmp_path):
    store = Store(tmp_path)
    assert store.load("stage", "k") is None
    make(store)
    folder = store.load("stage", "k")
    manifest = read_manifest(folder)
    assert manifest.metrics == {"score": 0.5} and manifest.inputs == {"from": "x"}
    assert list(manifest.files) == ["sub/file.txt"]
    assert manifest.is_current()


def test_missing_result_names_the_notebook(tmp_path):
    with pytest.raises(MissingArtifact, match=r"run notebooks/02_teacher_training\.ipynb first"):
        Store(tmp_path).require("runs", "k", notebook="02_teacher_training")


@pytest.mark.parametrize("damage", ["change", "truncate", "delete", "manifest"])
def test_damage_is_seen(tmp_path, damage):
    store = Store(tmp_path)
    make(store)
    file = store.path("stage", "k") / "sub" / "file.txt"
    if damage == "change":
        file.write_text("CONTENT", encoding="utf-8")
    elif damage == "truncate":
        file.write_text("", encoding="utf-8")
    elif damage == "delete":
        file.unlink()
    else:
        (store.path("stage", "k") / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DamagedArtifact, match="delete that folder and run its notebook again"):
        store.load("stage", "k")


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    store = Store(tmp_path)
    make(store, text="old")
    with pytest.raises(RuntimeError):
        with store.create("stage", "k", inputs={}, parameters={}, modules=[]) as result:
            (result.folder / "half").write_text("half", encoding="utf-8")
            raise RuntimeError
    assert (store.load("stage", "k") / "sub" / "file.txt").read_text(encoding="utf-8") == "old"
    assert [p.name for p in (tmp_path / "stage").iterdir()] == ["k"]
    with pytest.raises(ZeroDivisionError), write_folder_atomic(tmp_path / "new"):
        _ = 1 / 0
    assert not (tmp_path / "new").exists()


def test_write_atomic_replaces(tmp_path):
    write_atomic(tmp_path / "a" / "b.json", json.dumps([1]))
    write_atomic(tmp_path / "a" / "b.json", b"[2]")
    assert (tmp_path / "a" / "b.json").read_bytes() == b"[2]"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_source_digest_sees_code_and_not_prose(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "digest_probe.py"

    def now(text):
        module.write_text(text, encoding="utf-8")
        return source_digest("digest_probe")

    first = now('"""One."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert first == now('"""Two."""\n# a comment\ndef f(x):\n    """Other."""\n    return x + 1  # why\n')
    assert first != now('"""One."""\ndef f(x):\n    """Doc."""\n    return x + 2\n')
    assert "digest_probe" not in sys.modules, "sources are read, not imported"


def test_a_source_that_is_declared_to_give_the_same_numbers_keeps_their_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "digest_probe.py").write_text("x = 1", encoding="utf-8")
    own = source_digest("digest_probe")
    monkeypatch.setattr("mome_utils.artifacts.SAME_NUMBERS", {own: "0123456789abcdef"})
    assert source_digest("digest_probe") == "0123456789abcdef"
    (tmp_path / "digest_probe.py").write_text("x = 2", encoding="utf-8")
    assert source_digest("digest_probe") not in (own, "0123456789abcdef")
