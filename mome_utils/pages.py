"""Executed notebooks as web pages that need nothing else: no server, no script, no connection.

nbconvert renders the cells with its plainest template. Figures are inside the page, formulas are MathML, a solution is
folded, links between notebooks lead to the other pages, and links to other files of the repository are plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape, unescape
from typing import Any

import nbformat

from mome_utils.formulas import UnknownFormula, mathml

__all__ = ["INDEX", "html_table", "notebook_page", "page"]

#: The page that the others belong to.
INDEX = "index.html"

_TEMPLATE = """{%- extends 'basic/index.html.j2' -%}
{% block any_cell %}
{%- if 'solution' in cell.metadata.get('tags', []) -%}
<details class="solution"><summary>Solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{% endblock any_cell %}
{% block input %}
<div class="input_area">{{ cell.source | highlight_code(metadata=cell.metadata) }}</div>
{% endblock input %}
"""

_STYLE = """
body { margin: 0 auto; max-width: 54rem; padding: 0 1rem 4rem; color: #222; background: #fff;
       font: 1rem/1.55 system-ui, sans-serif; }
nav { padding: 0.8rem 0; border-bottom: 1px solid #d5d8dc; font-size: 0.9rem; line-height: 1.9; }
nav a { margin-right: 1rem; } nav a[aria-current] { color: #222; font-weight: 600; text-decoration: none; }
a { color: #005f9e; } img, svg { max-width: 100%; height: auto; } h1, h2, h3 { line-height: 1.25; }
pre { overflow-x: auto; padding: 0.6rem 0.8rem; background: #f4f5f7; border-radius: 4px; font-size: 0.82rem;
      line-height: 1.45; }
code { font-size: 0.9em; } .output pre { background: none; border-left: 3px solid #d5d8dc; border-radius: 0; }
table { border-collapse: collapse; font-size: 0.85rem; } .scroll, .rendered_html { overflow-x: auto; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #e4e6e9; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #9aa0a6; } .anchor-link { display: none; } .prompt { display: none; }
details { margin: 1rem 0; } summary { cursor: pointer; color: #005f9e; }
math [mathvariant^="bold"] { font-weight: bold; }
@media (prefers-color-scheme: dark) { :root { color-scheme: light; } }
"""


def page(title: str, body: str, others: Mapping[str, str], here: str, style: str = "") -> str:
    """A whole page: head, links to the other pages, body.

    Args:
        title: of the window.
        body: HTML.
        others: file name to what its link says, in order, the page itself among them.
        here: file name of this page.
        style: more CSS.
    """
    links = "".join(
        f'<a href="{escape(name)}"{" aria-current=page" if name == here else ""}>{escape(said)}</a>'
        for name, said in others.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<nav>{links}</nav>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def notebook_page(notebook: Mapping[str, Any], name: str, others: Mapping[str, str]) -> str:
    """An executed notebook as a page.

    Args:
        notebook: the notebook as JSON data.
        name: its name without suffix; the page is ``<name>.html``.
        others: as for :func:`page`; links to notebooks among them are turned to their pages.
    """
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor

    whole = nbformat.reads(json.dumps(notebook), as_version=4)  # joins the lines of cells and outputs
    body, _ = HTMLExporter(template_name="basic", raw_template=_TEMPLATE).from_notebook_node(whole)
    _, resources = CSSHTMLHeaderPreprocessor(style="default").preprocess(whole, {"config_dir": ""})
    body = re.sub(r'<link[^>]*>|<script\b.*?</script>', "", body, flags=re.DOTALL)
    colors = "\n".join(resources["inlining"]["css"])
    return page(others.get(f"{name}.html", name), _with_links(_with_formulas(body), others), others, f"{name}.html",
                colors)


#: What holds no formulas: code, tags with their attributes, and formulas that are done.
_OPAQUE = re.compile(r"(<pre\b.*?</pre>|<code\b.*?</code>|<details\b[^>]*>|<[^>]*>)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^\s$](?:[^$]*[^\s$])?)\$", re.DOTALL)


def _with_formulas(html: str) -> str:
    """``html`` with formulas between dollar signs as MathML; one that is not known stays as its source."""
    def formula(found: re.Match[str]) -> str:
        display = found.group(1) is not None
        try:
            return mathml(unescape(found.group(1) or found.group(2)), display=display)
        except UnknownFormula:
            return f"<code>{found.group(0)}</code>"

    pieces = _OPAQUE.split(html)
    return "".join(piece if place % 2 else _FORMULA.sub(formula, piece) for place, piece in enumerate(pieces))


def _with_links(html: str, others: Collection[str]) -> str:
    """``html`` with links to notebooks and the README turned to pages; a link to any other file becomes its text."""
    def link(found: re.Match[str]) -> str:
        target, anchor = (*unescape(found.group(1)).split("#", 1), "")[:2]
        if "://" in target or target.startswith("mailto:") or not target:
            return found.group(0)
        name = target.rsplit("/", 1)[-1].replace(".ipynb", ".html")
        name = INDEX if name == "README.md" else name
        if name not in others:
            return found.group(2)
        keep = f"#{anchor}" if anchor and name != INDEX else ""
        return f'<a href="{escape(name + keep)}">{found.group(2)}</a>'

    return re.sub(r'<a href="([^"]*)"[^>]*>(.*?)</a>', link, html, flags=re.DOTALL)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{lines}</tbody></table></div>'
