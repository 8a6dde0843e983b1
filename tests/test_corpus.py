"""Reading corpora, refusing what cannot be used, and cutting texts into units."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mome_utils.config import MomeError
from mome_utils.corpus import Corpus, CorpusError, load_corpus, units


def write_jsonl(path: Path, *records: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same two topics in three languages and three forms."""
    write_jsonl(tmp_path / "en.jsonl", {"id": "b", "text": "Bee."}, {"id": "a", "text": "Ant.", "group": "g"})
    pd.DataFrame({"id": ["a", "b"], "text": ["Fourmi.", "Abeille."]}).to_parquet(tmp_path / "fr.parquet")
    (tmp_path / "zh").mkdir()
    (tmp_path / "zh" / "a.txt").write_text("蚂蚁。\n", encoding="utf-8")
    (tmp_path / "zh" / "b.txt").write_text("蜜蜂。\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a language")
    return tmp_path


def test_embedded_corpus_is_aligned_and_ordered() -> None:
    corpus = load_corpus()
    assert corpus.languages == ("en", "fr", "de", "py")
    ids = [[d.id for d in corpus.of_language(code)] for code in corpus.languages]
    assert all(one == ids[0] and one == sorted(one) for one in ids)
    assert len(ids[0]) == 400


def test_topics_are_spread_over_groups() -> None:
    corpus = load_corpus(topics=40)
    for code in corpus.languages:
        groups = [d.group for d in corpus.of_language(code)]
        assert len(groups) == 40 and {groups.count(g) for g in groups} == {2}
    assert len({tuple(d.id for d in corpus.of_language(c)) for c in corpus.languages}) == 1


def test_topics_of_an_unaligned_corpus_keep_every_language(tmp_path: Path) -> None:
    for code in ("aa", "bb"):
        write_jsonl(tmp_path / f"{code}.jsonl", *({"text": f"{code} {i}"} for i in range(9)))
    corpus = load_corpus(str(tmp_path), topics=4)
    assert [len(corpus.of_language(code)) for code in corpus.languages] == [4, 4]


def test_three_forms_are_read_alike(folder: Path) -> None:
    corpus = load_corpus(str(folder))
    assert corpus.languages == ("en", "fr", "zh")
    assert [[d.id for d in corpus.of_language(code)] for code in corpus.languages] == [["a", "b"]] * 3
    assert corpus.of_language("en")[0].group == "g" and corpus.of_language("zh")[1].text == "蜜蜂。\n"


def test_languages_choose_and_order(folder: Path) -> None:
    assert load_corpus(str(folder), ["zh", "en"]).languages == ("zh", "en")


def test_records_without_id_are_not_aligned(tmp_path: Path) -> None:
    for code in ("aa", "bb"):
        write_jsonl(tmp_path / f"{code}.jsonl", {"text": "x"}, {"text": "y"})
    ids = {d.id for d in load_corpus(str(tmp_path)).documents}
    assert len(ids) == 4


def test_fingerprint_follows_the_content(folder: Path) -> None:
    first = load_corpus(str(folder)).fingerprint
    assert load_corpus(str(folder)).fingerprint == first
    (folder / "zh" / "a.txt").write_text("蚂蚁!\n", encoding="utf-8")
    assert load_corpus(str(folder)).fingerprint != first
    assert load_corpus(str(folder), ["en", "fr"]).fingerprint != first


def one_sentence(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    text = str(error.value)
    assert isinstance(error.value, MomeError) and "\n" not in text and text.endswith(".")
    assert all(word in text for word in words), text


def test_missing_folder() -> None:
    with pytest.raises(CorpusError) as error:
        load_corpus("no/such/folder")
    one_sentence(error, "no/such/folder", "does not exist")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_file(folder: Path, content: bytes) -> None:
    (folder / "en.jsonl").write_bytes(content)
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "en.jsonl", "empty")


def test_empty_text_file(folder: Path) -> None:
    (folder / "zh" / "a.txt").write_bytes(b"")
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "a.txt", "empty")


@pytest.mark.parametrize("name", ["en.jsonl", "zh/a.txt"])
def test_not_utf8(folder: Path, name: str) -> None:
    (folder / name).write_bytes('{"text": "café"}'.encode("latin-1"))
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "UTF-8", Path(name).name)


def test_half_a_surrogate_is_not_utf8(folder: Path) -> None:
    (folder / "en.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "UTF-8", "line 1")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ('{"id": "a"}', "no text"),
        ("[1]", "no text"),
        ('{"text": " "}', "empty"),
        ('{"text": 3}', "no text"),
    ],
)
def test_bad_record(folder: Path, line: str, word: str) -> None:
    (folder / "en.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "line 2", word)


def test_damaged_parquet(folder: Path) -> None:
    (folder / "fr.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "fr.parquet")


def test_duplicate_ids(folder: Path) -> None:
    write_jsonl(folder / "en.jsonl", {"id": 7, "text": "x"}, {"id": "7", "text": "y"})
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "'7'", "twice")


def test_fewer_than_two_languages(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder), ["en"])
    one_sentence(error, "at least 2 languages")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError) as error:
        load_corpus(str(tmp_path / "empty"))
    one_sentence(error, "at least 2 languages")


def test_unknown_and_repeated_language(folder: Path) -> None:
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder), ["en", "xx"])
    one_sentence(error, "'xx'", "en, fr, zh")
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder), ["en", "en"])
    one_sentence(error, "twice")


def test_two_sources_of_one_language(folder: Path) -> None:
    write_jsonl(folder / "fr.jsonl", {"text": "x"})
    with pytest.raises(CorpusError) as error:
        load_corpus(str(folder))
    one_sentence(error, "fr.jsonl", "fr.parquet")


def test_of_language_refuses_a_stranger() -> None:
    with pytest.raises(CorpusError):
        Corpus("c", ("en", "fr"), ()).of_language("de")


@given(
    st.text(alphabet=st.sampled_from("ab \t\r\n\x0c\u2028#:;\\\"'()=é"), max_size=60),
    st.sampled_from(["en", "py"]),
)
def test_units_join_to_the_text(text: str, language: str) -> None:
    pieces = units(text, language)
    assert "".join(pieces) == text
    assert all(pieces)


def test_units_of_the_whole_corpus() -> None:
    for d in load_corpus().documents:
        pieces = units(d.text, d.language)
        assert "".join(pieces) == d.text and len(pieces) > 1
        if d.language == "py":
            for k in range(1, len(pieces) + 1):
                ast.parse("".join(pieces[:k]))
        else:
            assert len(pieces) == d.text.count("\n\n") + 1


def test_python_units_are_top_level_statements() -> None:
    source = (
        '"""Doc."""\n\nimport os\n\n# about f\n@cache\ndef f():\n    x = 1\n\n    return x\n\na = 1; b = 2\n'
    )
    assert units(source, "py") == [
        '"""Doc."""\n\n',
        "import os\n\n",
        "# about f\n@cache\ndef f():\n    x = 1\n\n    return x\n\n",
        "a = 1; b = 2\n",
    ]


def test_source_that_does_not_parse_is_cut_like_prose() -> None:
    assert units("def f(:\n\nrest\n", "py") == ["def f(:\n\n", "rest\n"]


def test_prose_without_empty_lines_is_cut_at_lines() -> None:
    assert units("one\ntwo\nthree", "en") == ["one\n", "two\n", "three"]
    assert units("one line", "en") == ["one line"]
