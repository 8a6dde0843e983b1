"""TeX formulas as MathML, which browsers show without a script, a font or a connection.

The library latex2mathml makes the elements. What it lets pass is refused here, and three things are made fit for
browsers that know MathML Core only: letters in another face are Unicode's own letters, names of functions keep their
distance, and nothing in a formula can become markup of the page.
"""

from __future__ import annotations

import re
from html import unescape
from html.entities import html5
from types import MappingProxyType
from typing import cast
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from latex2mathml import exceptions
from latex2mathml.converter import convert_to_element

from mome_utils.config import MomeError

__all__ = ["UnknownFormula", "mathml"]

#: How many parts these elements have.
_PARTS = MappingProxyType({"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "mroot": 2, "msubsup": 3,
                           "munderover": 3})
#: Faces that MathML Core leaves to Unicode's letters, by the ending of their names in HTML.
_FACES = MappingProxyType({"script": "scr;", "double-struck": "opf;", "fraktur": "fr;"})
#: Errors of latex2mathml, which have no common class.
_ERRORS = tuple(
    found for found in vars(exceptions).values() if isinstance(found, type) and issubclass(found, Exception)
)


class UnknownFormula(MomeError):
    """A formula that is not TeX, or has a command that is not known here."""


def mathml(tex: str, *, display: bool = False) -> str:
    """A formula as a ``<math>`` element with its TeX source as annotation.

    Args:
        tex: the source between the dollar signs.
        display: on a line of its own.

    Raises:
        UnknownFormula: names the command, or what is missing.

    Example:
        >>> mathml("x_1")[:46]
        '<math display="inline"><semantics><mrow><msub>'
    """
    source = tex.strip()
    _check_braces(source)
    try:
        root = convert_to_element(source, display="block" if display else "inline")
    except _ERRORS as error:
        what = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__.removesuffix("Error")).lower()
        raise UnknownFormula(f"The formula '{source}' is not TeX ({what}): correct it.") from error
    except (StopIteration, ValueError) as error:  # so it ends where a command's argument is not there
        raise UnknownFormula(f"A command in the formula '{source}' lacks an argument: add it.") from error
    for node in root.iter():
        _finish(node, source)
    _space_names(root)
    row = root[0]
    root.remove(row)
    meaning = SubElement(root, "semantics")
    meaning.append(row)
    SubElement(meaning, "annotation", encoding="application/x-tex").text = source
    del root.attrib["xmlns"]  # a page of HTML knows the element
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _check_braces(source: str) -> None:
    """Refuse braces without a partner, which latex2mathml shows or overlooks."""
    depth = 0
    for brace in re.findall(r"[{}]", re.sub(r"\\.", "", source)):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        missing = "opened" if depth < 0 else "closed"
        raise UnknownFormula(f"A brace in the formula '{source}' is not {missing}: correct it.")


def _finish(node: Element, source: str) -> None:
    """Characters for references, letters for faces; refuse what was not understood.

    Raises:
        UnknownFormula: a command that was taken for a letter, or an element that lacks a part.
    """
    text = node.text = unescape(node.text or "")
    if found := re.search(r"\\[A-Za-z]+|\\.", text):
        raise UnknownFormula(f"The command {found[0]} in a formula is not known here: write it in another way.")
    if "href" in node.attrib:
        raise UnknownFormula("A formula holds no links: put the link beside it.")
    if len(node) != _PARTS.get(node.tag, len(node)):
        raise UnknownFormula(f"A command in the formula '{source}' lacks an argument: add it.")
    ending = _FACES.get(node.get("mathvariant", ""))
    if ending:
        if any(letter + ending not in html5 for letter in text):
            raise UnknownFormula(f"There is no {node.get('mathvariant')} '{text}': use that face for letters only.")
        node.text = "".join(html5[letter + ending] for letter in text)
        del node.attrib["mathvariant"]


def _space_names(node: Element) -> None:
    """A thin space between the name of a function and a symbol beside it, as TeX sets it."""
    children = list(node)
    if node.tag in ("math", "mrow", "mstyle", "msqrt", "mtd"):
        for place in range(len(children) - 1, 0, -1):
            left, right = children[place - 1], children[place]
            if (_is_name(left) or _is_name(right)) and not {left.tag, right.tag} & {"mo", "mspace", "mtext"}:
                node.insert(place, ElementTree.Element("mspace", width="0.167em"))
    for child in children:
        _space_names(child)


def _is_name(node: Element) -> bool:
    """Whether an element is ``log`` or its like, with scripts or without."""
    while node.tag in _PARTS and node.tag != "mfrac":
        node = node[0]
    return node.tag == "mi" and len(cast(str, node.text)) > 1 and cast(str, node.text).isascii()
