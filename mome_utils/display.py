"""What a notebook shows besides figures: tables as Markdown, and how far a sweep is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from IPython.display import DisplayHandle, Markdown

__all__ = ["SweepProgress", "markdown_table", "rounded"]


def markdown_table(table: pd.DataFrame) -> str:
    """A data frame as a Markdown table, numbers to the right."""
    numeric = [pd.to_numeric(table[c], errors="coerce").notna().any() for c in table.columns]
    lines = [[_cell(c) for c in table.columns], ["---:" if n else "---" for n in numeric]]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(table: pd.DataFrame, digits: int) -> pd.DataFrame:
    """A copy whose numbers, but for whole ones, are texts with ``digits`` decimals; empty where one is missing."""
    shown = table.copy()
    for column in shown.select_dtypes("number").columns:
        if not pd.api.types.is_integer_dtype(shown[column]):
            shown[column] = shown[column].map(lambda v: "" if pd.isna(v) else f"{v:.{digits}f}")
    return shown


def _cell(value: object) -> str:
    """A value as the text of a table's cell: bars do not end it, and a token like <s> is not taken for HTML."""
    text = str(value).replace("|", "\\|")
    return text if "`" in text else text.replace("<", "\\<")


class SweepProgress:
    """One line that tells how far a sweep is; it keeps no timings, so an executed notebook is reproducible."""

    def __init__(self, keys: Sequence[str], folder: Path) -> None:
        self.keys = keys
        self.folder = folder
        self.handle = DisplayHandle()
        self.shown = f"{len(keys)} runs to train"

    def __enter__(self) -> SweepProgress:
        self.handle.display(Markdown(f"*{self.shown}.*"))
        return self

    def _show(self, text: str) -> None:
        if text != self.shown:
            self.shown = text
            self.handle.update(Markdown(f"*{text}.*"))

    def update(self, finished: int) -> None:
        """Show the runs that are done and the steps of those under way."""
        steps = []
        for key in self.keys:
            with contextlib.suppress(FileNotFoundError):  # not begun, or finished just now
                steps.append((self.folder / f"{key}.unfinished" / "progress").read_text(encoding="utf-8"))
        under_way = f"; under way: step {', '.join(s for s in steps if s)}" if steps else ""
        self._show(f"{finished} of {len(self.keys)} runs trained{under_way}")

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._show(f"{len(self.keys)} runs trained")
