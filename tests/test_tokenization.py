"""The tokenizer loses nothing, is the same every time, and its measures say what they claim."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mome_utils.corpus import Document, load_corpus
from mome_utils.tokenization import (
    TokenizerError,
    TokenReader,
    coverage,
    encode,
    encode_speed,
    fertility,
    token_counts,
    train_tokenizer,
)

DOCUMENTS = load_corpus(topics=20).documents
TOKENIZER = train_tokenizer((d.text for d in DOCUMENTS), 512)


@given(st.text(max_size=80))
def test_nothing_is_lost(text: str) -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, [text])[0]) == text


def test_every_document_survives_and_none_needs_unk() -> None:
    for d, ids in zip(DOCUMENTS, encode(TOKENIZER, [d.text for d in DOCUMENTS]), strict=True):
        assert TOKENIZER.decode(ids) == d.text
        assert TOKENIZER.unk_token_id not in ids


def test_special_tokens_are_those_of_the_paper() -> None:
    assert (TOKENIZER.unk_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<unk>", "<s>", "</s>")
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == 2
    assert len(TOKENIZER) == 512


def test_a_text_cannot_forge_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for tokenizer in (TOKENIZER, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        ids = encode(tokenizer, ["a <s> b </s> <unk>"])[0]
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == "a <s> b </s> <unk>"


def test_training_is_deterministic() -> None:
    again = train_tokenizer((d.text for d in DOCUMENTS), 512)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_counts_include_begin_and_end() -> None:
    assert token_counts(TOKENIZER, ["", "a"]) == [2, 3]
    assert token_counts(TOKENIZER, []) == []


@given(st.lists(st.one_of(
    st.text(max_size=30), st.text("ab1 '\n\u00a0é蚂rels-", max_size=60), st.sampled_from([d.text for d in DOCUMENTS])
), max_size=3), st.data())
def test_counts_of_prefixes_are_those_of_the_prefixes_alone(texts: list[str], data: st.DataObject) -> None:
    ends = [data.draw(st.lists(st.integers(0, len(text)), max_size=8)) for text in texts]
    expected = [token_counts(TOKENIZER, [text[:end] for end in own]) for text, own in zip(texts, ends, strict=True)]
    reader = TokenReader(TOKENIZER)
    assert reader.prefix_counts(texts, ends) == expected
    assert reader.counts(texts) == token_counts(TOKENIZER, texts)


def test_a_text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, texts = TokenReader(TOKENIZER), [d.text for d in DOCUMENTS[:3]]
    first = reader.ids(texts)
    assert [ids.tolist() for ids in first] == encode(TOKENIZER, texts)
    monkeypatch.setattr("mome_utils.tokenization.encode", lambda tokenizer, new: [pytest.fail(t) for t in new])
    assert [ids.tolist() for ids in reader.ids(texts[::-1])] == [ids.tolist() for ids in first[::-1]]
    assert reader.counts(texts) == [len(ids) + 2 for ids in first]


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match="259"):
        train_tokenizer(["x"], 258)


def test_coverage() -> None:
    result = coverage(TOKENIZER, ["aab", "蚂"])
    assert result["characters"] == 4 and result["distinct"] == 3
    assert result["covered"] == 1.0
    assert result["single_token"] == pytest.approx(3 / 4)
    assert result["single_token_distinct"] == pytest.approx(2 / 3)
    assert result["split"] == "蚂"


def test_fertility_counts_by_hand() -> None:
    documents = [Document("1", "xx", "", "", "é é"), Document("1", "yy", "", "", "a b c")]
    rows = fertility(TOKENIZER, documents).set_index("language")
    assert rows.loc["xx", "bytes"] == 5 and rows.loc["xx", "words"] == 2 and rows.loc["yy", "words"] == 3
    expected = len(encode(TOKENIZER, ["é é"])[0])
    assert rows.loc["xx", "tokens"] == expected
    assert rows.loc["xx", "bytes_per_token"] == pytest.approx(5 / expected)
    assert rows.loc["xx", "tokens_per_word"] == pytest.approx(expected / 2)


def test_a_tokenizer_is_best_at_its_own_language() -> None:
    own = {
        code: train_tokenizer((d.text for d in DOCUMENTS if d.language == code), 512) for code in ("en", "py")
    }
    cost = {name: fertility(t, DOCUMENTS).set_index("language")["bytes_per_token"] for name, t in own.items()}
    assert cost["en"]["en"] > cost["py"]["en"] and cost["py"]["py"] > cost["en"]["py"]


def test_speed_is_relative_to_the_first() -> None:
    rows = encode_speed({"shared": TOKENIZER, "same": TOKENIZER}, DOCUMENTS[:4], repeats=2)
    assert set(rows["language"]) == {d.language for d in DOCUMENTS[:4]}
    assert (rows.loc[rows["tokenizer"] == "shared", "ratio"] == 1).all()
    assert (rows["megabytes_per_second"] > 0).all()
