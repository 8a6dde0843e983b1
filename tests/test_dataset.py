"""The data set on disk: complete, balanced, the same every time, and refused when damaged. And its
exports.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mome_utils.artifacts import DamagedArtifact, file_digest
from mome_utils.balance import BalanceError
from mome_utils.config import Profile, load_profile
from mome_utils.corpus import Corpus, Document, load_corpus
from mome_utils.dataset import DataError, StudyData, build_dataset, pack
from mome_utils.duplicates import duplicates_across, near_duplicates
from mome_utils.resource import ExportError, create_resource, export
from mome_utils.tokenization import encode, token_counts, train_tokenizer

CORPUS = load_corpus(topics=30)
PROFILE = load_profile("smoke", {"topics": 30, "vocab_size": 400, "block_size": 32, "stride": 16})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("data") / "set"
    build_dataset(CORPUS, PROFILE, target)
    return target


@pytest.fixture(scope="module")
def data(path: Path) -> StudyData:
    return StudyData.load(path)


def test_building_twice_gives_the_same(data: StudyData, tmp_path: Path) -> None:
    build_dataset(CORPUS, PROFILE, tmp_path / "again")
    again = StudyData.load(tmp_path / "again")
    assert again.fingerprint == data.fingerprint
    assert again.table.equals(data.table)
    for split in ("train", "validation", "test"):
        for code in data.languages:
            assert (again.block_array(split, code) == data.block_array(split, code)).all()


def test_the_fingerprint_follows_what_decides_the_data(tmp_path: Path) -> None:
    corpus = load_corpus(topics=6)
    base = dataclasses.replace(PROFILE, max_diff_percent=60.0)
    changes = [{}, {"max_diff_percent": 61.0}, {"block_size": 40}, {"vocab_size": 420}, {"teacher_lr": 1.0}]
    found = []
    for number, change in enumerate(changes):
        build_dataset(corpus, dataclasses.replace(base, **change), tmp_path / str(number))
        found.append(StudyData.load(tmp_path / str(number)).fingerprint)
    assert len(set(found)) == 4 and found[-1] == found[0], "a learning rate does not concern the data"


def test_no_topic_is_in_two_splits(data: StudyData) -> None:
    ids = {split: {d.id for d in data.documents(split)} for split in ("train", "validation", "test")}
    assert sum(len(found) for found in ids.values()) == len(set.union(*ids.values())) == 30
    for split, found in ids.items():
        for code in data.languages:
            assert {d.id for d in data.documents(split, code)} == found


def test_every_split_and_the_whole_are_within_the_bound(data: StudyData) -> None:
    sums = dict.fromkeys(data.languages, 0)
    for split in ("train", "validation", "test"):
        counts = {
            code: sum(token_counts(data.tokenizer, [d.text for d in data.documents(split, code)]))
            for code in data.languages
        }
        assert max(counts.values()) <= 1.05 * min(counts.values())
        recorded = data.statistics.query("split == @split").set_index("language")["tokens"]
        assert recorded.to_dict() == counts
        sums = {code: sums[code] + counts[code] for code in sums}
    assert max(sums.values()) <= 1.05 * min(sums.values())
    before = data.statistics["difference_percent_before"]
    assert (before > 5).all(), "the corpus must need balancing, or this test shows nothing"


def test_the_tokenizer_saw_the_training_split_only(data: StudyData) -> None:
    train = {d.id for d in data.documents("train")}
    expected = train_tokenizer((d.text for d in CORPUS.documents if d.id in train), PROFILE.vocab_size)
    assert expected.backend_tokenizer.to_str() == data.tokenizer.backend_tokenizer.to_str()
    assert data.vocab_size == len(data.tokenizer) == 400


def test_blocks_are_the_documents_laid_end_to_end(data: StudyData) -> None:
    array = data.block_array("train", "de")
    assert array.dtype == np.int32 and array.shape[1] == data.block_size and not array.flags.writeable
    stored = data.blocks("train", "de")
    assert (np.array(stored["input_ids"]) == array).all()
    texts = {d.id: d.text for d in data.documents("train", "de")}
    order = list(dict.fromkeys(key for names in stored["documents"] for key in names))
    stream: list[int] = []
    for key in order:
        stream += [1, *encode(data.tokenizer, [texts[key]])[0], 2]
    assert (array.ravel() == stream[: array.size]).all()
    assert len(texts) - len(order) <= 1 and data.lengths("train")["de"] == len(array)


def test_blocks_name_the_documents_they_touch() -> None:
    tokenizer = train_tokenizer(["x"], 259)
    documents = [
        Document("a", "l", "", "", "123"),
        Document("b", "l", "", "", "4"),
        Document("c", "l", "", "", "56"),
    ]
    blocks, names = pack(documents, tokenizer, 4)
    assert blocks[:, 0].tolist()[0] == 1 and blocks.shape == (3, 4)
    assert names == [["a"], ["a", "b"], ["c"]]


def test_a_different_corpus_has_any_languages(tmp_path: Path) -> None:
    rows = {
        "zh": [Document(f"{i}", "zh", "", "", f"第{i}段。\n\n" * 30) for i in range(12)],
        "rs": [Document(f"{i}", "rs", "", "", f"fn f{i}() {{}}\n\n" * 40) for i in range(12)],
    }
    corpus = Corpus("two", ("zh", "rs"), tuple(d for docs in rows.values() for d in docs))
    build_dataset(corpus, PROFILE, tmp_path / "set")
    assert StudyData.load(tmp_path / "set").languages == ("zh", "rs")


def test_unaligned_documents(tmp_path: Path) -> None:
    documents = tuple(dataclasses.replace(d, id=f"{d.language}-{d.id}") for d in CORPUS.documents)
    corpus = Corpus("unaligned", CORPUS.languages, documents)
    with pytest.raises(BalanceError, match="en, fr, de, py|de, en, fr, py"):
        build_dataset(corpus, PROFILE, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    wide: Profile = dataclasses.replace(PROFILE, common_documents=False, max_diff_percent=40.0)
    build_dataset(corpus, wide, tmp_path / "set")
    data = StudyData.load(tmp_path / "set")
    assert (data.statistics["difference_percent"] <= 40).all() and (data.statistics["cut"] == 0).all()


def test_too_little_text_for_a_block(tmp_path: Path) -> None:
    corpus = Corpus(
        "tiny",
        ("aa", "bb"),
        tuple(Document(f"{i}", c, "", "", "word") for c in ("aa", "bb") for i in range(9)),
    )
    with pytest.raises(DataError, match="less than one block"):
        build_dataset(corpus, PROFILE, tmp_path / "set")


def test_asking_for_what_is_not_there(data: StudyData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="validation"):
        data.documents("dev")
    with pytest.raises(DataError, match="'xx'"):
        data.blocks("train", "xx")
    with pytest.raises(DataError, match="01_dataset_creation"):
        StudyData.load(tmp_path / "nothing")


@pytest.mark.parametrize("part", ["dataset.json", "documents.parquet", "tokenizer", "blocks/test/py"])
def test_a_missing_part_is_noticed(path: Path, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    target = copy / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(DamagedArtifact, match="01_dataset_creation"):
        StudyData.load(copy)


def test_damage_is_noticed(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    StudyData.load(copy).verify()
    (copy / "documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedArtifact, match=r"documents\.parquet"):
        StudyData.load(copy).documents("train")
    arrow = next((copy / "blocks" / "train" / "en").glob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    at = content.index(np.array(StudyData.load(path).block_array("train", "en")[0]).tobytes())
    content[at : at + 4] = b"\x07\0\0\0"
    arrow.write_bytes(content)
    with pytest.raises(DamagedArtifact, match="blocks/train/en"):
        StudyData.load(copy).verify()
    arrow.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedArtifact, match="blocks/train/en"):
        StudyData.load(copy).block_array("train", "en")


def test_duplicates_are_found_and_translations_are_not() -> None:
    words = [f"w{i}" for i in range(60)]
    original = Document("a", "en", "", "", " ".join(words))
    edited = Document("b", "en", "", "", " ".join([*words[:-4], "x", "y", "z", "q"]))
    copied = Document("c", "en", "", "", " ".join(words).upper())
    other = Document("d", "en", "", "", " ".join(reversed(words)))
    found = near_duplicates([original], [edited, copied, other, original], 0.5)
    assert list(found["b"]) == ["c", "b"] and list(found["exact"]) == [True, False]
    assert found["jaccard"].iloc[1] == pytest.approx(52 / 60)
    across = duplicates_across({"train": [original], "test": [copied], "validation": [other]}, 0.9)
    assert across[["splits", "a", "b"]].to_numpy().tolist() == [["train, test", "a", "c"]]


def test_the_splits_of_the_corpus_share_no_text(data: StudyData) -> None:
    splits = {name: data.documents(name) for name in ("train", "validation", "test")}
    assert not len(duplicates_across(splits, 0.5))


def test_export_reads_back(tmp_path: Path) -> None:
    for code, kind in (("en", "jsonl"), ("fr", "parquet")):
        entry = export(CORPUS.of_language(code), tmp_path / f"{code}.{kind}", kind)  # type: ignore[arg-type]
        assert entry["sha256"] == file_digest(tmp_path / f"{code}.{kind}") and entry["documents"] == 30
        assert json.loads((tmp_path / f"{code}.{kind}.manifest.json").read_text()) == entry
    back = load_corpus(str(tmp_path))
    assert back.documents == CORPUS.of_language("en") + CORPUS.of_language("fr")
    with pytest.raises(ExportError, match="csv"):
        export(CORPUS.documents, tmp_path / "x.csv", "csv")  # type: ignore[arg-type]


def test_resource_is_whole_and_balanced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = create_resource(CORPUS, max_diff_percent=3, common=True, vocab_size=400, out=out)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert all(file_digest(out / name) == entry["sha256"] for name, entry in manifest["files"].items())
    assert {p.name for p in (out / "test").iterdir()} == {
        f"{c}.{k}" for c in CORPUS.languages for k in ("parquet", "jsonl")
    }
    for split in ("train", "validation", "test"):
        tokens = [row["tokens"] for row in manifest["counts"] if row["split"] == split]
        assert max(tokens) <= 1.03 * min(tokens) and manifest["difference_percent"][split] <= 3
    with pytest.raises(ExportError, match="'out' exists"):
        create_resource(CORPUS, max_diff_percent=3, common=True, vocab_size=400, out=out)


def test_a_resource_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BalanceError):
        create_resource(CORPUS, max_diff_percent=0, common=False, vocab_size=400, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
