"""Figures of representational similarity: clustered heat maps, curves over layers, scores between floor and ceiling.

Every function takes plain tables, checks them (``FigureError``, one sentence) and returns a matplotlib ``Figure``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from .figures_arms import arm_name
from .figures_matrices import _cells
from .figures_style import (
    GRID,
    INK,
    SOFT,
    WIDTH,
    FigureError,
    colors,
    legend,
    markers,
    number,
    panels,
    require,
    styled,
    unique,
)

__all__ = ["clustered", "layer_curves", "placed_scores"]


#: Kinds of models that occur in no other figure, apart from those they stand beside here.
_COLORS: Mapping[str, str] = MappingProxyType({
    "common": "#2FB5C9", "untrained": "#C2A878", "untrained_teacher": "#8A6D3B",
})


def _colors(kinds: Sequence[str]) -> dict[str, str]:
    """One colour for each kind: that of every figure where it has one."""
    return colors(kinds) | {kind: _COLORS[kind] for kind in kinds if kind in _COLORS}


@styled
def clustered(matrices: Mapping[str, pd.DataFrame], label: str, *, distance: bool = False, fmt: str = ".2f") -> Figure:
    """Square matrices of similarity as heat maps, their rows ordered by the dendrogram above each.

    matrices: title → square, symmetric; index and columns name the same things in the same order. The diagonal may
    hold anything (a model beside another training of itself, for instance): the dendrogram, average linkage, does not
    use it. label: what the colour means. distance: small values mean alike. fmt: format of a cell.
    """
    if not matrices:
        raise FigureError("The clustered heat map needs at least one matrix.")
    checked = {title: _square(title, frame) for title, frame in matrices.items()}
    low = min(float(frame.to_numpy().min()) for frame in checked.values())
    high = max(float(frame.to_numpy().max()) for frame in checked.values())
    norm = Normalize(low, high if high > low else low + 1)
    size = max(len(frame) for frame in checked.values())
    wide = min(2, len(checked))
    names_wide = 0.075 * max(len(arm_name(key)) for frame in checked.values() for key in frame.index)
    cell = min(0.62, (WIDTH * 1.35 / wide - names_wide - 0.3) / size)
    figure, axes = panels(
        len(checked), columns=wide, width=wide * (size * cell + names_wide + 0.3) + 0.7,
        height=(size + 2.2) * min(cell, 0.42) + names_wide,
    )
    for ax, (title, frame) in zip(axes, checked.items(), strict=True):
        mesh = _panel(ax, title, frame, norm, distance, fmt)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.02, pad=0.01)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return figure


def _square(title: str, frame: pd.DataFrame) -> pd.DataFrame:
    require(frame, ())
    values = frame.to_numpy(dtype=float)
    if list(frame.index) != list(frame.columns) or len(frame) < 3:
        raise FigureError(f"The matrix '{title}' must be square, with the same three names or more on both sides.")
    if not np.isfinite(values).all() or not np.allclose(values, values.T):
        raise FigureError(f"The matrix '{title}' must be symmetric, without missing values.")
    return frame


def _panel(ax: Axes, title: str, frame: pd.DataFrame, norm: Normalize, distance: bool, fmt: str) -> Any:
    values = frame.to_numpy(dtype=float)
    apart = values - values.min() if distance else values.max() - values
    np.fill_diagonal(apart, 0)
    tree = dendrogram(linkage(squareform(apart, checks=False), "average"), no_plot=True)
    order, count = tree["leaves"], len(frame)
    names = [arm_name(frame.index[i]) for i in order]
    shown = values[np.ix_(order, order)]
    texts = np.array([[number(cell, fmt) for cell in row] for row in shown], dtype=object)
    mesh = _cells(ax, shown, names, names, norm, texts, size=7 if count > 7 else 8)
    ax.tick_params(axis="x", rotation=90)
    # The tree stands on the matrix, in two rows' height; scipy puts leaf i at 10 i + 5.
    deepest = max(max(height) for height in tree["dcoord"]) or 1.0
    for across, height in zip(tree["icoord"], tree["dcoord"], strict=True):
        ax.plot(np.array(across) / 10, -2 * np.array(height) / deepest, color=SOFT, linewidth=1, clip_on=False)
    ax.set_ylim(count, -2.15)
    ax.set_title(title)
    return mesh


@styled
def layer_curves(
    df: pd.DataFrame, ylabel: str, *, xlabel: str = "Layer", levels: pd.DataFrame | None = None, columns: int = 3
) -> Figure:
    """A value over the layers of a network: a panel for each ``panel``, a line for each ``kind``.

    df: ``panel``, ``layer``, ``kind``, ``value``; ``low`` and ``high`` (both or neither) become bars. levels: what the
    lines are to be seen against, ``panel``, ``layer``, ``name`` (such as floor, ceiling or chance), ``value``; drawn
    grey, the first name dashed, the second dotted.
    """
    require(df, ("panel", "layer", "kind", "value"), ("layer", "value"))
    names, kinds = unique(df["panel"]), unique(df["kind"])
    color, marker = _colors(kinds), markers(kinds)
    figure, axes = panels(len(names), columns=columns, sharey=True, height=2.9)
    handles = {kind: Line2D([], [], color=color[kind], marker=marker[kind], markersize=4.5) for kind in kinds}
    # Kinds stand a little beside each other, so that bars and markers at one layer can be told apart.
    shift = dict(zip(kinds, np.linspace(-0.12, 0.12, len(kinds)) if "low" in df else np.zeros(len(kinds)), strict=True))
    for ax, name in zip(axes, names, strict=True):
        part = df[df["panel"].astype(str) == name]
        if levels is not None:
            _levels(ax, levels[levels["panel"].astype(str) == name], unique(levels["name"]), handles)
        for kind in unique(part["kind"]):
            line = part[part["kind"].astype(str) == kind].sort_values("layer")
            x = line["layer"] + shift[kind]
            ax.plot(x, line["value"], color=color[kind], marker=marker[kind], markersize=4.5)
            if "low" in line:
                ax.vlines(x, line["low"], line["high"], color=color[kind], linewidth=1.2)
        ax.set_title(arm_name(name) if len(names) > 1 else "")
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[:: min(columns, len(axes))]:
        ax.set_ylabel(ylabel)
    legend(figure, list(handles.values()), [arm_name(kind) for kind in handles])
    return figure


def _levels(ax: Axes, rows: pd.DataFrame, names: list[str], handles: dict[str, Line2D]) -> None:
    looks: tuple[Any, ...] = ("--", ":", "-.")
    for name, dashes in zip(names, looks, strict=False):
        line = rows[rows["name"].astype(str) == name].sort_values("layer")
        ax.plot(line["layer"], line["value"], color=SOFT, linestyle=dashes, linewidth=1.4)
        handles.setdefault(name, Line2D([], [], color=SOFT, linestyle=dashes, linewidth=1.4))


@styled
def placed_scores(df: pd.DataFrame, xlabel: str = "Place between floor (0) and ceiling (1)") -> Figure:
    """Where scores lie between floor and ceiling: a row for each measure, a marker for each kind.

    df: ``row``, ``kind``, ``value`` and, where known, ``low`` and ``high``.
    """
    require(df, ("row", "kind", "value"), ("value",))
    rows, kinds = unique(df["row"]), unique(df["kind"])
    color, marker = _colors(kinds), markers(kinds)
    figure, (ax,) = panels(1, height=0.9 + 0.46 * len(rows))
    for place in (0, 1):
        ax.axvline(place, color=SOFT, linewidth=1, linestyle=":" if place == 0 else "--")
    heights = np.linspace(-0.33, 0.33, len(kinds)) if len(kinds) > 1 else np.zeros(1)
    for kind, offset in zip(kinds, heights, strict=True):
        part = df[df["kind"].astype(str) == kind]
        y = np.array([rows.index(str(row)) for row in part["row"]]) + offset
        if "low" in part:
            ax.hlines(y, part["low"], part["high"], color=color[kind], linewidth=1.2)
        ax.plot(part["value"], y, color=color[kind], marker=marker[kind], markersize=5, linestyle="none")
    ax.set_yticks(range(len(rows)), rows, color=INK)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    for edge in np.arange(0.5, len(rows) - 0.5):
        ax.axhline(edge, color=GRID, linewidth=0.6)
    handles = [Line2D([], [], color=color[k], marker=marker[k], markersize=5, linestyle="none") for k in kinds]
    legend(figure, handles, [arm_name(kind) for kind in kinds])
    return figure


