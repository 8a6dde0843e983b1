"""TeX formulas as MathML, which browsers show without a script, a font or a connection.

It knows what the notebooks write: groups, sub- and superscripts, fractions, roots, accents, braces with a text, named
operators, delimiters of any size, and every symbol whose TeX name is also one of HTML. For anything else it says so
(:class:`UnknownFormula`), and whoever asked can show the source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from html.entities import html5
from types import MappingProxyType

from mome_utils.config import MomeError

__all__ = ["UnknownFormula", "mathml"]

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|[^\s\\]|\s+")
_NAMED = frozenset("arg cos det dim exp inf lim log ln max min Pr sin sup tan".split())
_LIMITS = frozenset("arg det inf lim max min Pr sup".split())
_LARGE = MappingProxyType({"sum": "∑", "prod": "∏", "int": "∫", "bigcup": "⋃", "bigcap": "⋂"})
#: Symbols whose TeX name is not their name in HTML, or is that of another.
_SYMBOLS: Mapping[str, str] = MappingProxyType({
    "lVert": "‖", "rVert": "‖", "Vert": "‖", "|": "‖", "lvert": "|", "rvert": "|", "cdot": "·", "times": "×", "le": "≤",
    "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "infty": "∞", "to": "→", "mid": "∣", "dots": "…",
    "ldots": "…", "cdots": "⋯", "top": "⊤", "circ": "∘", "odot": "⊙", "langle": "⟨", "rangle": "⟩", "lfloor": "⌊",
    "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "epsilon": "ϵ", "varepsilon": "ε", "phi": "ϕ", "varphi": "φ", "{": "{",
    "}": "}", "%": "%", "_": "_", "&": "&", "$": "$", "#": "#", "prime": "′", "ell": "ℓ", "sim": "∼", "propto": "∝",
    "setminus": "∖", "star": "⋆", "ast": "∗", "pm": "±", "nabla": "∇", "Rightarrow": "⇒", "rightarrow": "→",
    "partial": "∂",
})  # fmt: skip
_SPACES: Mapping[str, str] = MappingProxyType({
    ",": "0.17em", ":": "0.22em", ";": "0.28em", "!": "-0.17em", " ": "0.33em", "quad": "1em", "qquad": "2em",
})  # fmt: skip
_ACCENTS: Mapping[str, str] = MappingProxyType({
    "bar": "‾", "overline": "‾", "hat": "^", "tilde": "~", "widehat": "^", "vec": "→", "dot": "˙",
})  # fmt: skip
_FONTS = frozenset("mathrm operatorname text textrm mathbf mathbb mathcal mathit boldsymbol".split())
_SIZES = frozenset(f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m"))


class UnknownFormula(MomeError):
    """A formula with a command that is not known here."""


def mathml(tex: str, *, display: bool = False) -> str:
    """A formula as a ``<math>`` element with its TeX source as annotation.

    Args:
        tex: the source between the dollar signs.
        display: on a line of its own.

    Raises:
        UnknownFormula: names the command, or what is missing.

    Example:
        >>> mathml("x_1")[:32]
        '<math><semantics><mrow><msub><mi'
    """
    tokens = _Tokens(tex)
    body = _row(tokens, closing="")
    kind = ' display="block"' if display else ""
    note = f'<annotation encoding="application/x-tex">{escape(tex.strip())}</annotation>'
    return f"<math{kind}><semantics>{body}{note}</semantics></math>"


class _Tokens:
    """The source piece by piece, with one piece of look-ahead; space is dropped except where a text is read."""

    def __init__(self, tex: str) -> None:
        self._pieces = _TOKEN.findall(tex)
        self._at = 0

    def peek(self) -> str:
        while self._at < len(self._pieces) and self._pieces[self._at].isspace():
            self._at += 1
        return self._pieces[self._at] if self._at < len(self._pieces) else ""

    def take(self) -> str:
        piece = self.peek()
        self._at += 1
        return piece

    def digit(self) -> str:
        """One digit, as TeX takes the argument of ``\\frac12``; the number's other digits stay."""
        piece = self.take()
        if len(piece) > 1:
            self._at -= 1
            self._pieces[self._at] = piece[1:]
        return piece[0]

    def text(self) -> str:
        """What stands in braces, as it is written."""
        if self.take() != "{":
            raise UnknownFormula("A text in a formula needs braces: write \\text{…}.")
        depth = 1
        parts: list[str] = []
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            self._at += 1
            depth += (piece == "{") - (piece == "}")
            if depth == 0:
                return "".join(parts)
            parts.append(piece)
        raise UnknownFormula("A brace in a formula is not closed.")


def _row(tokens: _Tokens, closing: str) -> str:
    """Everything up to ``closing``, which is taken, as one ``<mrow>``."""
    parts = []
    while (piece := tokens.peek()) != closing:
        if piece in ("", "}", "\\right"):
            raise UnknownFormula(f"A formula ends or closes with {piece or 'nothing'!r} where {closing!r} is due.")
        parts.append(_scripted(tokens))
    if closing:
        tokens.take()
    return f"<mrow>{''.join(parts)}</mrow>"


def _scripted(tokens: _Tokens) -> str:
    """An atom with what stands below and above it."""
    piece = tokens.peek()
    name = piece[1:] if piece.startswith("\\") else ""
    limits = name in _LARGE or name in _LIMITS or name in ("underbrace", "overbrace")
    base, scripts = _atom(tokens), {}
    while (mark := tokens.peek()) in ("_", "^", "'"):
        tokens.take()
        scripts["^" if mark == "'" else mark] = "<mo>′</mo>" if mark == "'" else _argument(tokens)
    below, above = scripts.get("_"), scripts.get("^")
    after = '<mspace width="0.17em"/>' if name in _NAMED and tokens.peek() not in ("(", "[", "") else ""
    if not scripts:
        return base + after
    if below and above:
        tag, inner = ("munderover" if limits else "msubsup"), base + below + above
    elif below:
        tag, inner = ("munder" if limits else "msub"), base + below
    else:
        tag, inner = ("mover" if limits else "msup"), base + str(above)
    return f"<{tag}>{inner}</{tag}>{after}"


def _argument(tokens: _Tokens) -> str:
    """What a command or a script applies to: a group, or one digit, or one atom."""
    piece = tokens.peek()
    if piece[:1].isdigit():
        return f"<mn>{tokens.digit()}</mn>"
    return _atom(tokens)


def _atom(tokens: _Tokens) -> str:
    piece = tokens.take()
    if piece == "{":
        return _row(tokens, "}")
    if piece.startswith("\\"):
        return _command(piece[1:], tokens)
    if piece in ("", "_", "^", "}"):
        raise UnknownFormula(f"A formula has {piece or 'nothing'!r} where a symbol is due.")
    if piece[0].isdigit():
        return f"<mn>{piece}</mn>"
    if piece.isalpha():
        return f"<mi>{escape(piece)}</mi>"
    return _operator({"-": "−", "*": "∗"}.get(piece, piece))


def _operator(symbol: str, stretchy: bool = False) -> str:
    fixed = "" if stretchy or symbol not in "()[]{}|‖/" else ' stretchy="false"'
    return f"<mo{fixed}>{escape(symbol)}</mo>"


def _command(name: str, tokens: _Tokens) -> str:
    """What a backslash and ``name`` stand for."""
    if name in ("frac", "tfrac", "dfrac"):
        fraction = f"<mfrac>{_argument(tokens)}{_argument(tokens)}</mfrac>"
        return f'<mstyle displaystyle="false">{fraction}</mstyle>' if name == "tfrac" else fraction
    if name == "sqrt":
        return f"<msqrt>{_argument(tokens)}</msqrt>"
    if name in _FONTS:
        return _font(name, tokens)
    if name in ("underbrace", "overbrace"):
        tag, brace = ("munder", "⏟") if name == "underbrace" else ("mover", "⏞")
        return f"<{tag}>{_argument(tokens)}<mo>{brace}</mo></{tag}>"
    if name in _ACCENTS:
        return f'<mover accent="true">{_argument(tokens)}<mo>{_ACCENTS[name]}</mo></mover>'
    if name in _SIZES:
        return _operator(_symbol(tokens.take()))
    if name == "left":
        opening = _symbol(tokens.take())
        inside = _row(tokens, "\\right")
        ends = (opening, _symbol(tokens.take()))
        left, right = ("" if symbol == "." else _operator(symbol, stretchy=True) for symbol in ends)
        return f"<mrow>{left}{inside}{right}</mrow>"
    if name in _SPACES:
        return f'<mspace width="{_SPACES[name]}"/>'
    if name in _LARGE:
        return f"<mo>{_LARGE[name]}</mo>"
    if name in _NAMED:
        return f"<mi>{name}</mi>"
    symbol = _symbol(f"\\{name}")
    return f"<mi>{symbol}</mi>" if symbol.isalpha() else _operator(symbol)


def _font(name: str, tokens: _Tokens) -> str:
    """Letters in another face; MathML Core has Unicode's own letters for these."""
    if name in ("text", "textrm", "mathrm", "operatorname"):
        words = tokens.text() if tokens.peek() == "{" else tokens.take()
        tag = "mtext" if name.startswith("text") else "mi"
        plain = ' mathvariant="normal"' if tag == "mi" and len(words) == 1 else ""
        return f"<{tag}{plain}>{escape(words).replace(' ', '&#160;')}</{tag}>"
    letters = tokens.text() if tokens.peek() == "{" else tokens.take()
    if not re.fullmatch(r"[A-Za-z]+", letters):
        raise UnknownFormula(f"\\{name} in a formula takes letters, not {letters!r}.")
    return f"<mi>{''.join(_in_face(letter, name) for letter in letters)}</mi>"


def _in_face(letter: str, name: str) -> str:
    """A letter of Unicode's mathematical alphabets, by the name HTML gives it."""
    suffix = {"mathcal": "scr;", "mathbb": "opf;"}.get(name)
    if suffix:
        return html5[letter + suffix]
    if name in ("mathbf", "boldsymbol"):
        return chr((0x1D400 if letter.isupper() else 0x1D41A - 32) + ord(letter) - ord("A"))
    return letter


def _symbol(piece: str) -> str:
    """The character of a symbol, a delimiter or a letter."""
    if not piece.startswith("\\"):
        return piece
    name = piece[1:]
    found = _SYMBOLS.get(name) or html5.get(f"{name};")
    if found is None:
        raise UnknownFormula(f"The command \\{name} in a formula is not known here: add it to mome_utils.mathml.")
    return found
