"""Windows and their regions, and accuracy over topics: against independent computations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mome_utils.config import MomeError
from mome_utils.corpus import Document, load_corpus
from mome_utils.router_windows import (
    CODE,
    PROSE,
    TEXT_IN_CODE,
    accuracy_interval,
    document_windows,
    prefix_accuracy,
    probabilities_of,
    window_rows,
    window_table,
)
from mome_utils.routing import TokenRouter
from mome_utils.tokenization import encode, train_tokenizer

LANGUAGES = ("en", "py")
MODULE = '''"""What this small module does, in a few plain words."""

import math


def area(radius: float) -> float:
    # The well-known formula, größer als nötig: and some more words about it.
    return math.pi * radius**2
'''


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Five topics, in English and in Python."""
    whole = load_corpus(languages=LANGUAGES)
    return [d for code in whole.languages for d in whole.of_language(code)[::80]]


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    return train_tokenizer([d.text for d in documents], 500)


def router_of(weights: list[list[float]]) -> TokenRouter:
    """A router of en and py that adds up a weight per id (of a sequence scaled to length 1)."""
    router = TokenRouter(len(weights[0]), LANGUAGES)
    router.idf.fill_(1.0)
    router.weight.copy_(torch.tensor(weights))
    return router


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("size", "stride"), [(8, None), (16, 5), (7, 20)])
def test_windows_are_all_the_whole_pieces_of_each_text(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], size: int, stride: int | None
) -> None:
    windows = document_windows(tokenizer, documents, size, stride)
    at = 0
    for document in documents:
        ids = encode(tokenizer, [document.text])[0]
        start = 0
        while start + size <= len(ids):
            assert windows.ids[at].tolist() == ids[start : start + size]
            assert (windows.language[at], windows.topic[at]) == (document.language, document.id)
            assert windows.start[at] == start
            at, start = at + 1, start + (stride or size)
    assert at == len(windows) == len(windows.region)
    assert windows.ids.dtype == np.int32


def test_regions_follow_the_characters_of_strings_and_comments(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> None:
    module = Document("area", "py", "", "", MODULE)
    windows = document_windows(tokenizer, [module, documents[0]], 4, 1)
    text_marks = np.zeros(len(MODULE), dtype=bool)
    for part in ('"""What', "# The well"):
        start = MODULE.index(part)
        end = MODULE.index('"""', start + 3) + 3 if part[0] == '"' else MODULE.index("\n", start)
        text_marks[start:end] = True
    ids = encode(tokenizer, [MODULE])[0]
    # Where each token ends, found by decoding: incomplete characters at the cut are left out.
    ends = [len(tokenizer.decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids) + 1)]
    inside = []
    for n in range(len(ids)):
        own = text_marks[ends[n] : max(ends[n + 1], ends[n] + 1)]
        inside.append(own.mean() >= 0.5)
    python = windows.language == "py"
    expected = [TEXT_IN_CODE if sum(inside[n : n + 4]) > 2 else CODE for n in range(python.sum())]
    assert windows.region[python].tolist() == expected
    assert {TEXT_IN_CODE, CODE} == set(expected)
    assert set(windows.region[~python]) == {PROSE}


def test_source_that_is_not_python_is_code_from_where_it_cannot_be_read(tokenizer: PreTrainedTokenizerFast) -> None:
    comments = "# a comment of some words about the things to come\n" * 3
    broken = comments + "x = '''never closed\n" + "# more words\n" * 20
    windows = document_windows(tokenizer, [Document("a", "python", "", "", broken)], 6)
    assert windows.region[0] == TEXT_IN_CODE
    assert set(windows.region[-10:]) == {CODE}


@pytest.mark.parametrize(("size", "stride", "message"), [
    (0, None, "cannot be cut"), (4, 0, "cannot be cut"), (100_000, None, "No document has 100000 tokens"),
])
def test_windows_that_cannot_be_cut(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], size: int, stride: int | None, message: str
) -> None:
    with pytest.raises(MomeError, match=message):
        document_windows(tokenizer, documents, size, stride)
    with pytest.raises(MomeError, match="No document"):
        document_windows(tokenizer, [], 4)


# ---------------------------------------------------------------------------------- what a router says


def test_rows_hold_what_the_router_decides(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> None:
    generator = np.random.default_rng(0)
    router = router_of(generator.normal(size=(2, 500)).tolist())
    router.temperature.fill_(0.4)
    windows = document_windows(tokenizer, documents, 8)
    rows = window_rows(router, windows, seed=5)
    ids = torch.from_numpy(windows.ids.astype(np.int64))
    assert rows["predicted"].tolist() == [LANGUAGES[i] for i in router.route(ids)]
    assert rows["correct"].tolist() == (rows["predicted"] == rows["language"]).tolist()
    chance, labels = probabilities_of(rows, LANGUAGES)
    torch.testing.assert_close(torch.tensor(chance), router.probabilities(ids))
    assert [LANGUAGES[i] for i in labels] == windows.language.tolist()
    assert np.array_equal(rows["confidence"], chance.max(1))
    assert set(rows["seed"]) == {5} and set(rows["size"]) == {8}
    with pytest.raises(MomeError, match="does not know the language 'en'"):
        window_rows(TokenRouter(500, ("fr", "py")), windows)


# ------------------------------------------------------------------------------------------- accuracy


def scored(correct: dict[str, list[int]], **columns: object) -> pd.DataFrame:
    """Rows of one seed, topic by topic."""
    rows = [{"topic": topic, "correct": bool(hit)} for topic, hits in correct.items() for hit in hits]
    return pd.DataFrame(rows).assign(**({"seed": 0, "size": 8, "language": "en", "region": PROSE} | columns))


def test_intervals_count_topics_and_not_windows() -> None:
    generator = np.random.default_rng(1)
    chances = generator.beta(8, 2, size=150)
    hits = {f"t{i}": (generator.random(20) < chance).astype(int).tolist() for i, chance in enumerate(chances)}
    found = accuracy_interval(scored(hits))
    shares = np.array([100 * np.mean(own) for own in hits.values()])
    # Topics of one size: the interval of a plain mean of topics.
    half = 1.976 * shares.std(ddof=1) / np.sqrt(len(shares))  # Student's t with 149 degrees of freedom
    assert found.estimate == pytest.approx(shares.mean())
    assert found.high - found.estimate == pytest.approx(half, rel=0.05)
    assert (found.documents, found.seeds) == (150, 1)
    doubled = accuracy_interval(scored({topic: own * 2 for topic, own in hits.items()}))
    assert doubled.low == pytest.approx(found.low) and doubled.high == pytest.approx(found.high)


def test_seeds_widen_an_interval_and_no_error_gives_the_rule_of_three() -> None:
    one = {f"t{i}": [1] * 9 + [i % 2] for i in range(40)}
    two = {f"t{i}": [1] * 9 + [0] for i in range(40)}
    found = accuracy_interval(pd.concat([scored(one), scored(two, seed=1)]))
    assert found.estimate == pytest.approx((95 + 90) / 2) and found.seeds == 2
    assert found.low < accuracy_interval(scored(one)).low
    perfect = accuracy_interval(scored({f"t{i}": [1] * 10 for i in range(50)}))
    assert (perfect.estimate, perfect.low, perfect.high) == (100.0, 94.0, 100.0)  # 3 of 50 topics
    assert accuracy_interval(scored({"a": [1] * 50, "b": [1] * 50})).low == 0  # two topics say nothing
    with pytest.raises(MomeError, match="no windows"):
        accuracy_interval(scored(one)[:0])


def test_the_table_counts_by_size_language_and_region() -> None:
    rows = pd.concat([
        scored({"a": [1, 1, 0], "b": [1]}),
        scored({"a": [0, 1]}, language="py", region=TEXT_IN_CODE),
        scored({"a": [1], "b": [1]}, language="py", region=CODE),
        scored({"a": [1, 0]}, size=16),
    ])
    table = window_table(rows).set_index(["size", "part"])
    expected = {
        (8, "en"): (4, 2, 75.0), (8, "py"): (4, 2, 75.0), (8, PROSE): (4, 2, 75.0), (8, CODE): (2, 2, 100.0),
        (8, TEXT_IN_CODE): (2, 1, 50.0), (8, "all"): (8, 2, 75.0), (16, "en"): (2, 1, 50.0),
        (16, PROSE): (2, 1, 50.0), (16, "all"): (2, 1, 50.0),
    }
    assert {k: (r.windows, r.topics, r.accuracy) for k, r in table.iterrows()} == expected
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()


def test_prefixes_are_scored_by_length() -> None:
    sequences = {"en": [np.array([0, 0, 0, 1]), np.array([0, 1])], "py": [np.array([1, 0, 0, 0])]}
    topics = {"en": ["a", "b"], "py": ["a"]}

    def last(ids: torch.Tensor) -> torch.Tensor:
        return ids[:, -1]

    table = prefix_accuracy(last, sequences, topics, [1, 2, 4]).set_index(["language", "tokens"])
    assert table["accuracy"].to_dict() == {
        ("en", 1): 100.0, ("en", 2): 50.0, ("en", 4): 0.0, ("py", 1): 100.0, ("py", 2): 0.0, ("py", 4): 0.0,
    }
    assert table["sequences"].tolist() == [2, 2, 1, 1, 1, 1]
    with pytest.raises(MomeError, match="use lengths from 1 to 4"):
        prefix_accuracy(last, sequences, topics, [5])
    with pytest.raises(MomeError, match="one topic per sequence"):
        prefix_accuracy(last, sequences, {"en": ["a"], "py": ["a"]}, [1])
