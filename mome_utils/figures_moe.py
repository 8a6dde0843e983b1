"""Figures of notebook 05: what the experts write, a text that changes its language, and abstention."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from mome_utils.figures_style import (
    INK,
    SOFT,
    FigureError,
    colors,
    legend,
    markers,
    name_of,
    panels,
    require,
    styled,
    tint,
    unique,
)

__all__ = ["coverage_curves", "switching_losses", "text_panels"]

#: Characters in a line of a text panel, and inches per line.
LINE, PITCH = 88, 0.165


@styled
def text_panels(texts: Sequence[tuple[str, str, Mapping[str, str]]]) -> Figure:
    """What several voices write after the same prompt; a panel per prompt.

    texts: (title, prompt, voice → new text) of each panel; the title stands above, the prompt is grey, and each
    voice has its name at the left.
    """
    if not texts or not all(written for _, _, written in texts):
        raise FigureError("The text panels need a prompt and a voice or more: give each panel its texts.")
    blocks = []
    for title, prompt, written in texts:
        lines = {name: _wrapped(text) for name, text in {"prompt": prompt, **written}.items()}
        blocks.append((title, lines, sum(map(len, lines.values())) + 0.5 * len(lines) + 1.6))
    figure, axes = panels(len(blocks), columns=1, height=PITCH * sum(b[2] for b in blocks) / len(blocks),
                          gridspec_kw={"height_ratios": [b[2] for b in blocks]})
    for ax, (title, lines, height) in zip(axes, blocks, strict=True):
        ax.set(xlim=(0, 1), ylim=(height, 0))
        ax.axis("off")
        ax.set_title(title)
        row = 0.6
        for name, wrapped in lines.items():
            is_prompt = name == "prompt"
            ax.text(0, row, name_of(name), size=8.5, va="top", weight="normal" if is_prompt else "bold",
                    color=SOFT if is_prompt else INK)
            ax.text(0.2, row, "\n".join(wrapped), size=7.5, va="top", family="monospace", linespacing=1.35,
                    color=SOFT if is_prompt else INK)
            row += len(wrapped) + 0.5
    return figure


def _wrapped(text: str) -> list[str]:
    """A text in lines; line breaks of its own are shown as signs, so that code keeps its place in a row."""
    one = text.strip().replace("\n", " ⏎ ").replace("\t", " ")
    return textwrap.wrap(one, LINE, max_lines=3, placeholder=" …") or ["(nothing)"]


@styled
def switching_losses(
    df: pd.DataFrame, languages: Sequence[str], chosen: Sequence[str], lines: Sequence[str], smooth: int = 8
) -> Figure:
    """Losses along a text that changes its language, and which expert is best and which is chosen.

    df: ``position``, ``voice``, ``nats``, a row for each pair. languages: true language at each position in order.
    chosen: the expert that routing again chose there. lines: the voices drawn, in order; a language has its colour,
    other voices are dark. smooth: positions that each point of a line is the mean of (its own and those before it).
    """
    wide = require(df, ("position", "voice", "nats"), ("position", "nats")).pivot(
        index="position", columns="voice", values="nats"
    )
    experts = unique([*languages, *chosen])
    if len(wide) != len(languages) or len(wide) != len(chosen) or not {*lines, *experts} <= set(wide.columns):
        raise FigureError("The figure needs one loss per position and voice, and a language for each position.")
    figure, (ax, strip) = panels(2, columns=1, height=2.2, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    color, places = colors(experts), wide.index.to_numpy()
    styles = iter([(0, (1, 1)), "-", (0, (4, 2))])
    means = wide.rolling(smooth, min_periods=1).mean()
    for voice in lines:
        own = voice in experts
        look: dict[str, Any] = {"color": color[voice] if own else INK, "linewidth": 1.3 if own else 1.9}
        ax.plot(places, means[voice], label=name_of(voice), linestyle="-" if own else next(styles), **look)
    best = wide[experts].idxmin(axis=1).tolist()
    for row, owners in enumerate((list(languages), best, list(chosen))):
        cells = np.array([_rgb(color[name]) for name in owners])[None]
        strip.imshow(cells, extent=(places[0] - 0.5, places[-1] + 0.5, row + 0.88, row + 0.12), aspect="auto")
    for position in places[1:][np.array(languages[1:]) != np.array(languages[:-1])]:
        for axis in (ax, strip):
            axis.axvline(position - 0.5, color=SOFT, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set(ylabel="Nats per token", xlim=(places[0] - 0.5, places[-1] + 0.5))
    strip.set(ylim=(3, 0), xlabel="Token of the document")
    strip.set_yticks([0.5, 1.5, 2.5], ["Language", "Best expert", "Routed, per window"])
    strip.tick_params(axis="y", labelcolor=INK, labelsize=8)
    strip.grid(visible=False)
    handles, names = ax.get_legend_handles_labels()
    missing = [name for name in experts if name not in lines]
    legend(figure, [*handles, *(Patch(color=color[name]) for name in missing)], [*names, *map(name_of, missing)])
    return figure


def _rgb(color: str) -> tuple[float, ...]:
    """A little paler than the lines, so that a strip does not outweigh them."""
    pale = tint(color, 0.15).lstrip("#")
    return tuple(int(pale[i : i + 2], 16) / 255 for i in (0, 2, 4))


@styled
def coverage_curves(df: pd.DataFrame, ylabel: str, marked: float | None = None) -> Figure:
    """Loss against coverage as the threshold of abstention rises; a panel per ``panel``, a line per prompt length.

    df: ``panel``, ``length``, ``threshold``, ``coverage`` (0 to 1), ``nats``. marked: the threshold whose points are
    filled.
    """
    require(df, ("panel", "length", "threshold", "coverage", "nats"), ("coverage", "nats", "threshold"))
    names, lengths = unique(df["panel"]), sorted(set(df["length"]))
    figure, axes = panels(len(names), columns=3, height=3.0, sharex=True)
    shapes = markers(lengths)
    shades = {length: tint(INK, 0.55 * i / max(1, len(lengths) - 1)) for i, length in enumerate(lengths)}
    for ax, name in zip(axes, names, strict=True):
        for length in lengths:
            part = df[(df["panel"] == name) & (df["length"] == length)].sort_values("coverage")
            ax.plot(part["coverage"], part["nats"], color=shades[length], marker=shapes[str(length)], markersize=3.5,
                    linewidth=1.4)
            point = part[np.isclose(part["threshold"], -1.0 if marked is None else marked)]
            ax.plot(point["coverage"], point["nats"], shapes[str(length)], color="#C24A00", markersize=8,
                    markeredgecolor="white", zorder=4)
        ax.set_title(name_of(name))
        ax.set(xlabel="Prompts that are routed", xlim=(-0.04, 1.04))
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes[0].set_ylabel(ylabel)
    handles = [Line2D([], [], color=shades[n], marker=shapes[str(n)], markersize=4) for n in lengths]
    words = [f"Prompts of {n} tokens" for n in lengths]
    if marked is not None:
        handles.append(Line2D([], [], color="#C24A00", marker="o", linestyle="none"))
        words.append(f"Threshold {marked:g}")
    legend(figure, handles, words)
    return figure
