"""Figures of distillation: effects by group, the paths of α, calibration; and, from ``figures_gradients``, gradients.

The arms look alike in all of them (``figures_arms``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .figures_arms import arm_handles, arm_look, arm_name
from .figures_gradients import explore_position, gradient_cosines, step_noise_curves, toy_grid
from .figures_style import (
    ARM_COLORS,
    INK,
    SOFT,
    FigureError,
    legend,
    number,
    panels,
    require,
    require_intervals,
    styled,
    thousands,
    tint,
    unique,
)

__all__ = [
    "alpha_distribution", "alpha_rules", "arm_look", "arm_name", "explore_position", "gradient_cosines",
    "grouped_forest", "reliability_diagrams", "step_noise_curves", "toy_grid",
]

BAND = "#DFE7F0"


# -------------------------------------------------------------------------------------------------------- effects


@styled
def grouped_forest(
    df: pd.DataFrame, margin: float | None, xlabel: str, better: str = "left"
) -> Figure:
    """Effects of many arms with their intervals under headings, the zero line and the band of ± ``margin``.

    df: ``group`` (a heading), ``label`` (an arm), ``estimate``, ``low``, ``high`` and, if wanted, ``verdict``, in
    reading order. margin: in the units of the estimate, or None. better: the side where an arm is better, "left" or
    "right"; dots whose whole interval lies beyond zero there are filled, the others hollow.
    """
    require_intervals(df, ("group", "label"), "estimate")
    if better not in ("left", "right"):
        raise FigureError(f"An effect is better on the left or on the right, not {better!r}: choose one of them.")
    places: list[float] = []
    headings: list[tuple[float, str]] = []
    row = -1.0
    for i, group in enumerate(df["group"].astype(str)):
        if i == 0 or group != str(df["group"].iloc[i - 1]):
            row += 1.0 if i == 0 else 1.35
            headings.append((row, group))
        row += 1.0
        places.append(row)
    figure, (ax,) = panels(1, height=0.75 + 0.235 * (row + 1))
    if margin is not None:
        ax.axvspan(-margin, margin, color=BAND, linewidth=0, zorder=0)
    ax.axvline(0, color=SOFT, linewidth=1.0, zorder=1)
    reach = 1.08 * max(float(df[["low", "high"]].abs().to_numpy().max()), 1.25 * (margin or 0), 1e-9)
    digits = int(np.clip(1 - np.floor(np.log10(reach)), 1, 4))
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    beside |= {"annotation_clip": False, "size": 8}
    verdicts = df["verdict"].astype(str) if "verdict" in df.columns else pd.Series("", index=df.index)
    for place, arm, estimate, low, high, verdict in zip(
        places, df["label"], df["estimate"], df["low"], df["high"], verdicts, strict=True
    ):
        look = arm_look(arm)
        ax.plot([low, high], [place, place], color=tint(look.color, 0.15), linewidth=2.0, zorder=3)
        clear = high < 0 if better == "left" else low > 0
        face = look.color if clear else "white"
        ax.plot(estimate, place, look.marker, color=face, markeredgecolor=look.color, markersize=6, zorder=4)
        middle, left, right = (number(value, f"+.{digits}f") for value in (estimate, low, high))
        ax.annotate(f"{middle}  [{left}, {right}]", (1, place), (8, 0), color=INK, **beside)
        if verdict:
            ax.annotate(verdict, (1, place), (132, 0), style="italic", color=SOFT, **beside)
    ax.set_yticks(places, [arm_name(arm) for arm in df["label"]])
    for place, group in headings:
        ax.annotate(group, (0, place), (-6, 0), weight="bold", ha="right", **beside)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(axis="y", visible=False)
    ax.set(xlim=(-reach, reach), ylim=(row + 0.7, -0.7), xlabel=xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, symmetric=True))
    dot: dict[str, Any] = {"marker": "o", "linestyle": "none", "markeredgecolor": SOFT, "markersize": 6}
    handles: list[Line2D | Patch] = [Line2D([], [], color=SOFT, **dot), Line2D([], [], color="white", **dot)]
    names = ["Whole interval on the better side", "Interval on zero, or worse"]
    if margin is not None:
        handles.append(Patch(color=BAND))
        names.append(f"Within ± {number(margin, 'g')}")
    legend(figure, handles, names)
    return figure


# ---------------------------------------------------------------------------------------------------- the paths of α


@styled
def alpha_rules(df: pd.DataFrame, columns: int = 4) -> Figure:
    """The path of α under each rule, a small panel for each, and at its right how the values are distributed.

    df: ``rule`` (an arm), ``step``, ``alpha`` and ``seed`` or ``run`` (a line each). A rule that jumps between 0 and
    1 is drawn as points. Where α hardly moves, its smallest and largest values are written out.
    """
    require(df, ("rule", "step", "alpha"), ("step", "alpha"))
    key = next((column for column in ("run", "seed") if column in df.columns), None)
    if key is None:
        raise FigureError("The figure's table lacks seed (or run): give it the columns rule, step, alpha, seed.")
    rules = unique(df["rule"])
    figure, axes = panels(len(rules), columns=columns, height=1.45, sharex=True, sharey=True)
    for i, (ax, rule) in enumerate(zip(axes, rules, strict=True)):
        part, look = df[df["rule"].astype(str) == rule], arm_look(rule)
        ax.axhline(0.5, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        for j, (_, line) in enumerate(part.groupby(key, sort=False)):
            line = line.sort_values("step")
            jumps = float((line["alpha"].diff().abs() > 0.9).mean()) > 0.05
            drawn: dict[str, Any] = {"linestyle": "none", "marker": ".", "markersize": 1.6} if jumps else {
                "linewidth": 1.0}
            ax.plot(line["step"], line["alpha"], color=tint(look.color, min(0.12 * j, 0.5)), zorder=3, **drawn)
        _sideways(ax, part["alpha"].to_numpy(dtype=float), look.color)
        low, high = part["alpha"].min(), part["alpha"].max()
        if high - low < 0.25:
            used = number(low, ".3g") if low == high else f"{number(low, '.3f')} to {number(high, '.3f')}"
            ax.text(0.04, 0.84 if high < 0.75 else 0.08, used, transform=ax.transAxes, size=8, color=INK)
        ax.set_title(look.name, size=8.5)
        ax.set(ylim=(-0.04, 1.04), ylabel="α" if i % columns == 0 else "")
        ax.set_yticks([0, 0.5, 1])
        if i + columns >= len(rules):
            ax.tick_params(labelbottom=True)
        thousands(ax)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    figure.supxlabel("Training step", size=9, color=INK)
    return figure


def _sideways(ax: Axes, values: np.ndarray, color: str) -> None:
    """A histogram of ``values`` (0 to 1) along the right edge of a panel."""
    inset = ax.inset_axes((1.015, 0, 0.13, 1), sharey=ax)
    counts, edges = np.histogram(values, bins=40, range=(0, 1))
    inset.barh(edges[:-1], counts / counts.max(), np.diff(edges), align="edge", color=tint(color, 0.25), linewidth=0)
    inset.set_axis_off()


@styled
def alpha_distribution(df: pd.DataFrame) -> Figure:
    """Why an adaptive α stays where it is: how α, and the relative changes d of both losses, are distributed.

    df: a row per weighing (micro-batch or step): ``rule``, ``alpha``, ``d_ce``, ``d_kd`` (once the window is full).
    A row of panels per rule: α − 0.5; the two d; one d against the other, with their correlation. Only d > 0 moves
    the rule: the shaded part.
    """
    require(df, ("rule", "alpha", "d_ce", "d_kd"), ("alpha", "d_ce", "d_kd"))
    rules = unique(df["rule"])
    figure, axes = panels(3 * len(rules), columns=3, height=2.3)
    for row, rule in enumerate(rules):
        part, look = df[df["rule"].astype(str) == rule], arm_look(rule)
        left, middle, right = axes[3 * row : 3 * row + 3]
        weights = np.full(len(part), 100 / len(part))
        offset = part["alpha"] - 0.5
        reach = max(1.05 * float(offset.abs().quantile(0.999)), 1e-4)
        left.hist(offset.clip(-reach, reach), np.linspace(-reach, reach, 42).tolist(), weights=weights,
                  color=look.color, edgecolor="white", linewidth=0.3)
        left.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        left.set(xlabel="α − 0.5", ylabel="Share (%)")
        left.set_title(look.name)
        left.ticklabel_format(axis="x", style="plain", useOffset=False)
        wide = float(part[["d_ce", "d_kd"]].abs().quantile(0.995).max()) or 1e-3
        bins = np.linspace(-wide, wide, 42).tolist()
        for column, shade, name in (("d_ce", ARM_COLORS["ce"], "CE"), ("d_kd", ARM_COLORS["fixed"], "KD")):
            options: dict[str, Any] = {"histtype": "step", "linewidth": 1.6} if column == "d_kd" else {"alpha": 0.45}
            middle.hist(part[column].clip(-wide, wide), bins, weights=weights, color=shade, label=name, **options)
        middle.set(xlabel="d, relative change over the window", ylabel="Share (%)")
        middle.legend(loc="upper left", handlelength=1.0, borderaxespad=0.2)
        right.plot(part["d_ce"], part["d_kd"], ".", color=tint(look.color, 0.2), markersize=2.2, alpha=0.6,
                   rasterized=True)  # tens of thousands of points would make the SVG megabytes large
        right.axline((0, 0), slope=1, color=SOFT, linewidth=0.8, linestyle=(0, (3, 2)))
        right.set(xlabel="d of CE", ylabel="d of KD", xlim=(-wide, wide), ylim=(-wide, wide))
        for ax in (middle, right):
            ax.axvspan(0, wide, color=BAND, alpha=0.55, linewidth=0, zorder=0)
            ax.set_xlim(-wide, wide)
        right.axhspan(0, wide, color=BAND, alpha=0.55, linewidth=0, zorder=0)
        correlation = part["d_ce"].corr(part["d_kd"])
        known = "" if np.isnan(correlation) else f"correlation {number(correlation, '.2f')}"
        right.text(0.04, 0.93, known, transform=right.transAxes, size=8, color=INK, va="top")
        for ax in (left, middle, right):
            ax.xaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
        right.yaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
    return figure


# ------------------------------------------------------------------------------------------------------ calibration

RELATIONS = {
    "student_data": ("Student and text", "Share that is right"),
    "teacher_data": ("Teacher and text", "Share that is right"),
    "student_teacher": ("Student and teacher", "Teacher's probability"),
}


@styled
def reliability_diagrams(df: pd.DataFrame, least: int = 100) -> Figure:
    """Reliability diagrams: accuracy against confidence, a panel per relation, and below how sure the model is.

    df: rows of :func:`mome_utils.agreement_tables.reliability` with the column ``arm``: ``relation``, ``low``,
    ``high``, ``positions``, ``share``, ``confidence``, ``accuracy``. least: bins with fewer positions are left out
    of the curves, and the axes end where the last of them does. Below the diagonal: too sure.
    """
    require(df, ("arm", "relation", "low", "high", "positions", "share", "confidence", "accuracy"), ("share",))
    arms = unique(df["arm"])
    relations = [name for name in RELATIONS if name in set(df["relation"])]
    if not relations:
        raise FigureError(f"The reliability diagrams know the relations {', '.join(RELATIONS)}: the table has none.")
    figure, axes = panels(2 * len(relations), columns=len(relations), height=2.0, height_ratios=[3.2, 1])
    size = 5.5 if len(arms) < 4 else 4.5
    seen = df[(df["positions"] >= least) & df["relation"].isin(relations)]
    reach = float(np.ceil(10 * seen[["high", "accuracy"]].to_numpy().max()) / 10) if len(seen) else 1.0
    for i, relation in enumerate(relations):
        top, below = axes[i], axes[len(relations) + i]
        top.plot([0, 1], [0, 1], color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        part = df[df["relation"] == relation]
        for arm in arms:
            mine, look = part[part["arm"].astype(str) == arm].sort_values("low"), arm_look(arm)
            if relation == "teacher_data":  # the same for all arms that share their teachers
                look = arm_look("teacher")
            mine_seen = mine[mine["positions"] >= least]
            top.plot(mine_seen["confidence"], mine_seen["accuracy"], marker=look.marker, markersize=size, linewidth=1.2,
                     markeredgecolor="white", markeredgewidth=0.5, zorder=3, **look.plot)
            edges = [*mine["low"], float(mine["high"].iloc[-1])]
            below.stairs(100 * mine["share"].to_numpy(), edges, color=look.color, linewidth=1.1)
            if relation == "teacher_data":
                break
        title, ylabel = RELATIONS[relation]
        top.set_title(title)
        top.set(xlim=(0, reach), ylim=(0, reach), ylabel=ylabel, aspect="equal")
        below.set(xlim=(0, reach), xlabel="Confidence", ylabel="Share (%)" if i == 0 else "", yscale="log")
        below.set_ylim(bottom=0.05)
        below.yaxis.set_major_locator(LogLocator(numticks=4))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, "g")))
        below.yaxis.set_minor_locator(NullLocator())
        for axis in (top.xaxis, top.yaxis, below.xaxis):
            axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    shown = [*arms, *(["teacher"] if "teacher_data" in relations and "teacher" not in arms else [])]
    legend(figure, arm_handles(shown), [arm_name(arm) for arm in shown])
    return figure
