"""Corrupted text: nothing at rate 0, what it says at rate 1, and code that stays code."""

from __future__ import annotations

import ast
import io
import tokenize
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.config import MomeError
from mome_utils.corpus import load_corpus
from mome_utils.corruption import (
    CORRUPTIONS,
    MIXTURES,
    TextSpan,
    damage,
    drop_letters,
    foreign_comments,
    mix,
    quote_code,
    random_case,
    switch_language,
    text_spans,
    typos,
)

GERMAN = "Der schöne Müller aß 12 Äpfel. Nur über einen Steg, 3,5 m lang, kam er\nins Dorf!"
MODULE = '''#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""What this
    module does."""

import re  # for words

TITLE = "two words"
EMPTY = ''  # ----


def run(x: int = 3) -> str:
    \'\'\'It's one line.\'\'\'
    r"not the docstring" "two parts"
    text = f"{x} apples and pears" + r'back\\slash here' + b"two bytes".decode()
    return text + "%d left" % x
'''


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    """The texts of every 25th topic."""
    whole = load_corpus()
    return {code: [d.text for d in whole.of_language(code)[::25]] for code in whole.languages}


# ------------------------------------------------------------------------------------------ one text


@pytest.mark.parametrize("name", CORRUPTIONS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(text=st.text(max_size=60), seed=st.integers(0, 5))
def test_nothing_changes_at_rate_zero_and_seeds_decide_everything(name: str, text: str, seed: int) -> None:
    assert damage(name, [text], 0.0, seed) == [text]
    for rate in (0.4, 1.0):
        assert CORRUPTIONS[name](text, rate, rng(seed)) == CORRUPTIONS[name](text, rate, rng(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_damage_strikes_and_differs_by_seed_and_text(name: str) -> None:
    struck = [damage(name, [GERMAN * 5, GERMAN * 5], 0.5, seed) for seed in (0, 1)]
    assert all(text != GERMAN * 5 for pair in struck for text in pair)
    assert struck[0] != struck[1]
    assert struck[0][0] != struck[0][1]


@pytest.mark.parametrize(("name", "expected"), [
    ("capitals", "DER SCHÖNE MÜLLER ASS 12 ÄPFEL. NUR ÜBER EINEN STEG, 3,5 M LANG, KAM ER\nINS DORF!"),
    ("small letters", "der schöne müller aß 12 äpfel. nur über einen steg, 3,5 m lang, kam er\nins dorf!"),
    ("title case", "Der Schöne Müller Aß 12 Äpfel. Nur Über Einen Steg, 3,5 M Lang, Kam Er\nIns Dorf!"),
    ("random case", "dER SCHÖNE mÜLLER ASS 12 äPFEL. nUR ÜBER EINEN sTEG, 3,5 M LANG, KAM ER\nINS dORF!"),
    ("no accents", "Der schone Muller aß 12 Apfel. Nur uber einen Steg, 3,5 m lang, kam er\nins Dorf!"),
    ("no spaces", "DerschöneMülleraß12Äpfel.NurübereinenSteg,3,5mlang,kamerinsDorf!"),
    ("no punctuation", "Der schöne Müller aß 12 Äpfel Nur über einen Steg 35 m lang kam er\nins Dorf"),
    ("no letters", "    12 .    , 3,5  ,  \n !"),
    ("characters lost", ""),
])
def test_what_is_left_at_rate_one(name: str, expected: str) -> None:
    assert damage(name, [GERMAN], 1.0, seed=3) == [expected]


def test_accents_are_found_in_both_normal_forms_and_other_characters_stay() -> None:
    text = "Élève cœur Straße ½ ﬁn x² Ångström"
    bare = "Eleve cœur Straße ½ ﬁn x² Angstrom"
    for form in ("NFC", "NFD"):
        assert damage("no accents", [unicodedata.normalize(form, text)], 1.0, 0) == [bare]


def test_optical_recognition_takes_the_longest_shape() -> None:
    assert damage("optical recognition", ["clam, modern IBM Süß"], 1.0, 0) == ["darn. rnoclcm l8M 5iiB"]


def test_a_typo_is_one_of_four_slips_on_a_qwerty_keyboard() -> None:
    around = {"t", "y", "f", "h", "v", "b"}  # read off a keyboard
    outcomes = {typos("g", 1.0, rng(seed)) for seed in range(400)}
    assert outcomes == {"", *around, *(key + "g" for key in around)}
    pairs = {typos("G.", 1.0, rng(seed)) for seed in range(400)}
    assert ".G" in pairs and "." in pairs and {key.upper() + "G." for key in around} < pairs
    assert {typos("é", 1.0, rng(seed)) for seed in range(400)} >= set("34wrsd")  # the keys around e
    assert typos(" .,\n", 1.0, rng()) == " .,\n"


def test_the_rate_is_the_share_of_places_struck() -> None:
    text = "abcdefghij" * 2000
    for rate in (0.05, 0.3):
        left = len(drop_letters(text, rate, rng(1)))
        assert abs(left / len(text) - (1 - rate)) < 0.015
    flipped = random_case(text, 0.3, rng(1))
    assert abs(np.mean([a != b for a, b in zip(text, flipped, strict=True)]) - 0.3) < 0.015


def test_a_higher_rate_strikes_the_same_places_and_more() -> None:
    at = [{i for i, c in enumerate(random_case("a" * 300, rate, rng(7))) if c == "A"} for rate in (0.1, 0.3, 0.8)]
    assert at[0] < at[1] < at[2]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_share(rate: float) -> None:
    for name in CORRUPTIONS:
        with pytest.raises(MomeError, match="is no share"):
            damage(name, ["Text"], rate, 0)
    for name in MIXTURES:
        with pytest.raises(MomeError, match="is no share"):
            mix(name, ["x = 1  # one\n"], ["Text"], rate, 0)


def test_foreign_comments_are_foreign_docstrings_and_strings_too() -> None:
    [mixed] = mix("foreign comments", ['x = "two words"  # one word\n'], ["oui " * 9], 1.0, 0)
    assert "two words" not in mixed and "one word" not in mixed and mixed.startswith('x = "oui')


def test_unknown_names_and_unmatched_texts_are_refused() -> None:
    with pytest.raises(MomeError, match="There is no 'typo': choose one of typos, "):
        damage("typo", ["Text"], 0.1, 0)
    with pytest.raises(MomeError, match="There is no 'typos': choose one of foreign comments, "):
        mix("typos", ["Text"], ["Text"], 0.1, 0)
    with pytest.raises(MomeError, match="1 texts cannot be mixed with 2 others"):
        mix("quoted code", ["Text"], ["a", "b"], 0.1, 0)


# ---------------------------------------------------------------------------------- text inside code


def test_strings_docstrings_and_comments_are_found() -> None:
    found = [(MODULE[s.start : s.end], s.kind) for s in text_spans(MODULE)]
    assert found == [
        ("#!/usr/bin/env python", "comment"), ("# -*- coding: utf-8 -*-", "comment"),
        ('"""What this\n    module does."""', "docstring"), ("# for words", "comment"), ('"two words"', "string"),
        ("''", "string"), ("# ----", "comment"), ("'''It's one line.'''", "docstring"),
        ('r"not the docstring"', "string"), ('"two parts"', "string"), ('f"{x} apples and pears"', "string"),
        ("r'back\\slash here'", "string"), ('b"two bytes"', "string"), ('"%d left"', "string"),
    ]


def test_docstrings_are_those_that_the_parser_finds(corpus: dict[str, list[str]]) -> None:
    for source in corpus["py"]:
        nodes = [
            node.value for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        found = [source[s.start : s.end] for s in text_spans(source) if s.kind == "docstring"]
        assert sorted(found) == sorted(ast.get_source_segment(source, node) or "" for node in nodes)
        assert found


@pytest.mark.parametrize(("source", "expected"), [
    ("", []),
    ("a = 'x'\nb = \"never closed\nc = 'y'", ["'x'"]),
    ("a = 'x'\nb = '''never\nclosed 'z'", ["'x'"]),
    ("def f():\n    'd'\n  g = 1\n'after'", ["'d'"]),  # indentation that fits nothing
    ("f(1, 'x'\n", ["'x'"]),
    ("Er sagte \"ja\" und ging. # nicht mehr", ['"ja"', "# nicht mehr"]),
    ("é = 'ü'  # ß\r\nb = 'c'\r\n", ["'ü'", "# ß", "'c'"]),
])
def test_what_is_not_python_gives_what_could_be_read(source: str, expected: list[str]) -> None:
    assert [source[s.start : s.end] for s in text_spans(source)] == expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet=st.sampled_from("ab1 '\"#\n\t\\(){}[]:=éf$\r\x0c!"), max_size=40))
def test_no_text_makes_the_search_fail(source: str) -> None:
    spans = text_spans(source)
    edges = [edge for span in spans for edge in (span.start, span.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(source) for edge in edges)
    assert all(span.start < span.end and isinstance(span, TextSpan) for span in spans)


# ----------------------------------------------------------------------------------------- two texts


def _code(source: str, *, strings: bool = False) -> list[str]:
    """The tokens of a module without comments and docstrings (and other strings), by the standard library alone."""
    tree = ast.parse(source)
    docs = {
        (node.lineno, node.col_offset) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type != tokenize.COMMENT and not (token.type == tokenize.STRING and (strings or token.start in docs))
    ]


def test_code_under_foreign_comments_is_the_same_code(corpus: dict[str, list[str]]) -> None:
    known = {word for text in corpus["fr"] for word in text.split()}
    for source, other in zip(corpus["py"], corpus["fr"], strict=True):
        changed = foreign_comments(source, other, 1.0, rng())
        assert _code(changed) == _code(source)
        docs = [changed[s.start : s.end].strip('"') for s in text_spans(changed) if s.kind == "docstring"]
        words = {word for text in docs for word in text.split()}
        assert words and all(word in known or "”" in word for word in words)
        assert abs(len(changed) / len(source) - 1) < 0.15
        assert changed.count("\n") == source.count("\n")
        assert foreign_comments(source, other, 0.0, rng()) == source


def test_strings_that_read_like_text_can_be_replaced_too(corpus: dict[str, list[str]]) -> None:
    for source, other in zip(corpus["py"], corpus["de"], strict=True):
        changed = foreign_comments(source, other, 1.0, rng(), strings=True)
        assert _code(changed, strings=True) == _code(source, strings=True)
    changed = foreign_comments(MODULE, "oui 'non' \"si\" \\ bien", 1.0, rng(), strings=True)
    kept = ["#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n", "''  # ----\n", 'f"{x} apples and pears"',
            'b"two bytes"', '"%d left"', 'import re  # ']
    assert all(part in changed for part in kept)
    lost = ["What this", "module does", "for words", "two words", "one line", "two parts", "slash"]
    assert not any(part in changed for part in lost)
    assert _code(changed, strings=True) == _code(MODULE, strings=True)


def test_comments_need_words() -> None:
    with pytest.raises(MomeError, match="text without words"):
        foreign_comments("x = 1  # one\n", " \n", 1.0, rng())


def test_half_of_the_comments_at_half_the_rate() -> None:
    source = "".join(f"x = {i}  # keep this\n" for i in range(400))
    changed = foreign_comments(source, "oui non", 0.5, rng())
    assert 150 < changed.count("# keep this\n") < 250
    assert [line.split("#")[0] for line in changed.splitlines()] == [line.split("#")[0] for line in source.splitlines()]


def test_quoted_code_stands_between_sentences_and_the_prose_stays() -> None:
    prose = "A first sentence, with 3.5 parts. A second one! And a third? " * 4 + "The end."
    code = "".join(f"name_{i} = {i}\n" for i in range(100))
    places = set()
    for seed in range(30):
        mixed = quote_code(prose, code, 0.5, rng(seed))
        before, quoted, *rest = mixed.split("\n\n")
        assert f"{before} {rest[0]}".strip() == prose
        assert before.endswith((".", "!", "?")) and not before.endswith("3.")
        assert f"\n{quoted}" in f"\n{code}" and len(prose) / 2 - 2 <= len(quoted) <= len(prose) / 2
        places.add(len(before))
    assert len(places) > 5
    assert quote_code("No end", "x = 1", 1.0, rng()) == "No end\n\nx = 1\n\n"
    assert quote_code("Text.", "", 1.0, rng()) == "Text."


def test_a_text_that_switches_language(corpus: dict[str, list[str]]) -> None:
    assert switch_language("eins zwei drei vier", "one two three four", 0.5, rng()) == "eins zwei four"
    for one, two in zip(corpus["en"], corpus["de"], strict=True):
        mixed = switch_language(one, two, 0.25, rng())
        head = next(n for n in range(len(mixed)) if two.endswith(mixed[n:]))
        assert one.startswith(mixed[:head])
        assert -1 < 0.75 * len(one) - head < 30 and -1 < 0.25 * len(two) - (len(mixed) - head) < 30
        assert switch_language(one, two, 0.0, rng()) == one
        assert switch_language(one, two, 1.0, rng()) == two
