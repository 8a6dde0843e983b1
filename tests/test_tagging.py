"""Labels by rule and from files, and their alignment to subwords."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2

from mome_utils.config import MomeError
from mome_utils.corpus import Document
from mome_utils.models import IGNORED
from mome_utils.position_scores import SPAN, count_matches
from mome_utils.position_tasks import Task, TaskSpec, label_positions, sample, tag_words, task_specs
from mome_utils.tagging import Sentence, Tagged, entity_spans, sentences, to_bio
from mome_utils.tagging_entities import tag_entities
from mome_utils.tagging_files import read_conll, read_conllu, read_folder
from mome_utils.tagging_python import PYTHON_LABELS, tag_python
from mome_utils.tokenization import train_tokenizer

SOURCE = '''import os  # the system
class Röd(Base):
    """Doc string."""
    def go(self, a, *rest, key=1.5):
        é = f"x {a!r} y"; return os.path.join(a, sep="-")(rest)
'''


def labelled(tagged: Tagged) -> list[tuple[str, str]]:
    return [(tagged.text[begin:end], label) for begin, end, label in tagged.words]


def python(text: str) -> Tagged:
    found = tag_python(Document("d", "py", "", "", text))
    assert found is not None
    return found


# --- Python source


def test_every_word_of_a_module_has_the_class_that_python_gives_it() -> None:
    words = labelled(python(SOURCE))
    assert words[:5] == [("import", "keyword"), ("os", "name"), ("#", "comment"), ("the", "comment"),
                         ("system", "comment")]
    assert words[5:11] == [("class", "keyword"), ("Röd", "definition"), ("(", "operator"), ("Base", "name"),
                           (")", "operator"), (":", "operator")]
    assert words[11:13] == [('"""Doc', "string"), ('string."""', "string")]
    by_word = dict(words)
    assert by_word["go"] == "definition" and by_word["1.5"] == "number"
    assert [w for w, label in words if label == "attribute"] == ["path"]
    assert [w for w, label in words if label == "call"] == ["join"]
    assert [w for w, label in words if label == "argument"] == ["self", "a", "rest", "key", "sep"]
    assert [w for w, label in words if label == "string"][2:] == ['f"x', "{a!r}", 'y"', '"-"']
    assert dict(words[-25:])["é"] == "name"


def test_nothing_but_space_lies_outside_the_words_of_a_module() -> None:
    tagged = python(SOURCE)
    reached, outside = 0, ""
    for begin, end, _ in tagged.words:
        outside += tagged.text[reached:begin]
        reached = end
    assert (outside + tagged.text[reached:]).strip() == ""


def test_a_module_that_does_not_parse_is_passed_over() -> None:
    assert tag_python(Document("d", "py", "", "", "def (:\n")) is None


# --- entities by rule


@pytest.mark.parametrize(("text", "found"), [
    ("The Tower of London was built in 1078.", [("NAME", "Tower of London"), ("YEAR", "1078")]),
    ("It is 12 km from New York, or 3.5 miles.", [("QUANTITY", "12 km"), ("NAME", "New York"),
                                                   ("QUANTITY", "3.5 miles")]),
    ("Le Jean de La Fontaine pesait 70 kg en 1660.", [("NAME", "Jean de La Fontaine"), ("QUANTITY", "70 kg"),
                                                      ("YEAR", "1660")]),
    ("Paris. Rome is old. 1984 years of it.", [("QUANTITY", "1984 years")]),
    ("Jeanne d'Arc et Anne. Marie", [("NAME", "Jeanne d'Arc")]),
    ("one word here", []),
])
def test_spans_by_rule(text: str, found: list[tuple[str, str]]) -> None:
    tagged = tag_entities(Document("d", "en", "", "", text), frozenset({"the", "le", "it"}))
    spans = sorted(entity_spans([label for _, _, label in tagged.words]), key=lambda span: span[1])
    assert [(kind, text[tagged.words[a][0]:tagged.words[b - 1][1]]) for kind, a, b in spans] == found


def test_an_article_may_be_cut_after_its_sentences() -> None:
    tagged = tag_entities(Document("d", "en", "", "", "One. Two!\n\nThree"), frozenset())
    assert [tagged.text[i:] for i in tagged.breaks] == ["Two!\n\nThree", "Three"]


# --- BIO


def test_iob1_becomes_bio() -> None:
    assert to_bio(["I-A", "I-A", "B-A", "O", "I-B", "I-A"]) == ["B-A", "I-A", "B-A", "O", "B-B", "B-A"]
    assert to_bio(["B-A", "I-A", "O"]) == ["B-A", "I-A", "O"]


@pytest.mark.parametrize(("labels", "spans"), [
    ([], set()),
    (["O", "O"], set()),
    (["B-A", "I-A", "O", "B-A"], {("A", 0, 2), ("A", 3, 4)}),
    (["B-A", "B-A"], {("A", 0, 1), ("A", 1, 2)}),
    (["I-A", "I-B", "I-B"], {("A", 0, 1), ("B", 1, 3)}),
    (["O", "I-A", "I-A"], {("A", 1, 3)}),
])
def test_spans_as_the_conll_evaluation_reads_them(labels: list[str], spans: set) -> None:
    assert entity_spans(labels) == spans


BIO = ("O", "B-X", "I-X", "B-Y", "I-Y")  # any order of them: an I- after O or after another kind, too


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(range(len(BIO)))] * 2), min_size=1, max_size=12), min_size=1,
                max_size=6))
def test_spans_and_their_f1_are_those_of_seqeval(tagged: list[list[tuple[int, int]]]) -> None:
    """In its default mode, that of the CoNLL evaluation; the taggings are any, malformed ones among them."""
    task = Task("t", BIO, True, (), ())
    counts = np.zeros(3)
    sides: tuple[list[list[str]], list[list[str]]] = ([], [])
    for pairs in tagged:
        true, said = ([pair[side] for pair in pairs] for side in (0, 1))
        counts += count_matches(task, true, said)[SPAN]
        for side, labels in zip(sides, (true, said), strict=True):
            side.append([BIO[i] for i in labels])
            assert entity_spans(side[-1]) == {(kind, first, last + 1) for kind, first, last in get_entities(side[-1])}
    tp, fp, fn = counts
    assert 2 * tp / max(2 * tp + fp + fn, 1) == pytest.approx(f1_score(*sides, zero_division=0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("OXY"), st.integers(1, 3)), min_size=1, max_size=6), st.randoms())
def test_well_formed_spans_are_those_of_the_strict_mode(runs: list[tuple[str, int]], chance: Random) -> None:
    """IOB2 leaves nothing to a rule: default and strict mode of seqeval, and we, say the same."""
    spans = [["O"] * n if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (n - 1)] for kind, n in runs]
    true = [label for span in spans for label in span]
    said = to_bio([chance.choice(BIO) for _ in true])  # what continues nothing begins with B- now
    a, b = entity_spans(true), entity_spans(said)
    f1 = 2 * len(a & b) / max(len(a) + len(b), 1)
    assert f1 == pytest.approx(f1_score([true], [said], mode="strict", scheme=IOB2, zero_division=0))
    assert f1 == pytest.approx(f1_score([true], [said], zero_division=0))


# --- alignment


@pytest.fixture(scope="module")
def tokenizer():  # noqa: ANN201
    return train_tokenizer([SOURCE * 3, "the cat sat on the mat " * 20], 300)


def test_the_first_subword_of_each_word_bears_its_label(tokenizer) -> None:  # noqa: ANN001
    tagged = python("value = function(other)\n")
    (sentence,) = sentences(tokenizer, [tagged], PYTHON_LABELS, 100)
    text, seen, expected = "", [], {begin: label for begin, _, label in tagged.words}
    for i, label in zip(sentence.ids, sentence.labels, strict=True):
        piece = tokenizer.decode([i])
        if label != IGNORED:
            seen.append((len(text) + len(piece) - len(piece.lstrip()), PYTHON_LABELS[label]))
        text += piece
    assert text == tagged.text
    assert dict(seen) == expected


def test_sentences_are_short_enough_and_cut_no_word_and_no_span(tokenizer) -> None:  # noqa: ANN001
    words = ["alpha", "beta", "gamma", "delta"] * 6
    labels = ["B-X", "I-X", "O", "O"] * 6
    spans, reached = [], 0
    for word, label in zip(words, labels, strict=True):
        spans.append((reached, reached + len(word), label))
        reached += len(word) + 1
    tagged = Tagged("d", "en", " ".join(words), tuple(spans))
    longest = max(len(tokenizer(" alpha beta gamma")["input_ids"]), 8)
    found = sentences(tokenizer, [tagged], ("O", "B-X", "I-X"), longest)
    assert len(found) > 2 and max(map(len, found)) <= longest
    assert "".join(tokenizer.decode(list(s.ids)) for s in found) == tagged.text
    assert [label for s in found for label in s.labels if label != IGNORED] == [1, 2, 0, 0] * 6
    for s in found:
        first = next(label for label in s.labels if label != IGNORED)
        assert first != 2  # never inside a span


def test_a_sentence_ends_where_the_text_does_if_that_fits(tokenizer) -> None:  # noqa: ANN001
    lines = ["the cat sat\n"] * 6
    text = "".join(lines)
    words = [(i * 12 + a, i * 12 + b, "O") for i in range(6) for a, b in ((0, 3), (4, 7), (8, 11))]
    tagged = Tagged("d", "en", text, tuple(words), tuple(range(12, 72, 12)))
    longest = len(tokenizer("the cat sat\nthe cat sat\nthe")["input_ids"])
    found = sentences(tokenizer, [tagged], ("O",), longest)
    assert [tokenizer.decode(list(s.ids)) for s in found] == ["the cat sat\nthe cat sat\n"] * 3


def test_a_word_longer_than_a_sentence_is_left_out(tokenizer) -> None:  # noqa: ANN001
    text = "cat qzxjvkwqzxjvkwqzxjvkw sat"
    tagged = Tagged("d", "en", text, ((0, 3, "O"), (4, 25, "O"), (26, 29, "O")))
    found = sentences(tokenizer, [tagged], ("O",), 5)
    assert [tokenizer.decode(list(s.ids)).strip() for s in found] == ["cat", "sat"]


def test_labels_and_words_that_cannot_be_are_refused(tokenizer) -> None:  # noqa: ANN001
    with pytest.raises(MomeError, match="none of O"):
        sentences(tokenizer, [Tagged("d", "en", "a", ((0, 1, "X"),))], ("O",), 5)
    with pytest.raises(MomeError, match="overlaps"):
        Tagged("d", "en", "abc", ((0, 2, "O"), (1, 3, "O")))
    with pytest.raises(MomeError, match="room"):
        sentences(tokenizer, [], ("O",), 0)


# --- files

CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- -X- O

Paris NNP I-NP I-LOC
London NNP I-NP B-LOC
"""
CONLLU = """# newdoc id = a
# sent_id = 1
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t0\troot\t_\t_
2\tle\tle\tDET\t_\t_\t1\tdet\t_\t_
2.1\tx\tx\tX\t_\t_\t_\t_\t_\t_

# newdoc id = b
1\tva\taller\tVERB\t_\t_\t0\troot\t_\t_
"""


def test_conll_2003_as_distributed(tmp_path: Path) -> None:
    path = tmp_path / "eng.train"
    path.write_text(CONLL, encoding="utf-8")
    first, second, third = read_conll(path)
    assert labelled(first) == [("EU", "B-ORG"), ("rejects", "O"), ("German", "B-MISC")]
    assert first.text == "EU rejects German"
    assert labelled(second) == [("Peter", "B-PER"), ("Blackburn", "I-PER")]
    assert labelled(third) == [("Paris", "B-LOC"), ("London", "B-LOC")]
    assert first.document == second.document != third.document


def test_a_file_in_conll_u(tmp_path: Path) -> None:
    path = tmp_path / "fr_x-ud-test.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    first, second = read_conllu(path)
    assert labelled(first) == [("de", "ADP"), ("le", "DET")]
    assert [label for _, label in labelled(read_conllu(path, field="deprel")[0])] == ["root", "det"]
    assert first.document != second.document


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    for name in ("eng.train", "eng.testa", "eng.testb", "README"):
        (tmp_path / name).write_text(CONLL, encoding="utf-8")
    assert {split: len(found) for split, found in read_folder(tmp_path).items()} == {
        "train": 3, "validation": 3, "test": 3}
    ud = tmp_path / "ud"
    ud.mkdir()
    for split in ("train", "test"):
        (ud / f"fr_x-ud-{split}.conllu").write_text(CONLLU, encoding="utf-8")
    assert set(read_folder(ud)) == {"train", "test"}


@pytest.mark.parametrize(("name", "text", "sentence"), [
    ("train.conll", "word\n", "Line 1 of train.conll has 1 column"),
    ("train.conll", "a O\nword NOUN\n", "Line 2 of train.conll has the label 'NOUN'"),
    ("train.conll", "\n\n", "train.conll holds no labelled word"),
    ("train.conllu", "1 a b\n", "Line 1 of train.conllu has 1 field"),
    ("dev.conllu", CONLLU, "has no file for train"),
])
def test_bad_files_say_what_is_wrong_in_one_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(MomeError, match=sentence) as failure:
        read_folder(tmp_path)
    assert str(failure.value).count(". ") == 0


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.conll").write_bytes(b"caf\xe9 O\n")
    with pytest.raises(MomeError, match="not UTF-8"):
        read_conll(tmp_path / "x.conll")
    with pytest.raises(MomeError, match="cannot be read"):
        read_conllu(tmp_path / "nothing.conllu")
    with pytest.raises(MomeError, match="no field 'pos'"):
        read_conllu(tmp_path / "x.conll", field="pos")
    with pytest.raises(MomeError, match="no folder"):
        read_folder(tmp_path / "nowhere")
    for name in ("train.conll", "eng.train"):
        (tmp_path / name).write_text(CONLL, encoding="utf-8")
    with pytest.raises(MomeError, match="2 files for train"):
        read_folder(tmp_path)


# --- tasks


def test_tasks_that_languages_allow() -> None:
    found = task_specs(["en", "de", "py"], 128, 4, 50, 10)
    assert [(spec.kind, spec.languages, spec.longest) for spec in found] == [
        ("code", ("py",), 31), ("entities", ("en",), 31)]
    assert 1 + 4 * 31 <= 128 < 1 + 4 * 32
    assert task_specs(["de", "xx"], 64, 4, 50, 10) == [TaskSpec("words", ("de", "xx"), 15, 50, 10)]
    with pytest.raises(MomeError, match="no task"):
        TaskSpec("other", ("en",), 3, 4, 5)


def test_kinds_of_words_in_any_language() -> None:
    tagged = tag_words(Document("d", "xx", "", "", "Où est Émile, 12?\nIci"), frozenset({"est"}))
    assert labelled(tagged) == [("Où", "word"), ("est", "function_word"), ("Émile", "name"), (",", "punctuation"),
                                ("12", "number"), ("?", "punctuation"), ("Ici", "word")]
    assert tagged.breaks == (18,)


def test_positions_of_labels_and_an_even_sample() -> None:
    train = (Sentence("a", "en", (5, 6, 7), (0, IGNORED, 1)), Sentence("a", "en", (5,), (1,)))
    task = Task("t", ("O", "B-X"), True, train, train)
    table = label_positions(task).set_index(["label", "position"])["count"].to_dict()
    assert table == {("O", 1): 1, ("B-X", 3): 1, ("B-X", 1): 1}
    assert task.positive(1) and not task.positive(0) and not task.positive(IGNORED)
    many = [Sentence(str(i), "en", (i,), (0,)) for i in range(10)]
    assert [s.document for s in sample(many, 4)] == ["0", "3", "6", "9"]
    assert sample(many, 20) == tuple(many)
