"""Figures of gradients: a toy student on its way, one position of text, conflict over training, noise of a step.

Import them from ``figures_distillation``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .figures_arms import arm_look, arm_name
from .figures_style import (
    ARM_COLORS,
    INK,
    SOFT,
    FigureError,
    colors,
    legend,
    name_of,
    number,
    panels,
    require,
    styled,
    thousands,
    tint,
    unique,
)
from .toy import POSITION, Position, PositionView

TEACHER = "#C9CED6"
UP, DOWN = "#2B6CB0", "#C05621"


# ------------------------------------------------------------------------------------------------------ two modes


@styled
def toy_grid(df: pd.DataFrame) -> Figure:
    """A student on its way to a teacher with two modes: a row per divergence, a column per kept step.

    df: rows of :func:`mome_utils.toy.toy_paths`: ``divergence``, ``step``, ``outcome``, ``teacher``, ``student``,
    ``gradient``. Above: both distributions; below: where a step of descent pushes the student's logits, up or down,
    on one scale per row.
    """
    columns = ("divergence", "step", "outcome", "teacher", "student", "gradient")
    require(df, columns, columns[1:])
    names, steps = unique(df["divergence"]), sorted(set(df["step"]))
    figure, axes = panels(
        len(names) * len(steps), columns=len(steps), height=1.08, sharex=True, sharey=True
    )
    top = float(df[["teacher", "student"]].to_numpy().max())
    for row, name in enumerate(names):
        part, look = df[df["divergence"].astype(str) == name], arm_look(name)
        scale = 0.34 * top / max(float(part["gradient"].abs().max()), 1e-12)
        for column, step in enumerate(steps):
            ax, now = axes[row * len(steps) + column], part[part["step"] == step]
            x, push = now["outcome"], -scale * now["gradient"]
            ax.fill_between(x, now["teacher"], color=TEACHER, linewidth=0)
            ax.plot(x, now["student"], color=look.color, linewidth=1.8)
            ax.fill_between(x, -0.38 * top, -0.38 * top + push, where=(push > 0).tolist(), color=UP, linewidth=0,
                            interpolate=True)
            ax.fill_between(x, -0.38 * top, -0.38 * top + push, where=(push < 0).tolist(), color=DOWN, linewidth=0,
                            interpolate=True)
            ax.axhline(0, color=SOFT, linewidth=0.6)
            ax.axhline(-0.38 * top, color=SOFT, linewidth=0.6)
            ax.set(ylim=(-0.74 * top, 1.04 * top), xticks=[], yticks=[])
            ax.margins(x=0)
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if row == 0:
                ax.set_title(f"Step {step:,}", size=8.5, weight="normal", color=SOFT)
            if column == 0:
                label = ax.set_ylabel(arm_name(name).replace("-", "-\n").replace(" ", "\n", 1), rotation=0, ha="right",
                                      va="center", size=8.5, labelpad=8)
                label.set_color(INK)
    handles = [Patch(color=TEACHER), Line2D([], [], color=INK, linewidth=1.8), Patch(color=UP), Patch(color=DOWN)]
    legend(figure, handles, ["Teacher", "Student", "Logit pushed up", "Logit pushed down"])
    return figure


# --------------------------------------------------------------------------------------------- one position of text


@styled
def explore_position(views: Sequence[PositionView], position: Position = POSITION) -> Figure:
    """Teacher, student and target at one position, and the gradient in the student's logits; a row per setting.

    views: of :func:`mome_utils.toy.look_at`. Left: probabilities of the candidate tokens. Right: the push on each
    logit (minus the gradient) from the text and from the teacher, and their sum.
    """
    if not views:
        raise FigureError("The figure of a position needs at least one setting: pass what look_at returns.")
    figure, axes = panels(2 * len(views), columns=2, height=1.85 + 0.75 / len(views), sharex=True)
    places = np.arange(len(position.tokens))
    reach = 1.08 * max(float(np.abs(part).max()) for view in views for part in (view.ce, view.kd, view.ce + view.kd))
    top = 1.08 * max(float(part.max()) for view in views for part in (view.softened, view.student, view.target))
    for row, view in enumerate(views):
        left, right = axes[2 * row : 2 * row + 2]
        left.bar(places, view.softened, 0.82, color=TEACHER)
        for shift, (values, color, marker) in zip(
            (-0.16, 0.16), ((view.student, ARM_COLORS["fixed"], "o"), (view.target, INK, "D")), strict=True
        ):
            left.vlines(places + shift, 0, values, color=color, linewidth=1.4)
            left.plot(places + shift, values, marker, color=color, markersize=5, markeredgecolor="white",
                      markeredgewidth=0.5)
        left.set(ylim=(0, top), ylabel="Probability")
        left.set_title(setting_text(view.setting))
        alpha = float(str(view.setting["alpha"]))
        parts = (number(alpha, ".3g"), view.ce_loss, number(1 - alpha, ".3g"), view.kd_loss, view.loss)
        sum_of = "Loss: {} · {:.2f} + {} · {:.2f} = {:.2f} nats".format(*parts)
        right.set_title(sum_of, weight="normal", size=8.5, color=SOFT)
        text, taught = -view.ce, -view.kd
        right.bar(places - 0.2, text, 0.38, color=ARM_COLORS["ce"])
        right.bar(places + 0.2, taught, 0.38, color=ARM_COLORS["forward_kl"])
        right.hlines(text + taught, places - 0.42, places + 0.42, color=INK, linewidth=2.2)
        right.axhline(0, color=SOFT, linewidth=0.8)
        right.set(ylim=(-reach, reach), ylabel="Push on the logit")
        right.yaxis.set_major_locator(MaxNLocator(nbins=5, symmetric=True))
        for ax in (left, right):
            ax.axvspan(position.label - 0.5, position.label + 0.5, color="#FFF3C4", linewidth=0, zorder=0)
            ax.set_xticks(places, position.tokens)
            ax.tick_params(axis="x", length=0, labelcolor=INK, labelsize=8, labelbottom=row == len(views) - 1)
            ax.grid(axis="x", visible=False)
            ax.set_xlim(-0.6, len(places) - 0.4)
    for ax in axes[-2:]:
        ax.set_xlabel(f"{position.context} …")
    dot: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    legend(
        figure,
        [Patch(color=TEACHER), Line2D([], [], marker="o", color=ARM_COLORS["fixed"], **dot),
         Line2D([], [], marker="D", color=INK, **dot), Patch(color="#FFF3C4"), Patch(color=ARM_COLORS["ce"]),
         Patch(color=ARM_COLORS["forward_kl"]), Line2D([], [], color=INK, linewidth=2.2)],
        ["Teacher at T", "Student", "Target of both", "Token in the text", "Push of the text", "Push of the teacher",
         "Push of both"],
    )
    return figure


def setting_text(setting: Mapping[str, object]) -> str:
    """A setting of :func:`mome_utils.toy.look_at` in words: ``α = 0.5, T = 2, Forward KL``."""
    text = f"α = {number(float(str(setting['alpha'])), '.3g')}, T = {number(float(str(setting['temperature'])), '.3g')}"
    return f"{text}, {arm_name(setting['divergence'])}"


# --------------------------------------------------------------------------------------------- conflict over a run


@styled
def gradient_cosines(df: pd.DataFrame) -> Figure:
    """The cosine between the gradients of CE and KD over training, and by layer.

    df: rows of :func:`mome_utils.gradients.gradient_rows`: ``step``, ``language``, ``group``, ``cosine``,
    ``cosine_low``, ``cosine_high`` (and ``seed``, averaged over). Left: the whole model, a line per language, with
    the 10th to 90th percentile of single micro-batches behind. Right: every layer, mean over languages, from the
    first step (pale) to the last.
    """
    values = ("cosine", "cosine_low", "cosine_high")
    require(df, ("step", "language", "group", *values), ("step",))
    whole, layers = df[df["group"] == "all"], df[df["group"] != "all"]
    if whole.empty or layers.empty:
        raise FigureError("The figure of cosines needs rows of the whole model (group 'all') and of its layers.")
    figure, (left, right) = panels(2, columns=2, height=3.1)
    languages = unique(df["language"])
    color = colors(languages)
    for language in languages:
        mine = whole[whole["language"].astype(str) == language].groupby("step")[list(values)].mean()
        left.fill_between(mine.index, mine["cosine_low"], mine["cosine_high"], color=color[language], alpha=0.10,
                          linewidth=0)
        left.plot(mine.index, mine["cosine"], color=color[language], marker="o", markersize=4.5,
                  markeredgecolor="white", markeredgewidth=0.6)
    left.axhline(0, color=SOFT, linewidth=1.0)
    left.set(ylim=(-1, 1), xlabel="Training step", ylabel="Cosine of the two gradients")
    thousands(left)
    groups, steps = unique(layers["group"]), sorted(set(layers["step"]))
    shades = [tint(INK, share) for share in np.linspace(0.72, 0, len(steps))]
    table = layers.pivot_table(index="group", columns="step", values="cosine", sort=False).loc[groups]
    right.axvline(0, color=SOFT, linewidth=1.0, zorder=1)
    for place, group in enumerate(groups):
        right.plot(table.loc[group], [place] * len(steps), color=tint(SOFT, 0.6), linewidth=1.2, zorder=2)
        for step, shade in zip(steps, shades, strict=True):
            right.plot(table.loc[group, step], place, "o", color=shade, markersize=6.5, markeredgecolor="white",
                       markeredgewidth=0.7, zorder=3)
    right.set_yticks(range(len(groups)), [group[0].upper() + group[1:] for group in groups])
    right.tick_params(axis="y", length=0, labelcolor=INK)
    right.set(xlim=(-1, 1), ylim=(len(groups) - 0.5, -0.5), xlabel="Cosine by layer, mean over languages")
    right.xaxis.set_major_locator(MaxNLocator(nbins=5, symmetric=True))
    right.grid(axis="y", visible=False)
    lines = [Line2D([], [], color=color[language], linewidth=2.2) for language in languages]
    dots = [Line2D([], [], marker="o", linestyle="none", color=shade) for shade in (shades[0], shades[-1])]
    ends = [f"Step {steps[0]:,}", f"Step {steps[-1]:,}"]
    legend(figure, [*lines, *dots], [*(name_of(language) for language in languages), *ends])
    return figure


_SCHEDULES = {"combined": "fixed", "alternating_micro": "alternating_micro", "alternating": "alternating"}


@styled
def step_noise_curves(df: pd.DataFrame, released: int | None = 16) -> Figure:
    """The noise of one optimizer step against its number of micro-batches, under each schedule; a panel per moment.

    df: ``moment`` (a panel, such as "Step 0"), ``micro_batches``, ``schedule`` and ``ratio`` (to the combined loss) of
    :func:`mome_utils.gradients.step_noise`. released: the release's number of micro-batches, marked.
    """
    require(df, ("moment", "micro_batches", "schedule", "ratio"), ("micro_batches", "ratio"))
    moments = unique(df["moment"])
    figure, axes = panels(len(moments), columns=min(3, len(moments)), height=2.5, sharey=True, sharex=True)
    shown = [name for name in _SCHEDULES if name in set(df["schedule"])]
    sizes = sorted(set(df["micro_batches"]))
    for i, (ax, moment) in enumerate(zip(axes, moments, strict=True)):
        for name in shown:
            mine = df[(df["moment"].astype(str) == moment) & (df["schedule"] == name)].sort_values("micro_batches")
            look = arm_look(_SCHEDULES[name])
            ax.plot(mine["micro_batches"], mine["ratio"], marker=look.marker, markersize=4.5, markeredgecolor="white",
                    markeredgewidth=0.5, **look.plot)
        if released is not None:
            ax.axvline(released, color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        ax.set_xscale("log", base=2)
        ax.set_title(moment)
        ax.xaxis.set_major_locator(FixedLocator(sizes))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="Micro-batches in a step", ylabel="Noise (combined = 1)" if i == 0 else "")
    axes[0].set_yscale("log", base=2)
    axes[0].set_ylim(0.8, 1.25 * max(2.0, float(df["ratio"].max())))
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles = [
        Line2D([], [], marker=arm_look(_SCHEDULES[name]).marker, **arm_look(_SCHEDULES[name]).plot) for name in shown
    ]
    names = [{"combined": "Combined"}.get(name, arm_name(_SCHEDULES[name])) for name in shown]
    if released is not None:
        handles.append(Line2D([], [], color=SOFT, linewidth=0.9, linestyle=(0, (3, 2))))
        names.append(f"{released} as released")
    legend(figure, handles, names)
    return figure
