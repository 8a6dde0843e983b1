"""Entity-like spans in articles, found by rule: exact labels without annotators, and positives that are rare.

============  ==================================================================================================
span          rule
============  ==================================================================================================
``NAME``      two or more words with a capital letter in a row, joined directly or by a particle ("of", "de", …);
              a frequent word ("The", "Dans") does not begin one
``QUANTITY``  a number and a unit or scale word right after it ("12 km", "40 %", "3 millions")
``YEAR``      a number of four digits from 1000 to 2099 that is no quantity
============  ==================================================================================================

The rules read English and French (German capitalises every noun, so its names cannot be told by rule). They are no
substitute for annotation: what they call a name is what they define as one, and a model can learn exactly that.
"""

from __future__ import annotations

import re

from mome_utils.corpus import Document
from mome_utils.tagging import OUTSIDE, Tagged

__all__ = ["ENTITY_LABELS", "tag_entities"]

#: The labels in BIO, in the order of their indices.
ENTITY_LABELS = (OUTSIDE, "B-NAME", "I-NAME", "B-QUANTITY", "I-QUANTITY", "B-YEAR")

_WORD = re.compile(r"\d+(?:[.,\u00a0\u202f]\d+)*|[^\W\d_]+(?:-[^\W\d_]+)*|[^\w\s]|\w+")
_SENTENCE = re.compile(r"(?<=[.!?…])[»”\"')\]]*\s+|\n+")
_PARTICLES = frozenset({"of", "de", "du", "des", "d", "la", "le", "van", "von", "der", "den", "di", "da", "al", "el"})
_UNITS = frozenset(
    "% ° km m cm mm kg g mg t l ha s h k km² m² °c bc ad metre metres meter meters kilometre kilometres kilometer "
    "kilometers mile miles foot feet inch inches ton tons tonne tonnes gram grams kilogram kilograms litre litres "
    "degree degrees percent per hundred thousand million millions billion billions second seconds minute minutes hour "
    "hours day days week weeks month months year years century centuries people inhabitants times "
    "mètre mètres kilomètre kilomètres centimètres millimètres gramme grammes kilogramme kilogrammes degré degrés "
    "cent mille milliard milliards seconde secondes heure heures jour jours semaine semaines mois an ans année années "
    "siècle siècles habitants personnes fois pour".split()
)
_YEAR = re.compile(r"1\d{3}|20\d{2}")


def tag_entities(document: Document, frequent: frozenset[str]) -> Tagged:
    """All words of an article with their labels, and a break at the begin of each sentence.

    Args:
        document: an article.
        frequent: words, in lower case, that begin no name (:func:`mome_utils.token_classes.function_words`).
    """
    text = document.text
    found = list(_WORD.finditer(text))
    words = [m.group() for m in found]
    labels = [OUTSIDE] * len(words)
    i = 0
    while i < len(words):
        end = _quantity(words, i) or _name(words, [m.span() for m in found[i : i + 12]], text, i, frequent)
        if end:
            kind = "QUANTITY" if words[i][0].isdigit() else "NAME"
            labels[i:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - i - 1)]
        elif _YEAR.fullmatch(words[i]):
            labels[i] = "B-YEAR"
        i = end or i + 1
    spans = tuple((m.start(), m.end(), label) for m, label in zip(found, labels, strict=True))
    breaks = tuple(m.end() for m in _SENTENCE.finditer(text) if 0 < m.end() < len(text))
    return Tagged(document.id, document.language, text, spans, breaks)


def _quantity(words: list[str], i: int) -> int:
    """End of the quantity that begins at word ``i``, or 0."""
    if not words[i][0].isdigit() or i + 1 >= len(words) or words[i + 1].lower() not in _UNITS:
        return 0
    return i + 2


def _capital(word: str) -> bool:
    return word[0].isupper() and len(word) > 1


def _name(words: list[str], places: list[tuple[int, int]], text: str, i: int, frequent: frozenset[str]) -> int:
    """End of the name that begins at word ``i``, or 0; only spaces (or an apostrophe) may stand between its words."""
    if not _capital(words[i]) or words[i].lower() in frequent:
        return 0
    end, capitals, at = i + 1, 1, i + 1
    while at < len(words) and at - i < len(places):
        gap = text[places[at - 1 - i][1] : places[at - i][0]]
        if gap.strip(" ") or (not gap and not {words[at - 1], words[at]} & {"’", "'"}):
            break
        if _capital(words[at]) and words[at].lower() not in frequent:
            end, capitals = at + 1, capitals + 1
        elif words[at].lower() not in _PARTICLES and words[at] not in "’'":
            break
        at += 1
    return end if capitals > 1 else 0
