"""Formulas as MathML: every formula of the notebooks, and what stands for what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.formulas import UnknownFormula, mathml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def shape(tex: str, display: bool = False) -> str:
    """The formula as nested tags and texts, without the annotation."""
    def text(node: ElementTree.Element) -> str:
        inner = "".join(text(child) for child in node) or (node.text or "")
        return inner if node.tag == "mrow" else f"{node.tag}({inner})"

    return text(ElementTree.fromstring(mathml(tex, display=display))[0][0])


@pytest.mark.parametrize(("tex", "tree"), [
    ("x_1^2", "msubsup(mi(x)mn(1)mn(2))"),
    (r"\frac12 + \tfrac{a}{b}", "mfrac(mn(1)mn(2))mo(+)mstyle(mfrac(mi(a)mi(b)))"),
    (r"\underbrace{a+b}_{\text{both of them}}", "munder(munder(mi(a)mo(+)mi(b)mo(⏟))mtext(both\u00a0of\u00a0them))"),
    (r"\left( \bar t \right.", "mo(()mover(mi(t)mo(¯))mo()"),
    (r"\mathcal L_{\mathrm{KD}} \le \lVert x\rVert", "msub(mi(ℒ)mi(K)mi(D))mo(≤)mo(‖)mi(x)mo(‖)"),
    (r"\mathbb{E} \mathcal{B}", "mi(𝔼)mi(ℬ)"),
    (r"\sqrt{p_1\,p_2}", "msqrt(msub(mi(p)mn(1))mspace()msub(mi(p)mn(2)))"),
    ("a - 12.5", "mi(a)mo(−)mn(12.5)"),
])
def test_what_stands_for_what(tex: str, tree: str) -> None:
    assert shape(tex) == tree


def test_limits_stand_below_and_above_on_a_line_of_their_own() -> None:
    sides = "mo(∑)mi(i)mo(=)mn(1)mi(n)"
    assert shape(r"\sum_{i=1}^n") == f"msubsup({sides})"
    assert shape(r"\sum_{i=1}^n", display=True) == f"munderover({sides})"


def test_names_of_functions_keep_their_distance_from_letters_only() -> None:
    gap = "mspace()"
    assert shape(r"p \log q") == f"mi(p){gap}mi(log){gap}mi(q)"
    assert shape(r"-\log_2 (q)") == "mo(−)msub(mi(log)mn(2))mo(()mi(q)mo())"
    assert shape(r"\frac{\log x}{2}") == f"mfrac(mi(log){gap}mi(x)mn(2))"


@pytest.mark.parametrize(("tex", "words"), [
    (r"1 + \unheard{x}", r"command \\unheard in a formula is not known"), (r"\frac{\unheard}{2}", r"command \\unheard"),
    ("{a", "brace in the formula '{a' is not closed"), ("a}", "brace in the formula 'a}' is not opened"),
    (r"\left( a", "is not TeX .*missing right"), ("x_", "is not TeX"), ("a^b^c", "double superscripts"),
    ("", "is not TeX"),
    (r"\frac1", "lacks an argument"), (r"\text", "lacks an argument"), (r"\mathbb{1}", "for letters only"),
    (r"\href{https://example.org}{x}", "no links"),
])
def test_what_is_not_known_is_said(tex: str, words: str) -> None:
    with pytest.raises(UnknownFormula, match=words):
        mathml(tex)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["x", "12", "+", "(", "{", "}", "_", "^", "'", "&", "<", "\\frac", "\\sqrt", "\\text",
                                 "\\mathrm", "\\left(", "\\right)", "\\log", "\\sum", "\\bar", "\\big(", "\\\\", "$"]),
                max_size=8).map("".join))
def test_any_text_is_a_formula_or_is_refused(tex: str) -> None:
    try:
        made = mathml(tex)
    except UnknownFormula:
        return
    assert "".join(ElementTree.fromstring(made).itertext()).endswith(tex.strip())


def test_the_source_is_kept_and_nothing_gets_out_of_it() -> None:
    made = mathml(r"a < b \text{ & <script>}", display=True)
    assert 'display="block"' in made and "<script>" not in made
    assert ElementTree.fromstring(made)[0][-1].text == r"a < b \text{ & <script>}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks_is_known(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for display, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.sub(r"`[^`]*`", "", prose), re.DOTALL):
        ElementTree.fromstring(mathml(display or inline, display=bool(display)))
