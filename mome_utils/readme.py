"""The results block of the README, between its two markers: a table of notebooks and the ledger, all computed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from mome_utils.claims import CLAIMS, Claim
from mome_utils.config import MomeError
from mome_utils.ledger import TESTED, Entry
from mome_utils.overview import in_words
from mome_utils.runner import read_notebook

__all__ = ["RESULTS", "STUDY", "claims_table", "effect_text", "margin_text", "readme_block", "title_and_question",
           "with_block"]

#: Where the published run's tables lie, and what says which code made them.
RESULTS = "data/results/laptop"
STUDY = "study.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def readme_block(root: Path, entries: Mapping[str, Entry]) -> str:
    """What the README says of the published run.

    Args:
        root: the checkout.
        entries: the published run's ledger.
    """
    study = json.loads((root / RESULTS / STUDY).read_text(encoding="utf-8"))
    lines = ["| Notebook | Question | First run |", "|---|---|---:|"]
    for name, entry in study["notebooks"].items():
        title, question = title_and_question(read_notebook(root / "notebooks" / f"{name}.ipynb"))
        took = in_words(round(entry["first_run_seconds"]))
        if entry["extended_seconds"]:
            took += f" (extended arms: {in_words(round(entry['extended_seconds']))} more)"
        lines.append(f"| [{title}](notebooks/{name}.ipynb) | {question} | {took} |")
    total = in_words(sum(entry["first_run_seconds"] for entry in study["notebooks"].values()))
    cores = study["cores"]
    asked = " `--arms extended` trains the extended arms too, as was done here." if study["arms"] == "extended" else ""
    lines += ["", f"Together {total} on {cores} processor cores the first time, and seconds after that.{asked}"
              + _trained(study["notebooks"]), ""]
    return "\n".join([*lines, *claims_table(entries, root)])


def _trained(notebooks: Mapping[str, Mapping[str, Any]]) -> str:
    """How many language models the published run trained on how many tokens, each run counted once."""
    every: dict[str, int] = {}
    core: dict[str, int] = {}
    for entry in notebooks.values():
        every |= entry["tokens"]
        core |= {run: tokens for run, tokens in entry["tokens"].items() if run not in entry["extended"]}

    def described(runs: Mapping[str, int]) -> str:
        return f"{len(runs):,} language models on {sum(runs.values()) / 1e6:,.0f} million tokens"

    more = f" (with the extended arms {described(every)})" if len(every) > len(core) else ""
    return f" It trains {described(core)}{more}." if every else ""


def claims_table(entries: Mapping[str, Entry], root: Path | None = None) -> list[str]:
    """The ledger as lines of Markdown, with a sentence on how it is judged.

    Args:
        entries: of a run.
        root: a checkout; each claim is then linked to the figure there that shows it, or to its notebook.
    """
    lines = ["| Claim | As published | Effect here, with 95 % interval | Margin | Verdict |", "|---|---|---:|---:|---|"]
    for entry in entries.values():
        claim = CLAIMS[entry.claim]
        name = f"[{claim.id}]({target})" if (target := _target(entry, root)) else claim.id
        lines.append(f"| {name} | {claim.statement} | {effect_text(entry)} | {margin_text(claim)} | {entry.verdict} |")
    alone = [entry.claim for entry in entries.values() if entry.verdict != entry.alone]
    beside = ""
    if alone:
        beside = f" Decided by its own interval, but not beside the others: {', '.join(alone)}."
    how = ("With a probability of at least 95 % none of these verdicts is wrong (Holm's procedure over the "
           f"{len(TESTED)} claims that can be decided).")
    return [*lines, "", how + beside]


def effect_text(entry: Entry) -> str:
    """An effect with its interval and unit; empty where nothing was run."""
    if isnan(entry.estimate):
        return ""
    known = isfinite(entry.low) and isfinite(entry.high)
    limits = f"({entry.low:+.4f} to {entry.high:+.4f})" if known else "(no interval)"
    return f"{entry.estimate:+.4f} {limits} {CLAIMS[entry.claim].unit}"


def margin_text(claim: Claim) -> str:
    """A claim's margin; a dash where its value alone is the answer."""
    return f"{claim.margin:g}" if claim.margin else "–"


def with_block(readme: str, block: str) -> str:
    """``readme`` with the text between its two result markers replaced.

    Raises:
        MomeError: it has no such markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MomeError(f"README.md needs the lines {BEGIN} and {END} to put the results between.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def title_and_question(notebook: Mapping[str, Any]) -> tuple[str, str]:
    """The title of a notebook and the question it opens with, from its first cell."""
    text = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    title, _, rest = text.partition("\n")
    question = re.search(r"[^*?]*?([A-Z][^*?]*\?)", rest.replace("Question.", ""))
    return title.lstrip("# ").strip(), " ".join(question.group(1).split()) if question else ""


def _target(entry: Entry, root: Path | None) -> str:
    """What shows a claim, as a path from ``root``; empty where there is nothing yet."""
    if root is None:
        return ""
    figure, notebook = f"figures/{entry.notebook}/{entry.figure}.svg", f"notebooks/{entry.notebook}.ipynb"
    if entry.figure and (root / figure).is_file():
        return figure
    return notebook if (root / notebook).is_file() else ""
