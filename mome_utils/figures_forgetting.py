"""Figures of notebook 06: stability against plasticity, what changes inside a model, and relearning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .config import MomeError
from .figures import forgetting_curves
from .figures_style import (
    INK,
    SOFT,
    FigureError,
    colors,
    legend,
    markers,
    name_of,
    number,
    panels,
    require,
    styled,
    thousands,
    tint,
    unique,
)
from .forgetting import stage_bands

if TYPE_CHECKING:
    from .runs import Run
    from .study import Study

__all__ = ["course_curves", "family_of", "layer_changes", "note_of", "relearning_curves", "stability_plasticity"]


def family_of(label: str) -> str:
    """The method of a course's label, without its strength: ``EWC, λ = 100`` → EWC, ``Replay 5 %`` → Replay."""
    return label.split(",")[0].split(" ")[0] if label.startswith(("EWC", "LwF", "Replay")) else label.split(",")[0]


def note_of(label: str) -> str:
    """What a course's label says beyond its method: ``EWC, λ = 100`` → λ = 100, ``Replay 5 %`` → 5 %; else nothing."""
    return label.removeprefix(family_of(label)).lstrip(", ") if any(c.isdigit() for c in label) else ""


def course_curves(
    study: Study, paths: Mapping[tuple[tuple[str, ...], str], Sequence[Run]],
    chosen: Sequence[tuple[tuple[str, ...], str]], label: Mapping[str, str],
) -> Figure:
    """Validation curves of finished runs, a panel for each chosen (order of the languages, course).

    Raises:
        MomeError: a choice that has no runs in this study.
    """
    curves, bands = [], {}
    for order, course in chosen:
        if (order, course) not in paths:
            raise MomeError(
                f"{label[course]} has no run in the order {' → '.join(order)}: choose the first, or Sequential."
            )
        runs = paths[order, course]
        title = f"{label[course]}: {' → '.join(order)}"
        curves.append(study.curves({title: runs}))
        bands[title] = stage_bands(order, runs[0].spec.snapshots)
    return forgetting_curves(pd.concat(curves, ignore_index=True), bands, "Validation bits per byte")


@styled
def stability_plasticity(df: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """A point per way of training: how well it learns (x) against how much it forgets (y), both better when lower.

    df: ``family`` (a colour, a marker and a line through its members, in the given order), ``note`` (beside the
    point; may be empty), ``x``, ``x_low``, ``x_high``, ``y``, ``y_low``, ``y_high``. Infinite limits are not drawn.
    """
    require(df, ("family", "note", "x", "x_low", "x_high", "y", "y_low", "y_high"), ("x", "y"))
    families = unique(df["family"])
    color, marker = colors(families), markers(families)
    figure, (ax,) = panels(1, height=4.4)
    for family in families:
        part = df[df["family"].astype(str) == family]
        shade = tint(color[family], 0.45)
        for row in part.itertuples():
            if np.isfinite([row.x_low, row.x_high]).all():
                ax.plot([row.x_low, row.x_high], [row.y, row.y], color=shade, linewidth=1.6, zorder=2)
            if np.isfinite([row.y_low, row.y_high]).all():
                ax.plot([row.x, row.x], [row.y_low, row.y_high], color=shade, linewidth=1.6, zorder=2)
            if row.note:
                ax.annotate(str(row.note), (row.x, row.y), (6, 5), textcoords="offset points", size=7.5, color=SOFT)
        ax.plot(part["x"], part["y"], color=color[family], linewidth=0.9, linestyle=(0, (2, 2)), zorder=3)
        look: dict[str, Any] = {"color": color[family], "markersize": 8, "markeredgecolor": "white"}
        ax.plot(part["x"], part["y"], linestyle="none", marker=marker[family], zorder=4, **look)
    ax.axhline(0, color=SOFT, linewidth=1.0, zorder=1)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.12, y=0.12)
    ax.annotate("better", (0.91, 0.86), (0.98, 0.95), xycoords="axes fraction", size=8, color=SOFT, ha="right",
                arrowprops={"arrowstyle": "->", "color": SOFT, "linewidth": 0.9})
    handles = [
        Line2D([], [], marker=marker[f], color=color[f], linestyle="none", markersize=7, markeredgecolor="white")
        for f in families
    ]
    legend(figure, handles, [name_of(family) for family in families])
    return figure


@styled
def layer_changes(drift: pd.DataFrame, similarity: pd.DataFrame, measure: str) -> Figure:
    """Where a model changes after its first stage: drift of the weights by part, and of the states by layer.

    drift: ``part``, ``drift``, ``stage`` (the language learned since; a colour), ``seed``. similarity: ``layer``
    (0: the embedding), ``similarity`` to the end of the first stage, ``stage``, ``seed``. measure: what ``similarity``
    holds. Points and lines are means over seeds, the bars and bands the range of seeds.
    """
    require(drift, ("part", "drift", "stage", "seed"), ("drift",))
    require(similarity, ("layer", "similarity", "stage", "seed"), ("layer", "similarity"))
    stages, parts = unique(drift["stage"]), unique(drift["part"])
    color, marker = colors(stages), markers(stages)
    figure, (left, right) = panels(2, columns=2, height=1.2 + 0.3 * len(parts))
    for i, stage in enumerate(stages):
        look: dict[str, Any] = {"marker": marker[stage], "color": color[stage], "markersize": 6.5}
        look["markeredgecolor"] = "white"
        own = drift[drift["stage"].astype(str) == stage].groupby("part", sort=False)["drift"]
        own = own.agg(["mean", "min", "max"])
        places = np.array([parts.index(str(part)) for part in own.index]) + (i - (len(stages) - 1) / 2) * 0.2
        left.hlines(places, own["min"], own["max"], color=tint(color[stage], 0.4), linewidth=2)
        left.plot(own["mean"], places, linestyle="none", **look)
        mine = similarity[similarity["stage"].astype(str) == stage]
        lines = mine.groupby("layer")["similarity"].agg(["mean", "min", "max"])
        if mine["seed"].nunique() > 1:
            right.fill_between(lines.index, lines["min"], lines["max"], color=color[stage], alpha=0.18, linewidth=0)
        right.plot(lines.index, lines["mean"], **look)
    left.set_yticks(range(len(parts)), parts)
    left.set(ylim=(len(parts) - 0.5, -0.5), xlabel="Change of the weights, relative", title="Weights")
    left.set_xlim(left=0)
    left.tick_params(axis="y", length=0, labelcolor=INK)
    thousands(right)
    right.set(xlabel="Layer (0: embedding)", ylabel=measure, title="Representations")
    handles = [Line2D([], [], color=color[s], marker=marker[s], linestyle="none", markersize=7) for s in stages]
    legend(figure, handles, [f"After {name_of(stage)}" for stage in stages])
    return figure


@styled
def relearning_curves(
    df: pd.DataFrame, targets: Mapping[str, float], ylabel: str, names: Mapping[str, str] | None = None
) -> Figure:
    """Learning a language and learning it again, on the same steps.

    df: ``step``, ``value``, ``arm`` (a colour), ``seed``; step 0 is where an arm starts. targets: name → level of a
    dashed line. names: what a reader sees for an arm.
    """
    require(df, ("step", "value", "arm", "seed"), ("step", "value"))
    if not all(np.isfinite(value) for value in targets.values()):
        raise FigureError("A target of the relearning curves is not finite: leave it out.")
    arms = unique(df["arm"])
    color, marker = colors(arms), markers(arms)
    figure, (ax,) = panels(1, height=3.4)
    for arm in arms:
        _band(ax, df[df["arm"].astype(str) == arm], color[arm], marker[arm])
    for name, level in targets.items():
        ax.axhline(level, color=SOFT, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
        ax.annotate(f"{name}: {number(level)}", (1, level), (-4, -4), xycoords=("axes fraction", "data"),
                    textcoords="offset points", size=8, color=SOFT, ha="right", va="top")
    thousands(ax)
    ax.set(xlabel="Training step", ylabel=ylabel)
    handles = [Line2D([], [], color=color[arm], marker=marker[arm], markersize=5) for arm in arms]
    legend(figure, handles, [(names or {}).get(arm, name_of(arm)) for arm in arms])
    return figure


def _band(ax: Axes, part: pd.DataFrame, shade: str, mark: str) -> None:
    """A mean line over seeds, and their range."""
    table = part.groupby("step")["value"].agg(["mean", "min", "max"])
    if part["seed"].nunique() > 1:
        ax.fill_between(table.index, table["min"], table["max"], color=shade, alpha=0.18, linewidth=0)
    ax.plot(table.index, table["mean"], color=shade, marker=mark, markersize=4, markeredgecolor="white")
