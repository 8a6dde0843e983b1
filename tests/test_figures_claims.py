"""Figures of the ledger: what they show of each claim, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_results import small_study

from mome_utils.figures import FigureError, save_svg
from mome_utils.figures_claims import VERDICT_LOOKS, coverage_of_intervals, effects_in_margins, verdicts_by_scale
from mome_utils.ledger import ledger, ledger_table, scale_table


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return ledger_table(ledger(small_study(tmp_path)))


def test_every_claim_has_a_row_and_effects_are_in_margins(table: pd.DataFrame, tmp_path: Path) -> None:
    figure = effects_in_margins(table)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(table["claim"])
    markers = {round(float(line.get_ydata()[0])): float(line.get_xdata()[0])
               for line in ax.lines if len(line.get_xdata()) == 1}
    ran = table[table["estimate"].notna() & (table["margin"] > 0)]
    assert markers == {row: pytest.approx(one["estimate"] / one["margin"]) for row, one in ran.iterrows()}
    texts = " ".join(note.get_text() for note in ax.texts)
    assert "+0.0200 points" in texts and texts.count("not run") == (table["verdict"] == "not run").sum()
    save_svg(figure, tmp_path / "a.svg")
    save_svg(effects_in_margins(table), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_effect_without_limits_is_drawn_without_a_line(table: pd.DataFrame) -> None:
    limits = ["low", "high", "low_all", "high_all"]
    open_ended = table.assign(**{name: np.where(name.startswith("low"), -np.inf, np.inf) for name in limits})
    assert not [line for line in effects_in_margins(open_ended).axes[0].collections if hasattr(line, "get_segments")
                and len(line.get_segments())]


def test_scales_and_coverage(table: pd.DataFrame) -> None:
    figure = verdicts_by_scale(scale_table({"smoke": table, "laptop": table}))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["smoke", "laptop"]
    shares = pd.DataFrame([{"claim": claim, "kind": kind, "coverage": 0.9} for claim in ("C1", "C4") for kind in "ab"])
    lines = coverage_of_intervals(shares).axes[0].lines
    assert [list(line.get_xdata()) for line in lines[1:]] == [[90.0, 90.0]] * 2


def test_what_cannot_be_drawn_is_said(table: pd.DataFrame) -> None:
    with pytest.raises(FigureError, match="no verdict 'perhaps'"):
        effects_in_margins(table.assign(verdict="perhaps"))
    with pytest.raises(FigureError, match="lacks low_all"):
        effects_in_margins(table.drop(columns="low_all"))
    many = pd.DataFrame({"claim": "C1", "kind": list("abcde"), "coverage": 0.9})
    with pytest.raises(FigureError, match="tells 4 kinds of interval apart, not 5"):
        coverage_of_intervals(many)
    assert len(set(VERDICT_LOOKS.values())) == len(VERDICT_LOOKS)
