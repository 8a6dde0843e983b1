"""``mome report``: the ledger as a figure, as tables and in the README, and all notebooks as pages to take along.

Two things are called by that name. The *published* report is tracked: ``figures/claims.svg``,
``data/results/laptop/claims.csv`` and ``claims.md``, and the block of the README, all made of the tracked result tables
and of nothing else, so that a test can make them again. The report of a *run* is the same for any run, below its own
folder, with the executed notebooks as web pages (:mod:`mome_utils.pages`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mome_utils.artifacts import digest, file_digest, source_digest, write_atomic
from mome_utils.claims import CLAIMS
from mome_utils.config import MomeError, profile_names
from mome_utils.evidence import contradictions, read_evidence
from mome_utils.ledger import TESTED, Entry, ledger, ledger_table
from mome_utils.pages import INDEX, html_table, notebook_page, page
from mome_utils.readme import (
    RESULTS,
    STUDY,
    claims_table,
    effect_text,
    margin_text,
    readme_block,
    title_and_question,
    with_block,
)
from mome_utils.runner import read_notebook, select_notebooks

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FIGURE", "known_ledgers", "ledger_csv", "ledger_text", "report_disagreements", "write_pages",
           "write_report"]

#: The published forest plot.
FIGURE = "figures/claims.svg"
#: Digits of the tables: more than anyone reads, fewer than machines differ in.
DIGITS = "%.6g"


# ------------------------------------------------------------------------------------------------- what is tracked


def write_report(root: Path) -> dict[str, Entry]:
    """Write the published report of the checkout ``root`` from its tracked tables, and return the ledger.

    Raises:
        MomeError: nothing has been published, or the README has no place for it.
    """
    study_path = root / RESULTS / STUDY
    if not study_path.is_file():
        raise MomeError(f"{RESULTS}/{STUDY} is missing: run 'mome study' and 'mome publish' first.")
    entries = ledger(root / RESULTS)
    readme = (root / "README.md").read_text(encoding="utf-8")
    replaced = with_block(readme, readme_block(root, entries))
    write_figure(entries, root / FIGURE)
    for name, text in _tables(entries).items():
        write_atomic(root / RESULTS / name, text)
    study = json.loads(study_path.read_text(encoding="utf-8"))
    study["report"] = {FIGURE: file_digest(root / FIGURE), "drawn_from": _drawn_from(entries)}
    write_atomic(study_path, json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    write_atomic(root / "README.md", replaced)
    return entries


def report_disagreements(root: Path) -> list[str]:
    """Where README, figure or tables are not what the tracked result tables say, one sentence each."""
    results = root / RESULTS
    evidence = read_evidence(results)
    found, entries = contradictions(results, evidence), ledger(results, evidence)
    for name, text in _tables(entries).items():
        path = results / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(f"{RESULTS}/{name} does not show the published results: run 'mome report'.")
    drawn = json.loads((results / STUDY).read_text(encoding="utf-8")).get("report", {})
    figure = root / FIGURE
    if not figure.is_file() or drawn != {FIGURE: file_digest(figure), "drawn_from": _drawn_from(entries)}:
        found.append(f"{FIGURE} does not show the published results: run 'mome report'.")
    readme = (root / "README.md").read_text(encoding="utf-8")
    if with_block(readme, readme_block(root, entries)) != readme:
        found.append("README.md does not show the published results.")
    return found


def write_figure(entries: Mapping[str, Entry], path: Path) -> None:
    """Draw the forest plot of a ledger."""
    from mome_utils.figures import save_svg
    from mome_utils.figures_claims import effects_in_margins

    save_svg(effects_in_margins(ledger_table(entries)), path)


def ledger_csv(entries: Mapping[str, Entry]) -> str:
    """The whole ledger as CSV, one line per claim; columns as in :func:`mome_utils.ledger.ledger_table`."""
    return str(ledger_table(entries).to_csv(index=False, float_format=DIGITS, lineterminator="\n"))


def known_ledgers(root: Path, own: str, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The ledgers of several scales, from the smallest: a run's own, the published one and those kept beside it.

    Args:
        root: the checkout. Kept ledgers are ``data/benchmarks/claims_<profile>.csv``: the ``claims.csv`` of the report
            of a run at that profile.
        own: the profile of the run.
        table: its :func:`mome_utils.ledger.ledger_table`, which replaces any other of that profile.
    """
    import pandas as pd

    files = {path.stem.removeprefix("claims_"): path for path in (root / "data/benchmarks").glob("claims_*.csv")}
    files = {"laptop": root / RESULTS / "claims.csv"} | files
    found = {name: pd.read_csv(path) for name, path in files.items() if path.is_file() and name != own} | {own: table}
    order = {name: place for place, name in enumerate(profile_names())}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _tables(entries: Mapping[str, Entry]) -> dict[str, str]:
    return {"claims.csv": ledger_csv(entries), "claims.md": "\n".join(claims_table(entries)) + "\n"}


def _drawn_from(entries: Mapping[str, Entry]) -> str:
    """What the figure shows, as a digest: another plotting library may draw other bytes of the same."""
    return digest([ledger_csv(entries), source_digest("mome_utils.figures_claims")])


# ---------------------------------------------------------------------------------------------------- what a run has


def write_pages(folder: Path, root: Path, executed: Path | None = None, results: Path | None = None) -> Path:
    """Write ``report/index.html`` and a page for every executed notebook below a run's folder.

    A page is made again only when its notebook, or what turns it into a page, has changed.

    Args:
        folder: of a run (``data/artifacts/<profile>``); what lies in its ``report`` and is not of this report goes.
        root: the checkout, for the order of the notebooks.
        executed: where the executed notebooks lie; by default the run's.
        results: where the result tables lie; by default the run's.

    Returns:
        The index page.
    """
    out = folder / "report"
    entries = ledger(results or folder / "results")
    notebooks = {path.stem: (executed or folder / "notebooks") / path.name for path in select_notebooks(root)}
    present = {name: read_notebook(path) for name, path in notebooks.items() if path.is_file()}
    others = {INDEX: "Claims"} | {f"{name}.html": title_and_question(nb)[0] or name for name, nb in present.items()}
    code = source_digest("mome_utils.pages", "mome_utils.formulas")
    for name, notebook in present.items():
        path, mark = out / f"{name}.html", f"<!-- made of {digest([notebook, others, code])} -->\n"
        if not path.is_file() or not path.read_text(encoding="utf-8").endswith(mark):
            write_atomic(path, notebook_page(notebook, name, others) + mark)
    write_figure(entries, out / "claims.svg")
    for name, text in _tables(entries).items():
        write_atomic(out / name, text)
    write_atomic(out / INDEX, _index(entries, others, out, folder.name))
    for path in out.glob("*.html"):
        if path.name not in others:
            path.unlink()
    return out / INDEX


def _index(entries: Mapping[str, Entry], others: Mapping[str, str], out: Path, name: str) -> str:
    """The first page: the ledger, its figure, and the way to everything else."""
    rows = []
    for entry in entries.values():
        claim = CLAIMS[entry.claim]
        where = f"{entry.notebook}.html"
        link = f'<a href="{escape(where)}">{claim.id}</a>' if where in others else claim.id
        rows.append([link, escape(claim.statement), escape(effect_text(entry)), margin_text(claim),
                     f'<span title="{escape(entry.reason)}">{escape(entry.verdict)}</span>'])
    table = html_table(["Claim", "As published", "Effect here, with 95 % interval", "Margin", "Verdict"], rows)
    drawing = (out / "claims.svg").read_text(encoding="utf-8")
    drawing = '<svg role="img" aria-label="Every effect in its margins"' + drawing.partition("<svg")[2]
    links = "".join(f'<li><a href="{escape(where)}">{escape(said)}</a></li>' for where, said in others.items()
                    if where != INDEX)
    said = escape(claims_table(entries)[-1])
    body = (f"<h1>What of the paper holds</h1>\n<p>The run <em>{escape(name)}</em>: every claim, its effect, and its "
            f"verdict ({len(TESTED)} claims can be decided, the others are questions answered by a value).</p>\n"
            f"{table}\n<p>{said}</p>\n"
            f"<figure>{drawing}<figcaption>Each effect divided by the margin of its claim.</figcaption></figure>\n"
            f'<p>The same as a table: <a href="claims.csv">CSV</a>, <a href="claims.md">Markdown</a>, '
            f'<a href="claims.svg">figure</a>.</p>\n<h2>Notebooks</h2>\n<ul>{links}</ul>')
    return page("Claims", body, others, INDEX)


def ledger_text(entries: Mapping[str, Entry]) -> str:
    """The ledger for a terminal: a line per claim with its verdict and effect."""
    lines = (f"{entry.claim:<5} {entry.verdict:<23} {effect_text(entry)}" for entry in entries.values())
    return "\n".join(line.rstrip() for line in lines)
