"""Splits and balance: the promises hold for any documents, or there is one clear sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mome_utils.balance import (
    BalanceError,
    SplitError,
    balance,
    common_only,
    difference_percent,
    prefix_lengths,
    split_topics,
)
from mome_utils.corpus import Document, load_corpus


def count(texts: Sequence[str]) -> list[int]:
    """Words, and one for each end of the document."""
    return [len(text.split()) + 2 for text in texts]


def totals(documents: Sequence[Document]) -> dict[str, int]:
    result: dict[str, int] = {}
    for d, tokens in zip(documents, count([d.text for d in documents]), strict=True):
        result[d.language] = result.get(d.language, 0) + tokens
    return result


TEXTS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda n: "\n\n".join("w " * k for k in n))


@st.composite
def corpora(draw: st.DrawFn, aligned: bool) -> list[Document]:
    languages = draw(st.integers(2, 4))
    size = draw(st.integers(1, 12))
    documents = []
    for code in range(languages):
        for i in range(size if aligned else draw(st.integers(1, 12))):
            key = f"{i}" if aligned else f"{code}-{i}"
            documents.append(Document(key, f"l{code}", "", "", draw(TEXTS)))
    return documents


BOUNDS = st.sampled_from([0.0, 1.0, 5.0, 25.0, 100.0])


@given(st.one_of(corpora(aligned=True), corpora(aligned=False)), BOUNDS, st.booleans(), st.integers(0, 3))
def test_the_bound_is_never_exceeded(
    documents: list[Document], bound: float, common: bool, seed: int
) -> None:
    try:
        kept = balance(documents, count, bound, common=common, seed=seed)
    except BalanceError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return
    after = totals(kept)
    assert set(after) == {d.language for d in documents}, "no language may vanish"
    assert max(after.values()) <= (1 + bound / 100) * min(after.values())


def test_a_faster_count_of_prefixes_changes_nothing() -> None:
    documents = load_corpus(topics=12).documents

    def prefixes(texts: Sequence[str], ends: Sequence[Sequence[int]]) -> list[list[int]]:
        asked.extend(texts)
        return [count([text[:end] for end in own]) for text, own in zip(texts, ends, strict=True)]

    asked: list[str] = []
    kept = balance(documents, count, 5, common=True, seed=0, count_prefixes=prefixes)
    assert kept == balance(documents, count, 5, common=True, seed=0) and sorted(asked) == sorted(
        d.text for d in documents
    )


@given(corpora(aligned=True), BOUNDS)
def test_aligned_topics_stay_aligned_and_cuts_are_prefixes(documents: list[Document], bound: float) -> None:
    try:
        kept = balance(documents, count, bound, common=True, seed=0)
    except BalanceError:
        assume(False)
    old = {(d.language, d.id): d.text for d in documents}
    assert [(d.language, d.id) for d in kept] == list(old), "every topic stays, in every language, in order"
    for d in kept:
        whole = old[d.language, d.id]
        assert whole.startswith(d.text) and len(d.text) in prefix_lengths(whole, d.language)
        assert d.text.strip()


@given(corpora(aligned=False), BOUNDS, st.integers(0, 3))
def test_unaligned_documents_are_chosen_whole(documents: list[Document], bound: float, seed: int) -> None:
    try:
        kept = balance(documents, count, bound, common=False, seed=seed)
    except BalanceError:
        assume(False)
    assert kept == [d for d in documents if d in kept]
    assert kept == balance(documents, count, bound, common=False, seed=seed)


@given(corpora(aligned=True), st.integers(0, 3))
def test_what_is_balanced_already_is_left_alone(documents: list[Document], seed: int) -> None:
    bound = difference_percent(totals(documents)) + 1e-6
    for common in (True, False):
        assert balance(documents, count, bound, common=common, seed=seed) == documents


def test_many_short_documents_always_balance() -> None:
    documents = [Document(f"{i}", "small", "", "", "w " * 5) for i in range(100)]
    documents += [Document(f"{i}", "large", "", "", "\n\n".join(["w " * 5] * 3)) for i in range(100)]
    for common in (True, False):
        after = totals(balance(documents, count, 2, common=common, seed=0))
        assert after["small"] == 700 and 700 <= after["large"] <= 714


def test_choosing_fills_up_to_the_bound() -> None:
    documents = [Document(f"s{i}", "small", "", "", "w " * 98) for i in range(10)]
    documents += [Document(f"l{i}", "large", "", "", "w " * (8 + i % 5)) for i in range(500)]
    after = totals(balance(documents, count, 5, common=False, seed=1))
    assert after["small"] == 1000 and 1035 < after["large"] <= 1050


def test_the_longest_documents_are_cut_first() -> None:
    documents = [Document(key, "aa", "", "", "w " * 10) for key in "xy"]
    documents += [
        Document("x", "bb", "", "", "w " * 10 + "\n\n" + "w " * 9),
        Document("y", "bb", "", "", "w " * 5 + "\n\n" + "w " * 5),
    ]
    kept = {(d.language, d.id): d.text for d in balance(documents, count, 5, common=True, seed=0)}
    assert kept["bb", "x"] == "w " * 10 + "\n" and kept["bb", "y"] == documents[3].text


def test_a_bound_that_cannot_be_met_says_what_could_be() -> None:
    documents = [Document("x", "aa", "", "", "w " * 8), Document("x", "bb", "", "", "w " * 18)]
    for common in (True, False):
        with pytest.raises(BalanceError, match=r"max_diff_percent=5: the best possible is 100\.00 percent"):
            balance(documents, count, 5, common=common, seed=0)


def test_no_common_documents() -> None:
    documents = [Document("x", "aa", "", "", "w"), Document("y", "bb", "", "", "w")]
    with pytest.raises(BalanceError, match="aa, bb"):
        balance(documents, count, 5, common=True, seed=0)
    with pytest.raises(BalanceError, match="aa, bb"):
        common_only(documents)


@pytest.mark.parametrize("bound", [-1.0, float("nan"), float("inf")])
def test_a_senseless_bound(bound: float) -> None:
    with pytest.raises(BalanceError, match="max_diff_percent"):
        balance(load_corpus(topics=3).documents, count, bound, common=True, seed=0)


def test_one_language_cannot_be_balanced() -> None:
    with pytest.raises(BalanceError, match="2 languages"):
        balance([Document("x", "aa", "", "", "w")], count, 5, common=False, seed=0)


FRACTIONS = st.floats(0.05, 0.45)


@given(st.sets(st.text(max_size=5), min_size=3, max_size=60), FRACTIONS, FRACTIONS, st.integers(0, 9))
def test_split_covers_every_topic_once(ids: set[str], val: float, test: float, seed: int) -> None:
    split = split_topics(sorted(ids), val, test, seed)
    assert set(split) == ids and set(split.values()) == {"train", "validation", "test"}
    assert split == split_topics(sorted(ids, reverse=True) * 2, val, test, seed), (
        "order and repeats change nothing"
    )
    held = [name for name in split.values() if name == "test"]
    assert abs(len(held) - len(ids) * test) <= 1


def test_split_depends_on_the_seed() -> None:
    ids = [str(i) for i in range(50)]
    assert split_topics(ids, 0.2, 0.2, 0) != split_topics(ids, 0.2, 0.2, 1)


def test_strata_are_split_by_themselves() -> None:
    ids = [f"{code}{i}" for code in "ab" for i in range(10)]
    split = split_topics(ids, 0.1, 0.1, 0, strata={key: key[0] for key in ids})
    for code in "ab":
        assert {name for key, name in split.items() if key[0] == code} == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("ids", "val", "test"), [(["a", "b"], 0.1, 0.1), (list("abcd"), 0, 0.1), (list("abcd"), 0.6, 0.5)]
)
def test_impossible_splits(ids: list[str], val: float, test: float) -> None:
    with pytest.raises(SplitError):
        split_topics(ids, val, test, 0)
