"""What each name, sign and word of Python source is, exactly: the standard tokenizer and syntax tree say so.

==============  =====================================================================
label           a token is one if it is
==============  =====================================================================
``keyword``     a reserved word
``definition``  the name after ``def`` or ``class``
``call``        the name of what is called, ``f`` in ``f(x)`` and in ``a.f(x)``
``argument``    a parameter in a ``def`` or ``lambda``, or a keyword in a call
``attribute``   a name after a dot that is not called
``name``        any other identifier
``string``      part of a string, docstring or f-string (each of its words)
``number``      a number
``comment``     part of a comment (each of its words)
``operator``    an operator or a delimiter
==============  =====================================================================
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import token as kinds
import tokenize
import warnings

from mome_utils.corpus import Document
from mome_utils.tagging import Tagged, Word

__all__ = ["PYTHON_LABELS", "tag_python"]

#: The labels, in the order of their indices.
PYTHON_LABELS = (
    "keyword", "definition", "call", "argument", "attribute", "name", "string", "number", "comment", "operator",
)
_PIECE = re.compile(r"\S+")
_PLAIN = {kinds.NUMBER: "number", kinds.OP: "operator"}
# From Python 3.12 on the tokenizer takes f-strings apart; here each is one string in every version.
_OPENS = {getattr(kinds, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(kinds, name)}
_CLOSES = {getattr(kinds, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(kinds, name)}


def tag_python(document: Document) -> Tagged | None:
    """The labelled words of a module, with a break at the begin of each line; ``None`` if it does not parse."""
    text = document.text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in somebody's string is no concern of ours
            roles = _roles(ast.parse(text))
        tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="").readline))
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return None
    lines = io.StringIO(text, newline="").readlines()
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    words: list[Word] = []
    depth, opened, before = 0, 0, ""
    for item in tokens:
        begin = starts[item.start[0] - 1] + item.start[1]
        end = starts[item.end[0] - 1] + item.end[1]
        if item.type in _OPENS:
            opened, depth = (begin, 1) if not depth else (opened, depth + 1)
        elif item.type in _CLOSES:
            depth -= 1
            if not depth:
                words += _pieces(text, opened, end, "string")
        elif depth or not item.string.strip():
            pass
        elif item.type in (kinds.STRING, kinds.COMMENT):
            words += _pieces(text, begin, end, "string" if item.type == kinds.STRING else "comment")
        elif item.type in _PLAIN:
            words.append((begin, end, _PLAIN[item.type]))
        elif item.type == kinds.NAME:
            row, column = item.start
            place = (row, len(lines[row - 1][:column].encode()))
            words.append((begin, end, _of_name(item.string, before, roles.get(place, "name"))))
        before = item.string
    return Tagged(document.id, document.language, text, tuple(words), tuple(starts[1:-1]))


def _pieces(text: str, begin: int, end: int, label: str) -> list[Word]:
    return [(begin + m.start(), begin + m.end(), label) for m in _PIECE.finditer(text[begin:end])]


def _of_name(name: str, before: str, role: str) -> str:
    if keyword.iskeyword(name):
        return "keyword"
    return "definition" if before in ("def", "class") else role


def _roles(tree: ast.AST) -> dict[tuple[int, int], str]:
    """Where the syntax tree gives a name a part to play: (line, byte in it) → label."""
    roles: dict[tuple[int, int], str] = {}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.keyword)):
            roles[node.lineno, node.col_offset] = "argument"
        elif isinstance(node, ast.Attribute):
            # The node ends where the attribute's own name does.
            assert node.end_lineno is not None and node.end_col_offset is not None
            place = (node.end_lineno, node.end_col_offset - len(node.attr.encode()))
            roles[place] = "call" if id(node) in called else "attribute"
        elif isinstance(node, ast.Name) and id(node) in called:
            roles[node.lineno, node.col_offset] = "call"
    return roles
