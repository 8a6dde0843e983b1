"""One function for each kind of figure of the study.

Every function takes plain tables or arrays, checks them (``FigureError``, one sentence), and returns a
matplotlib ``Figure`` in the study's style; ``save_svg`` and ``png_bytes`` turn it into a file.
Colours belong to a language or an arm, and stay the same through the whole study.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from .figures_diagrams import alpha_trajectory, block_picture, moe_diagram, toy_divergences
from .figures_matrices import confusion, heat_map, r_matrices
from .figures_style import (
    INK,
    SOFT,
    WIDTH,
    FigureError,
    colors,
    legend,
    log_ticks,
    markers,
    name_of,
    number,
    panels,
    png_bytes,
    require,
    require_intervals,
    save_svg,
    styled,
    thousands,
    tint,
    unique,
)

__all__ = [
    "FigureError", "alpha_trajectory", "bars_with_intervals", "block_picture", "colors", "confusion",
    "forest", "forgetting_curves", "grouped_bars", "heat_map", "learning_curves", "moe_diagram", "name_of",
    "png_bytes", "quality_cost", "r_matrices", "save_svg", "token_bars", "toy_divergences",
]  # fmt: skip

Stage = tuple[float, float, str]
CURVE_COLUMNS = ("step", "value", "language", "arm", "seed")


@styled
def token_bars(df: pd.DataFrame, bound: float | None = None) -> Figure:
    """Tokens per language, stacked by split.

    df: ``language``, ``split``, ``tokens`` (one row for each language and split; several are summed).
    bound: the largest number of tokens the balance allows a language, (1 + p / 100) × the smallest
    language, drawn as a line; in tokens.
    """
    require(df, ("language", "split", "tokens"), ("tokens",))
    table = df.assign(language=df["language"].astype(str), split=df["split"].astype(str)).pivot_table(
        index="language", columns="split", values="tokens", aggfunc="sum", fill_value=0, sort=False
    )
    total = table.sum(axis=1)
    if bound is not None and bound < total.min():
        raise FigureError("The bound of the token bars is below the smallest language: give it in tokens.")
    known = [split for split in ("train", "validation", "test") if split in table.columns]
    splits = known + [split for split in table.columns if split not in known]
    shades = dict(zip(splits, np.linspace(0, 0.75, max(3, len(splits))), strict=False))
    figure, (ax,) = panels(1, height=0.9 + 0.46 * len(table))
    color = colors(table.index)
    for row, language in enumerate(table.index):
        left = 0.0
        for split in splits:
            shade, length = tint(color[language], shades[split]), table.loc[language, split]
            ax.barh(row, length, 0.62, left, color=shade, edgecolor="white", linewidth=0.8)
            left += length
        above = 100 * (total[language] / max(total.min(), 1) - 1)
        note = f"{total[language]:,.0f}" + (f"  (+{above:.1f} %)" if above > 0 else "  (smallest)")
        ax.annotate(note, (max(left, bound or 0), row), (6, 0), textcoords="offset points", va="center", size=8.5)
    handles: list[Patch | Line2D] = [Patch(color=tint(SOFT, shades[split])) for split in splits]
    names = [name_of(split) for split in splits]
    if bound is not None:
        handles.append(ax.axvline(bound, color=INK, linewidth=1.2, linestyle=(0, (4, 2))))
        names.append("Largest allowed")
    legend(figure, handles, names)
    ax.set_yticks(range(len(table)), [name_of(language) for language in table.index])
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel="Tokens", xlim=(0, 1.24 * max(float(total.max()), bound or 0)))
    ax.tick_params(axis="y", labelcolor=INK)
    ax.grid(axis="y", visible=False)
    thousands(ax)
    return figure


@styled
def grouped_bars(
    df: pd.DataFrame, x: str, y: str, hue: str, ylabel: str, baseline: float | None = None, fmt: str = ".2f"
) -> Figure:
    """Bars of column ``y``, grouped by column ``x``, coloured by column ``hue``: coverage, fertility, speed.

    df: one row for each pair of ``x`` and ``hue``. baseline: a value to compare with, drawn as a line, in the
    units of ``y``. fmt: the format of the number on each bar.
    """
    require(df, (x, y, hue), (y,))
    if df.duplicated([x, hue]).any():
        raise FigureError(f"The grouped bars need one row for each pair of {x} and {hue}: aggregate first.")
    groups, series = unique(df[x]), unique(df[hue])
    figure, (ax,) = panels(1, height=3.1)
    color, width = colors(series), 0.8 / len(series)
    size = float(np.clip(60 / (len(groups) * len(series)) + 4, 5.5, 8))
    for i, key in enumerate(series):
        part = df[df[hue].astype(str) == key]
        places = [groups.index(str(group)) - 0.4 + width * (i + 0.5) for group in part[x]]
        bars = ax.bar(places, part[y], width * 0.92, color=color[key], label=name_of(key))
        ax.bar_label(bars, [number(value, fmt) for value in part[y]], padding=2, size=size, color=SOFT)
    if (df[y] < 0).any():
        ax.axhline(0, color=SOFT, linewidth=1.0)
    if baseline is not None:
        name = f"Baseline {number(baseline, '.4g')}"
        ax.axhline(baseline, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), label=name)
    if len(series) > 1 or baseline is not None:
        handles, names = ax.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda i: isinstance(handles[i], Line2D))  # the baseline last
        legend(figure, [handles[i] for i in order], [names[i] for i in order])
    _name_ticks(ax, [name_of(group) for group in groups], "x")
    ax.set_ylabel(ylabel)
    ax.margins(y=0.12)
    return figure


@styled
def learning_curves(
    df: pd.DataFrame,
    ylabel: str,
    panel: str | None = "arm",
    xlabel: str = "Training step",
    log_y: bool = False,
) -> Figure:
    """Mean over seeds as a line, smallest to largest seed as a band, over training steps.

    df: ``step``, ``value``, ``language``, ``arm``, ``seed``. panel: "arm" (a panel per arm, languages as
    colours), "language" (a panel per language, arms as colours) or None (one panel, languages as colours,
    each line the mean over arms too).
    """
    require(df, CURVE_COLUMNS, ("step", "value"))
    if panel not in ("arm", "language", None):
        raise FigureError(f"The learning curves have no panel {panel!r}: choose 'arm', 'language' or None.")
    hue = "arm" if panel == "language" else "language"
    names = unique(df[panel]) if panel else [""]
    color = colors(df[hue])
    columns = 2 if len(names) in (2, 4) else 3
    figure, axes = panels(len(names), columns=columns, sharex=True, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        _curves(ax, df[df[panel].astype(str) == name] if panel else df, hue, color)
        ax.set_title(name_of(name) if len(names) > 1 else "")
        thousands(ax)
        if log_y:
            ax.set_yscale("log")
    _outer_labels(axes, columns, xlabel, ylabel)
    _hue_legend(figure, df, hue, color)
    return figure


@styled
def bars_with_intervals(df: pd.DataFrame, ylabel: str, horizontal: bool | None = None) -> Figure:
    """Dots with intervals, not bars: differences of bits per byte are small beside their distance from zero.

    df: ``label``, ``group``, ``estimate``, ``low``, ``high``; groups are colours side by side within a label.
    horizontal: labels on the vertical axis (the default for more than eight labels or long ones).
    """
    require_intervals(df, ("label", "group"), "estimate")
    labels, groups = unique(df["label"]), unique(df["group"])
    shown = [name_of(label) for label in labels]
    flat = horizontal if horizontal is not None else len(labels) > 8 or max(map(len, shown)) * len(shown) > 110
    height = 0.9 + len(labels) * max(0.28, 0.1 + 0.1 * len(groups)) if flat else 3.1
    figure, (ax,) = panels(1, height=height)
    color, marker, step = colors(groups), markers(groups), 0.62 / len(groups)
    for i, group in enumerate(groups):
        part = df[df["group"].astype(str) == group]
        offset = (i - (len(groups) - 1) / 2) * step
        places = np.array([labels.index(str(label)) for label in part["label"]]) + offset
        middle = part["estimate"].to_numpy(dtype=float)
        lines = ax.hlines if flat else ax.vlines
        lines(places, part["low"], part["high"], color=tint(color[group], 0.25), linewidth=2.2)
        where = (middle, places) if flat else (places, middle)
        look: dict[str, Any] = {"marker": marker[group], "markeredgecolor": "white", "markeredgewidth": 0.8}
        ax.plot(*where, color=color[group], linestyle="none", markersize=6.5, label=name_of(group), **look)
    if (df["low"] < 0).any() and (df["high"] > 0).any():
        (ax.axvline if flat else ax.axhline)(0, color=SOFT, linewidth=1.0, zorder=1)
    _name_ticks(ax, shown, "y" if flat else "x")
    ax.set(**{"xlabel" if flat else "ylabel": ylabel})
    if len(groups) > 1:
        legend(figure, *ax.get_legend_handles_labels())
    return figure


@styled
def forest(df: pd.DataFrame, margin: float | None, xlabel: str) -> Figure:
    """Effects with their intervals, the zero line and the band of ± ``margin`` that counts as equal.

    df: ``label``, ``estimate``, ``low``, ``high`` and, if wanted, ``verdict`` (text shown at the right),
    in reading order. margin: in the units of the estimate, or None for no band.
    """
    require_intervals(df, ("label",), "estimate")
    figure, (ax,) = panels(1, height=1.0 + 0.4 * len(df))
    rows = np.arange(len(df))
    if margin is not None:
        ax.axvspan(-margin, margin, color="#DFE7F0", linewidth=0, zorder=0)
    ax.axvline(0, color=SOFT, linewidth=1.0, zorder=1)
    ax.hlines(rows, df["low"], df["high"], color=INK, linewidth=1.8, zorder=3)
    ax.plot(df["estimate"], rows, "o", color=INK, markersize=6, markeredgecolor="white", zorder=4)
    reach = 1.08 * max(float(df[["low", "high"]].abs().to_numpy().max()), 1.25 * (margin or 0), 1e-9)
    digits = int(np.clip(1 - np.floor(np.log10(reach)), 1, 4))
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    beside |= {"va": "center", "annotation_clip": False}
    verdicts = df["verdict"].astype(str) if "verdict" in df.columns else pd.Series("", index=df.index)
    for row, (estimate, low, high, verdict) in enumerate(
        zip(df["estimate"], df["low"], df["high"], verdicts, strict=True)
    ):
        middle, left, right = (number(value, f"+.{digits}f") for value in (estimate, low, high))
        above = f"{middle}  [{left}, {right}]"
        ax.annotate(above, (1, row), (8, 6 if verdict else 0), size=8.5, **beside)
        if verdict:
            ax.annotate(verdict, (1, row), (8, -6), size=8, style="italic", color=SOFT, **beside)
    _name_ticks(ax, [name_of(label) for label in df["label"]], "y")
    ax.set(xlim=(-reach, reach), xlabel=xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, symmetric=True))
    ax.grid(axis="y", visible=False)
    if margin is not None:
        legend(figure, [Patch(color="#DFE7F0")], [f"Within ± {number(margin, 'g')}"])
    return figure


@styled
def forgetting_curves(
    df: pd.DataFrame,
    stages: Sequence[Stage] | Mapping[str, Sequence[Stage]],
    ylabel: str,
    xlabel: str = "Training step",
) -> Figure:
    """Score of every language while one model learns the languages one after the other; a panel per arm.

    df: ``step``, ``value``, ``language``, ``arm``, ``seed``. stages: (start step, end step, language), the
    same for all arms, or a mapping from arm to its stages (an arm without stages has no bands).
    """
    require(df, CURVE_COLUMNS, ("step", "value"))
    names = unique(df["arm"])
    columns = len(names) if len(names) < 4 else 2
    figure, axes = panels(len(names), columns=columns, height=3.1, sharex=True, sharey=True)
    by_arm = stages if isinstance(stages, Mapping) else dict.fromkeys(names, stages)
    color = colors([*df["language"], *(language for bands in by_arm.values() for _, _, language in bands)])
    for ax, name in zip(axes, names, strict=True):
        for start, end, language in by_arm.get(name, ()):
            if end <= start:
                raise FigureError(f"The stage {language} ends at step {end}, not after its start {start}.")
            shade = color[str(language)]
            ax.axvspan(start, end, color=tint(shade, 0.88), linewidth=0, zorder=0)
            room = 60 * WIDTH / columns * (end - start) / max(df["step"].max(), 1)  # points
            label = name_of(language) if 5.3 * len(name_of(language)) < room else str(language)
            place: dict[str, Any] = {"ha": "center", "va": "bottom", "transform": ax.get_xaxis_transform()}
            ax.text((start + end) / 2, 1.015, label, size=7.5, weight="bold", color=INK, **place)
        _curves(ax, df[df["arm"].astype(str) == name], "language", color)
        ax.set_title(name_of(name) if len(names) > 1 else "", pad=18 if any(by_arm.values()) else 7)
        thousands(ax)
    _outer_labels(axes, columns, xlabel, ylabel)
    _hue_legend(figure, df, "language", color)
    return figure


@styled
def quality_cost(df: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Quality against cost on a logarithmic cost axis, each point named beside it.

    df: ``label``, ``cost`` (positive), ``quality``, ``low``, ``high``.
    """
    require_intervals(require(df, ("label", "cost"), ("cost",)), ("label", "cost"), "quality")
    if (df["cost"] <= 0).any():
        raise FigureError("The costs must be above zero for a logarithmic axis: check the column cost.")
    figure, (ax,) = panels(1, height=4.0)
    color = colors(df["label"])
    for key, cost, quality, low, high in zip(
        df["label"].astype(str), df["cost"], df["quality"], df["low"], df["high"], strict=True
    ):
        ax.plot([cost, cost], [low, high], color=tint(color[key], 0.35), linewidth=2.2, zorder=2)
        ax.plot(cost, quality, "o", color=color[key], markersize=7.5, markeredgecolor="white", zorder=3)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    span = float(df["cost"].max() / df["cost"].min())
    ax.set_xlim(df["cost"].min() / span**0.08 / 1.1, df["cost"].max() * span**0.22 * 1.35)
    log_ticks(ax.xaxis, span)
    ax.margins(y=0.12)
    figure.draw_without_rendering()
    _direct_labels(ax, df)
    return figure


def _curves(ax: Axes, df: pd.DataFrame, hue: str, color: Mapping[str, str]) -> None:
    """Draw mean lines and min–max bands over seeds, one colour per value of ``hue``."""
    for key, part in df.groupby(df[hue].astype(str), sort=False):
        seeds = part.groupby(["step", "seed"])["value"].mean().groupby("step").agg(["mean", "min", "max"])
        if part["seed"].nunique() > 1:
            ax.fill_between(seeds.index, seeds["min"], seeds["max"], color=color[str(key)], alpha=0.18, linewidth=0)
        ax.plot(seeds.index, seeds["mean"], color=color[str(key)], marker="o" if len(seeds) == 1 else "")


def _hue_legend(figure: Figure, df: pd.DataFrame, hue: str, color: Mapping[str, str]) -> None:
    keys = unique(df[hue])
    handles: list[Line2D | Patch] = [Line2D([], [], color=color[key], linewidth=2.4) for key in keys]
    names = [name_of(key) for key in keys]
    if df["seed"].nunique() > 1:
        handles.append(Patch(color=tint(SOFT, 0.75)))
        names.append("Smallest to largest seed")
    legend(figure, handles, names)


def _outer_labels(axes: Sequence[Axes], columns: int, xlabel: str, ylabel: str) -> None:
    """Axis labels at the left and the bottom edge; the panels above a gap in the last row get theirs too."""
    for i, ax in enumerate(axes):
        ax.set_ylabel(ylabel if i % columns == 0 else "")
        if i + columns >= len(axes):
            ax.set_xlabel(xlabel)
            ax.tick_params(labelbottom=True)


def _name_ticks(ax: Axes, names: Sequence[str], which: Literal["x", "y"]) -> None:
    """Names instead of numbers along an axis, wrapped to their room, in reading order."""
    places = range(len(names))
    if which == "y":
        ax.set_yticks(places, [textwrap.fill(name, 34) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    else:
        ax.set_xticks(places, [textwrap.fill(name, max(8, 105 // len(names))) for name in names])
        ax.set_xlim(-0.6, len(names) - 0.4)
    ax.tick_params(axis=which, length=0, labelcolor=INK)
    ax.grid(axis="x" if which == "x" else "y", visible=which == "y")


def _direct_labels(ax: Axes, df: pd.DataFrame) -> None:
    """Name each point where the name covers no other name, point or interval: beside it, else farther off."""
    sides = [(1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)]
    spots = [(9 * far * dx, 11 * far * dy) for far in (1, 1.8, 2.8, 4) for dx, dy in sides]
    ends = [ax.transData.transform(df[["cost", column]].to_numpy(dtype=float)) for column in ("low", "quality", "high")]
    room = ax.get_window_extent()
    taken = [Bbox([low - 2, high + 2]) for low, high in zip(ends[0], ends[2], strict=True)]
    taken += [Bbox([point - 7, point + 7]) for point in ends[1]]
    for key, x, y in df[["label", "cost", "quality"]].itertuples(index=False):
        note = ax.annotate(name_of(key), (x, y), spots[0], textcoords="offset points", va="center", size=8.5)
        note.set_in_layout(False)
        costs = []
        for spot in spots:
            box = _moved(note, spot)
            hits = [Bbox.intersection(box, other) for other in taken]
            outside = box.x0 < room.x0 or box.x1 > room.x1 or box.y0 < room.y0 or box.y1 > room.y1
            costs.append(1e6 * outside + sum(hit.width * hit.height + 1 for hit in hits if hit is not None))
        best = spots[int(np.argmin(costs))]
        taken.append(_moved(note, best))
        if np.hypot(*best) > 16:
            line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", (x, y), best, textcoords="offset points", arrowprops=line)


def _moved(note: Annotation, spot: tuple[float, float]) -> Bbox:
    """Put a label at an offset, growing away from its point, and return the pixels that it covers."""
    note.set(position=spot, ha={1: "left", -1: "right", 0: "center"}[int(np.sign(spot[0]))])
    return note.get_window_extent()
