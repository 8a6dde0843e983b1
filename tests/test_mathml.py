"""Formulas as MathML: every formula of the notebooks, and what stands for what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mome_utils.mathml import UnknownFormula, mathml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def shape(tex: str) -> str:
    """The formula as nested tags and texts, without the annotation."""
    def text(node: ElementTree.Element) -> str:
        inner = "".join(text(child) for child in node) or (node.text or "")
        return inner if node.tag == "mrow" else f"{node.tag}({inner})"

    return text(ElementTree.fromstring(mathml(tex))[0][0])


@pytest.mark.parametrize(("tex", "tree"), [
    ("x_1^2", "msubsup(mi(x)mn(1)mn(2))"),
    (r"\frac12 + \tfrac{a}{b}", "mfrac(mn(1)mn(2))mo(+)mstyle(mfrac(mi(a)mi(b)))"),
    (r"\sum_{i=1}^n p_i", "munderover(mo(∑)mi(i)mo(=)mn(1)mi(n))msub(mi(p)mi(i))"),
    (r"\max_l q", "munder(mi(max)mi(l))mspace()mi(q)"),
    (r"\underbrace{a+b}_{\text{both of them}}", "munder(munder(mi(a)mo(+)mi(b)mo(⏟))mtext(both\u00a0of\u00a0them))"),
    (r"\left( \bar t \right.", "mo(()mover(mi(t)mo(‾))"),
    (r"\mathcal L_{\mathrm{KD}} \le \lVert x\rVert", "msub(mi(ℒ)mi(KD))mo(≤)mo(‖)mi(x)mo(‖)"),
    (r"\sqrt{p_1\,p_2}", "msqrt(msub(mi(p)mn(1))mspace()msub(mi(p)mn(2)))"),
    ("a - 12.5", "mi(a)mo(−)mn(12.5)"),
])
def test_what_stands_for_what(tex: str, tree: str) -> None:
    assert shape(tex) == tree


@pytest.mark.parametrize("tex", [r"\unheard x", "{a", "a}", r"\left( a", "x_", r"\frac1", r"\mathbb{1}"])
def test_what_is_not_known_is_said(tex: str) -> None:
    with pytest.raises(UnknownFormula):
        mathml(tex)


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
