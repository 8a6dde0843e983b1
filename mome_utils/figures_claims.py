"""Figures of the ledger: all effects in their margins, coverage of intervals, verdicts by scale."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .figures_style import FAINT, GRID, INK, SOFT, FigureError, legend, number, panels, require, styled, unique

__all__ = ["VERDICT_LOOKS", "coverage_of_intervals", "effects_in_margins", "verdicts_by_scale"]

#: Verdict to colour, marker and whether the marker is filled; told apart without colour, too.
VERDICT_LOOKS: Mapping[str, tuple[str, str, bool]] = {
    "reproduced": ("#00664F", "o", True), "not reproduced": ("#B23A00", "X", True),
    "undecided at this scale": ("#5F6368", "o", False), "measured": ("#0067C0", "D", True),
    "not run": ("#6B7075", "_", False),
}  # fmt: skip
SUPPORTS = "#D9EDE4"
#: Where the claim's region begins and ends, in margins.
_REGIONS = {"at_most": (-np.inf, 1), "at_least": (-1, np.inf), "greater": (1, np.inf), "less": (-np.inf, -1),
            "equal": (-1, 1)}  # fmt: skip


@styled
def effects_in_margins(df: pd.DataFrame) -> Figure:
    """A forest plot of the whole ledger: each effect divided by its claim's margin, so that ±1 is its margin.

    The axis is linear between the margins and logarithmic beyond. Thick lines are 95 % intervals, thin ones hold for
    all claims at once; the shaded part of a row is where the claim is reproduced. What has no margin, was not run or
    has no limits is named at its row without a line.

    df: :func:`mome_utils.ledger.ledger_table`.
    """
    columns = ("claim", "comparison", "direction", "margin", "unit", "estimate", "low", "high", "low_all", "high_all",
               "verdict")
    require(df, columns, ("margin",))
    unknown = set(df["verdict"]) - set(VERDICT_LOOKS)
    if unknown:
        raise FigureError(f"There is no verdict {sorted(unknown)[0]!r}: use one of {', '.join(VERDICT_LOOKS)}.")
    figure, (ax,) = panels(1, height=0.9 + 0.44 * len(df))
    scaled = df.assign(**{name: df[name] / df["margin"].where(df["margin"] > 0)
                          for name in ("estimate", "low", "high", "low_all", "high_all")})
    ends = scaled[["low_all", "high_all"]].to_numpy(dtype=float)
    reach = 2.0 * float(np.max(np.abs(ends[np.isfinite(ends)]), initial=5.0))
    ax.set_xscale("symlog", linthresh=1.0, linscale=1.0)
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    beside |= {"va": "center", "annotation_clip": False}
    for row, (raw, one) in enumerate(zip(df.itertuples(), scaled.itertuples(), strict=True)):
        color, marker, filled = VERDICT_LOOKS[raw.verdict]
        if raw.direction in _REGIONS:
            left, right = np.clip(_REGIONS[raw.direction], -reach, reach)
            ax.fill_between([left, right], row - 0.1, row + 0.42, color=SUPPORTS, linewidth=0, zorder=0)
        ax.text(-reach * 0.93, row - 0.27, raw.comparison, size=7.5, color=SOFT, va="center", zorder=5,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6})
        if isfinite(one.low) and isfinite(one.high):
            ax.hlines(row + 0.16, one.low_all, one.high_all, color=color, linewidth=0.9, zorder=3)
            ax.hlines(row + 0.16, one.low, one.high, color=color, linewidth=2.6, zorder=3)
        if isfinite(one.estimate):
            ax.plot(one.estimate, row + 0.16, marker, color=color if filled else "white", markeredgecolor=color,
                    markersize=6, zorder=4)
        ax.annotate(raw.verdict, (1, row), (8, 6 if isfinite(raw.estimate) else 0), size=8.5, color=color, **beside)
        if isfinite(raw.estimate):
            said = f"{number(raw.estimate, '+.4f')} {raw.unit}"
            ax.annotate(said, (1, row), (8, -6), size=7.5, color=SOFT, **beside)
    for place in (-1, 1):
        ax.axvline(place, color=SOFT, linewidth=0.8, linestyle="--", zorder=1)
    ax.axvline(0, color=SOFT, linewidth=1.0, zorder=1)
    for edge in np.arange(0.5, len(df) - 0.5):
        ax.axhline(edge, color=GRID, linewidth=0.6, zorder=1)
    ax.set_yticks(range(len(df)), df["claim"], color=INK, weight="bold")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ticks = [10.0**power for power in range(int(np.log10(reach)) + 1)]
    ax.xaxis.set_major_locator(FixedLocator([-tick for tick in reversed(ticks)] + [0.0, *ticks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, "g")))
    ax.set(xlim=(-reach, reach), ylim=(len(df) - 0.5, -0.5), xlabel="Effect in margins of its claim (±1 is the margin)")
    legend(figure, [Patch(color=SUPPORTS), Line2D([], [], color=SOFT, linewidth=2.6),
                    Line2D([], [], color=SOFT, linewidth=0.9)],
           ["Here the claim is reproduced", "95 % interval", "Interval that holds for all claims at once"])
    return figure


@styled
def coverage_of_intervals(df: pd.DataFrame, level: float = 0.95) -> Figure:
    """How often kinds of interval hold the truth, a row per comparison, beside the level they claim.

    df: ``claim``, ``kind``, ``coverage`` (0 to 1). level: what the intervals are called.
    """
    require(df, ("claim", "kind", "coverage"), ("coverage",))
    claims, kinds = unique(df["claim"]), unique(df["kind"])
    figure, (ax,) = panels(1, height=0.9 + 0.4 * len(claims))
    looks = list(zip(("#0067C0", "#C24A00", "#7A869A", "#12AE7D"), "oXDs", strict=True))
    if len(kinds) > len(looks):
        raise FigureError(f"The figure tells {len(looks)} kinds of interval apart, not {len(kinds)}: leave some out.")
    ax.axvline(100 * level, color=SOFT, linewidth=1.0, linestyle="--", zorder=1)
    for kind, (color, marker) in zip(kinds, looks, strict=False):
        part = df[df["kind"] == kind]
        ax.plot(100 * part["coverage"], [claims.index(claim) for claim in part["claim"]], marker, color=color,
                markersize=7, markeredgecolor="white", label=kind, zorder=3)
    ax.set_yticks(range(len(claims)), claims, color=INK)
    ax.grid(axis="y", visible=False)
    ax.set(ylim=(len(claims) - 0.5, -0.5), xlabel="Intervals that hold the truth (%); dashed: what they claim")
    legend(figure, *ax.get_legend_handles_labels())
    return figure


@styled
def verdicts_by_scale(df: pd.DataFrame) -> Figure:
    """Verdicts as a grid, a row per claim and a column per scale; the markers are those of the forest plot.

    df: ``claim``, ``scale``, ``verdict``.
    """
    require(df, ("claim", "scale", "verdict"))
    claims, scales = unique(df["claim"]), unique(df["scale"])
    figure, (ax,) = panels(1, width=2.2 + 1.5 * len(scales), height=1.2 + 0.26 * len(claims))
    for row in range(0, len(claims), 2):
        ax.axhspan(row - 0.5, row + 0.5, color=FAINT, linewidth=0, zorder=0)
    for one in df.itertuples():
        color, marker, filled = VERDICT_LOOKS[one.verdict]
        ax.plot(scales.index(str(one.scale)), claims.index(str(one.claim)), marker,
                color=color if filled else "white", markeredgecolor=color, markersize=8, zorder=3)
    ax.set_yticks(range(len(claims)), claims, color=INK)
    ax.set_xticks(range(len(scales)), scales, color=INK)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.set(xlim=(-0.5, len(scales) - 0.5), ylim=(len(claims) - 0.5, -0.5))
    present = [name for name in VERDICT_LOOKS if name in set(df["verdict"])]
    handles = []
    for name in present:
        color, marker, filled = VERDICT_LOOKS[name]
        handles.append(Line2D([], [], linestyle="none", marker=marker, color=color if filled else "white",
                              markeredgecolor=color, markersize=8))
    figure.legend(handles, present, loc="outside lower left", ncols=1, frameon=False)
    return figure
