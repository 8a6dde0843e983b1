"""Text as users send it: seeded damage to a text, and texts of two languages mixed into one.

Every function is pure: text, a rate and a random generator go in, text comes out. The rate is the share of the places
that are struck, 0 (nothing changes, exactly) to 1 (every one). All random numbers are drawn before they are used, so
with equal seeds a higher rate strikes the same places and more: curves over the rate compare like with like.
:func:`damage` and :func:`mix` apply a function by its name in :data:`CORRUPTIONS` or :data:`MIXTURES`.
"""

from __future__ import annotations

import io
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from mome_utils.config import MomeError

__all__ = [
    "CORRUPTIONS", "MIXTURES", "TextSpan", "change_words", "damage", "drop_characters", "drop_letters",
    "drop_punctuation", "drop_spaces", "foreign_comments", "mix", "ocr", "quote_code", "random_case", "strip_accents",
    "switch_language", "text_spans", "typos",
]

Corruption = Callable[[str, float, np.random.Generator], str]
Mixture = Callable[[str, str, float, np.random.Generator], str]

#: The letters and digits of a US QWERTY keyboard, each row half a key (a quarter for the third) right of the one above.
_KEY_ROWS = (("1234567890", 0.0), ("qwertyuiop", 0.5), ("asdfghjkl", 0.75), ("zxcvbnm", 1.25))

#: What optical character recognition takes for what.
_OCR: Mapping[str, str] = MappingProxyType({
    "rn": "m", "cl": "d", "vv": "w", "m": "rn", "d": "cl", "w": "vv", "l": "1", "1": "l", "I": "l", "O": "0", "0": "O",
    "S": "5", "5": "S", "B": "8", "8": "B", "e": "c", "h": "b", "ß": "B", "ü": "ii", "ä": "a", "ö": "o", "é": "e",
    "è": "e", "ê": "e", "à": "a", "ç": "c", ".": ",", ",": ".", "_": " ",
})
_OCR_PATTERN = re.compile("|".join(sorted(map(re.escape, _OCR), key=len, reverse=True)))

_SILENT = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT)  # tokens that stand between statements
#: Python 3.12 and later read an f-string as many tokens between these two; before, it was one STRING.
_F_OPENS, _F_CLOSES = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))

_STRING_OPENING = re.compile(r"^[A-Za-z]*(?:\"{3}|'{3}|[\"'])")
_INDENT, _COMMENT_LEAD = re.compile(r"^\s*"), re.compile(r"^#[#:!]*\s*")
_TWO_WORDS = re.compile(r"[^\W\d_]{2}\s+[^\W\d_]{2}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
#: What stands for a quote inside a string that such a quote would end.
_CURLY: Mapping[str, str] = MappingProxyType({"'": "\u2019", '"': "\u201d"})
#: A first or second line that tells Python the encoding (PEP 263), or the shell what to start.
_DECLARATION = re.compile(r"#!|#.*?coding[:=]")


def _neighbours() -> dict[str, str]:
    """The keys around each key: those whose centres are less than 1.3 key widths away."""
    places = {
        key: complex(offset + column, row)
        for row, (keys, offset) in enumerate(_KEY_ROWS) for column, key in enumerate(keys)
    }
    return {
        key: "".join(other for other, there in places.items() if other != key and abs(there - here) < 1.3)
        for key, here in places.items()
    }


_NEIGHBOURS = MappingProxyType(_neighbours())


def _check(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise MomeError(f"A rate of {rate} is no share: use a number from 0 to 1.")


def _struck(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of ``count`` places are struck [count] bool; places struck at a rate are struck at every higher one."""
    _check(rate)
    return np.asarray(rng.random(count) < rate)


def _drop(text: str, rate: float, rng: np.random.Generator, kind: Callable[[str], bool]) -> str:
    """Leave out the struck ones of the characters of a kind."""
    struck = _struck(len(text), rate, rng)
    return "".join(c for c, hit in zip(text, struck, strict=True) if not (hit and kind(c)))


# -------------------------------------------------------------------------------------------- one text


def typos(text: str, rate: float, rng: np.random.Generator) -> str:
    """Slips of the fingers: each letter or digit is, with probability ``rate``, struck by one of four, evenly.

    A neighbouring key before it, the letter left out, swapped with the next character, or a neighbouring key in its
    place. Keys are those of a US QWERTY keyboard; a letter with an accent has the keys of its base letter, one that
    is on no key has the letters of the middle row. The case stays.
    """
    struck = _struck(len(text), rate, rng)
    kinds, picks = rng.integers(4, size=len(text)), rng.random(len(text))
    out: list[str] = []
    skip = -1  # the place of a character that already changed places with the one before
    for at, character in enumerate(text):
        if at == skip:
            continue
        if not struck[at] or not character.isalnum():
            out.append(character)
            continue
        base = unicodedata.normalize("NFKD", character)[0].lower()
        keys = _NEIGHBOURS.get(base, _KEY_ROWS[2][0])
        key = keys[int(picks[at] * len(keys))]
        key = key.upper() if character.isupper() else key
        if kinds[at] == 0:
            out.append(key + character)
        elif kinds[at] == 2 and at + 1 < len(text):
            out.append(text[at + 1] + character)
            skip = at + 1
        elif kinds[at] == 3:
            out.append(key)
        # What is left is the second kind, and a swap at the very end: the letter is left out.
    return "".join(out)


def change_words(text: str, rate: float, rng: np.random.Generator, *, change: Callable[[str], str]) -> str:
    """Words, which white space separates, changed one by one: ``str.upper``, ``str.lower``, ``str.capitalize`` …"""
    parts = re.split(r"(\s+)", text)
    struck = _struck(len(parts), rate, rng)
    return "".join(change(part) if hit else part for part, hit in zip(parts, struck, strict=True))


def random_case(text: str, rate: float, rng: np.random.Generator) -> str:
    """Each letter in the other case, with probability ``rate``."""
    struck = _struck(len(text), rate, rng)
    return "".join(c.swapcase() if hit else c for c, hit in zip(text, struck, strict=True))


def strip_accents(text: str, rate: float, rng: np.random.Generator) -> str:
    """Letters without their accents: NFKD without the combining marks; ``ß``, ``œ`` and ``æ`` have none and stay.

    Characters that NFKD takes apart into anything but a base and marks (ligatures, fractions) stay too.
    """
    struck = _struck(len(text), rate, rng)
    return "".join(_without_marks(c) if hit else c for c, hit in zip(text, struck, strict=True))


def _without_marks(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    bare = "".join(part for part in parts if not unicodedata.combining(part))
    return bare if bare != parts else character


def drop_characters(text: str, rate: float, rng: np.random.Generator) -> str:
    """Characters of every kind lost."""
    return _drop(text, rate, rng, lambda c: True)


def drop_spaces(text: str, rate: float, rng: np.random.Generator) -> str:
    """White space lost, line breaks included."""
    return _drop(text, rate, rng, str.isspace)


def drop_punctuation(text: str, rate: float, rng: np.random.Generator) -> str:
    """Punctuation and symbols lost (Unicode categories P and S)."""
    return _drop(text, rate, rng, lambda c: unicodedata.category(c)[0] in "PS")


def drop_letters(text: str, rate: float, rng: np.random.Generator) -> str:
    """Letters and their combining marks lost: at rate 1 only digits, punctuation, symbols and white space are left."""
    return _drop(text, rate, rng, lambda c: unicodedata.category(c)[0] in "LM")


def ocr(text: str, rate: float, rng: np.random.Generator) -> str:
    """Shapes that optical character recognition confuses: ``rn`` and ``m``, ``l`` and ``1``, ``ü`` and ``ii`` …"""
    places = list(_OCR_PATTERN.finditer(text))
    struck = iter(_struck(len(places), rate, rng))
    return _OCR_PATTERN.sub(lambda found: _OCR[found[0]] if next(struck) else found[0], text)


# ------------------------------------------------------------------------------------- text inside code


class TextSpan(NamedTuple):
    """Characters [start, end) of a Python source that are text: quotes, prefix and hash included.

    ``kind``: a ``docstring`` is a string that is a statement of its own; every other one is a ``string``.
    """

    start: int
    end: int
    kind: Literal["comment", "docstring", "string"]


def text_spans(source: str) -> list[TextSpan]:
    """Where the strings, docstrings and comments of Python source lie, ascending, without overlap.

    The source is read by the standard ``tokenize`` and never compiled or run. An f-string is one span, with the
    expressions in it, in every version of Python. Source that is not Python gives the spans found before the first
    place that cannot be read (an unclosed string gives none), so that no text makes this fail.
    """
    lines = [0]
    for line in io.StringIO(source, newline=""):
        lines.append(lines[-1] + len(line))
    spans: list[TextSpan] = []
    outer: list[int] = []  # where the f-strings around the current token began
    first = True  # does a statement begin with the current token
    alone = -1  # place in spans of a string that is all of the statement so far
    for token in _tokens(source):
        if token.type in _SILENT:
            continue
        start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
        if token.type == tokenize.COMMENT:
            spans.append(TextSpan(start, end, "comment"))
            continue
        if token.type == tokenize.NEWLINE and alone >= 0:
            spans[alone] = spans[alone]._replace(kind="docstring")
        alone = -1
        if token.type == _F_OPENS:
            outer.append(start)
        elif token.type == _F_CLOSES:
            start = outer.pop()
        if not outer and token.type in (tokenize.STRING, _F_CLOSES):
            if first and not set(_opening(source[start:end])) & set("bBfF"):
                alone = len(spans)
            spans.append(TextSpan(start, end, "string"))
        first = token.type == tokenize.NEWLINE
    return spans



def _tokens(source: str) -> list[tokenize.TokenInfo]:
    """The tokens of Python source before the first place that cannot be read."""
    tokens: list[tokenize.TokenInfo] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd number or escape in somebody's source is no concern of ours
        try:
            for token in tokenize.generate_tokens(io.StringIO(source, newline="").readline):
                if token.type == tokenize.ERRORTOKEN and token.string[0] in "'\"":
                    break  # Python 3.11 reads on after a quote without its partner, later versions do not
                tokens.append(token)
        except (tokenize.TokenError, SyntaxError):  # SyntaxError: indentation that fits no outer block
            pass
    return tokens


def _opening(literal: str) -> str:
    """Prefix and quotes with which a string literal begins."""
    return _STRING_OPENING.findall(literal)[0]


# -------------------------------------------------------------------------------------------- two texts


def foreign_comments(text: str, other: str, rate: float, rng: np.random.Generator, *, strings: bool = False) -> str:
    """A Python module whose comments and docstrings are in another language.

    Each is, with probability ``rate``, filled with words of ``other``, in their order from a random one on, line by
    line to at least the same length. All other tokens stay exactly as they are, and so do lines without a letter, the
    shell's and the encoding's first lines, and what ``tokenize`` cannot read.

    Args:
        text: Python source. other: text of another language.
        strings: also fill strings that read like text: two words or more and no place to fill in (``{`` or ``%``).

    Raises:
        MomeError: ``other`` holds no word.
    """
    words = "".join(c for c in other if c.isprintable() or c.isspace()).split()
    if not words:
        raise MomeError("Comments cannot be replaced by a text without words: give a longer one.")
    stream = islice(cycle(words), int(rng.integers(len(words))), None)
    spans = text_spans(text)
    parts, after = [], 0
    for span, hit in zip(spans, _struck(len(spans), rate, rng), strict=True):
        own = text[span.start : span.end]
        if hit and (span.kind != "string" or (strings and _is_sentence(own))):
            declared = _DECLARATION.match(own) and text.count("\n", 0, span.start) < 2
            own = own if declared else _filled(own, span.kind, stream)
        parts += [text[after : span.start], own]
        after = span.end
    return "".join([*parts, text[after:]])


def _is_sentence(literal: str) -> bool:
    """Is a string literal plain (no bytes, no f-string), with two words and no place to fill in?"""
    plain = not set(_opening(literal)) & set("bBfF") and not set(literal) & set("{%")
    return plain and bool(_TWO_WORDS.search(literal))


def _filled(own: str, kind: str, stream: Iterator[str]) -> str:
    """A comment or string literal with the next words of a stream in place of its text."""
    if kind == "comment":
        return _fill_line(own, stream, lead=_COMMENT_LEAD)
    opening = _opening(own)
    quote = opening[-1]
    body = own[len(opening) : -len(opening.lstrip("rRuU"))]
    if "\n" in body and len(opening.lstrip("rRuU")) == 1:
        return own  # a string that backslashes continue over lines
    allowed = (word.replace("\\", "").replace(quote, _CURLY[quote]) for word in stream)
    lines = [_fill_line(line, allowed, lead=_INDENT) for line in body.split("\n")]
    return opening + "\n".join(lines) + own[len(opening) + len(body) :]


def _fill_line(line: str, stream: Iterator[str], *, lead: re.Pattern[str]) -> str:
    """Words in place of what follows the ``lead`` of a line, to at least the same length; white space stays."""
    if not any(map(str.isalpha, line)):
        return line
    start = lead.findall(line)[0]
    end = line[len(line.rstrip()) :]
    filled = next(stream)
    while len(filled) < len(line) - len(start) - len(end):
        filled += " " + next(stream)
    return start + filled + end


def quote_code(text: str, other: str, rate: float, rng: np.random.Generator) -> str:
    """Prose that quotes code: lines of ``other``, in a row and between empty lines, after a random sentence.

    The code has ``rate`` times the characters of the prose, at most all of ``other``; its last line may be cut short.
    """
    _check(rate)
    first, second = rng.random(2)
    length = round(rate * len(text))
    if not length or not other.strip():
        return text
    starts = [0, *(found.end() for found in re.finditer("\n", other))]
    starts = [start for start in starts if len(other) - start >= length] or [0]
    start = starts[int(first * len(starts))]
    places = [found.end() for found in _SENTENCE_END.finditer(text)] or [len(text)]
    place = places[int(second * len(places))]
    quoted = other[start : start + length].strip("\n")
    return f"{text[:place]}\n\n{quoted}\n\n{text[place:].lstrip()}"


def switch_language(text: str, other: str, rate: float, rng: np.random.Generator) -> str:
    """The beginning of one text and the end of another: the last ``rate`` of each is taken from ``other``.

    Half-way at 0.5. Both are cut at white space; nothing is random, ``rng`` is there for the common form.
    """
    _check(rate)
    if rate in (0, 1):
        return other if rate else text
    head, tail = (round((1 - rate) * len(part)) for part in (text, other))
    while head and not text[head - 1].isspace():
        head -= 1
    while tail < len(other) and not other[tail - 1 : tail].isspace():
        tail += 1
    return text[:head] + other[tail:]


# --------------------------------------------------------------------------------------------- by name

#: Damage to one text: (text, rate, rng) -> text.
CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType({
    "typos": typos, "characters lost": drop_characters, "optical recognition": ocr,
    "capitals": partial(change_words, change=str.upper), "small letters": partial(change_words, change=str.lower),
    "title case": partial(change_words, change=str.capitalize), "random case": random_case,
    "no accents": strip_accents, "no spaces": drop_spaces, "no punctuation": drop_punctuation,
    "no letters": drop_letters,
})
#: Two texts made one: (text, other text, rate, rng) -> text.
MIXTURES: Mapping[str, Mixture] = MappingProxyType({
    "foreign comments": partial(foreign_comments, strings=True), "quoted code": quote_code,
    "language switch": switch_language,
})


def damage(name: str, texts: Sequence[str], rate: float, seed: int) -> list[str]:
    """Texts struck by one of :data:`CORRUPTIONS`, each with random numbers of its own.

    Raises:
        MomeError: an unknown name, or a rate outside 0 to 1.
    """
    change = _named(name, CORRUPTIONS)
    return [change(text, rate, np.random.default_rng([seed, at])) for at, text in enumerate(texts)]


def mix(name: str, texts: Sequence[str], others: Sequence[str], rate: float, seed: int) -> list[str]:
    """Pairs of texts made one by one of :data:`MIXTURES`, each with random numbers of its own.

    Raises:
        MomeError: an unknown name, a rate outside 0 to 1, or not one other text for each text.
    """
    change = _named(name, MIXTURES)
    if len(texts) != len(others):
        raise MomeError(f"{len(texts)} texts cannot be mixed with {len(others)} others: give one for each.")
    pairs = zip(texts, others, strict=True)
    return [change(text, other, rate, np.random.default_rng([seed, at])) for at, (text, other) in enumerate(pairs)]


_Named = TypeVar("_Named")


def _named(name: str, known: Mapping[str, _Named]) -> _Named:
    if name not in known:
        raise MomeError(f"There is no '{name}': choose one of {', '.join(known)}.")
    return known[name]
