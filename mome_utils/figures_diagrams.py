"""Pictures of mechanisms: a block's tokens, a model's parts, the divergences on a toy, the path of α.

Import them from ``figures``, which offers every figure of the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from .figures_style import (
    FAINT,
    INK,
    SOFT,
    WIDTH,
    FigureError,
    colors,
    legend,
    name_of,
    panels,
    require,
    styled,
    text_color,
    thousands,
    tint,
    unique,
)

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
_MONO = 0.602  # advance of DejaVu Sans Mono, in font sizes


def _byte_of() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _readable(tokens: Sequence[str]) -> list[str]:
    """Readable tokens: · for a space, ↵ for a new line, → for a tab, hex for part of a character."""
    table = _byte_of()
    # "é" is both a letter and the spelling of byte 233; the letter "Ġ" (a space) tells which is meant.
    bytewise = any("Ġ" in token or "Ċ" in token for token in tokens)
    glyphs = get_font(findfont("DejaVu Sans Mono"))
    shown = []
    for token in tokens:
        text = token
        if bytewise and token not in SPECIAL_TOKENS and set(token) <= set(table):
            raw = bytes(table[letter] for letter in token)
            text = raw.decode("utf-8", errors="ignore")
            text = text if text.encode() == raw else raw.hex(" ").upper()
        text = text.translate({32: "·", 10: "↵", 9: "→", 13: "␍"})
        shown.append("".join(letter if glyphs.get_char_index(ord(letter)) else "□" for letter in text))
    return shown


@styled
def block_picture(tokens: Sequence[str], ids: Sequence[int], language: str, limit: int = 192) -> Figure:
    """One block as the model sees it: a box per token with its id below, in reading order.

    tokens: the block's tokens as ``tokenizer.convert_ids_to_tokens`` gives them (byte-level spelling is
    decoded) or as plain text. ids: their ids. language: gives the colour. limit: tokens after it are counted.
    Special tokens are dark; a space shows as ·, a new line as ↵, a tab as →.
    """
    if len(tokens) == 0 or len(tokens) != len(ids):
        raise FigureError(f"The block picture needs an id per token, not {len(ids)} ids for {len(tokens)} tokens.")
    color = colors([language])[language]
    size, line, gap, room = 8.5, 30.0, 3.0, 72 * WIDTH - 16  # points
    figure = Figure(figsize=(WIDTH, 1.0))
    ax = figure.add_axes((0, 0, 1, 1))
    x, y = 8.0, 30.0
    for i, (text, token, index) in enumerate(zip(_readable(tokens[:limit]), tokens, ids, strict=False)):
        width = max(len(text) * size, len(str(int(index))) * 6.0) * _MONO + 7
        if x + width > room + 8 and x > 8:
            x, y = 8.0, y + line
        fill = INK if token in SPECIAL_TOKENS else tint(color, (0.62, 0.78)[i % 2])
        box = FancyBboxPatch((x, y), width, 15, boxstyle="round,pad=0,rounding_size=2.5", facecolor=fill, linewidth=0)
        ax.add_patch(box)
        ax.text(
            x + width / 2,
            y + 10.6,
            text,
            ha="center",
            va="baseline",
            size=size,
            family="monospace",
            color=text_color(fill),
        )
        ax.text(
            x + width / 2,
            y + 20.5,
            str(int(index)),
            ha="center",
            va="center",
            size=6,
            family="monospace",
            color=SOFT,
        )
        x += width + gap
    head = f"{name_of(language)}, {len(tokens):,} tokens" + (
        f", the first {limit:,} shown" if len(tokens) > limit else ""
    )
    ax.text(8, 13, head, size=9.5, weight="bold", va="center")
    ax.text(
        room + 8,
        13,
        "· space   ↵ new line   → tab   below: token id",
        size=8,
        color=SOFT,
        va="center",
        ha="right",
    )
    height = y + 32
    figure.set_size_inches(WIDTH, height / 72)
    ax.set(xlim=(0, 72 * WIDTH), ylim=(height, 0))
    ax.set_axis_off()
    return figure


@styled
def alpha_trajectory(df: pd.DataFrame, zoom: bool = True) -> Figure:
    """The weight α of the language-model loss over the steps, and how far from one half it gets.

    df: ``step``, ``alpha`` and ``seed`` or ``run`` (a line each). Left: α on its full range 0 to 1;
    middle (with zoom): the same on the range it uses; right: histogram of α − 0.5, as a share of steps.
    """
    require(df, ("step", "alpha"), ("step", "alpha"))
    key = next((column for column in ("run", "seed") if column in df.columns), None)
    if key is None:
        raise FigureError("The figure's table lacks seed (or run): give it the columns step, alpha, seed.")
    names = unique(df[key])
    shades = [tint(colors(["adaptive"])["adaptive"], part) for part in np.linspace(0, 0.55, len(names))]
    figure, axes = panels(3 if zoom else 2, height=2.9)
    lines, bars = axes[:-1], axes[-1]
    offset = df["alpha"] - 0.5
    reach = max(1.1 * float(offset.abs().max()), 1e-4)
    edges = np.linspace(-reach, reach, 42)
    for name, shade in reversed(list(zip(names, shades, strict=True))):
        part = df[df[key].astype(str) == name].sort_values("step")
        for ax in lines:
            ax.plot(part["step"], part["alpha"], color=shade, linewidth=0.9)
    weights = np.full(len(df), 100 / len(df))
    bars.hist(offset, bins=edges.tolist(), weights=weights, color=shades[0], edgecolor="white", linewidth=0.3)
    for ax in lines:
        ax.axhline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        ax.set_xlabel("Training step")
        thousands(ax)
    lines[0].set(ylim=(0, 1), ylabel="α", title="Full range")
    if zoom:
        lines[1].set(ylim=(0.5 - reach, 0.5 + reach), ylabel="α", title="The range it uses")
        lines[1].ticklabel_format(axis="y", style="plain", useOffset=False)
    bars.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    bars.set(xlabel="α − 0.5", ylabel="Share of steps (%)", title="Distance from one half")
    bars.xaxis.set_major_locator(MaxNLocator(nbins=4, symmetric=True))
    bars.ticklabel_format(axis="x", style="plain", useOffset=False)
    return figure


@styled
def toy_divergences(
    x: Sequence[float] | np.ndarray, teacher: Sequence[float] | np.ndarray, students: Mapping[str, np.ndarray]
) -> Figure:
    """A two-mode teacher and the student that each divergence fits to it, a panel per divergence.

    x: the grid [n]. teacher: its probabilities or densities [n]. students: divergence → fitted [n].
    """
    grid, target = np.asarray(x, dtype=float), np.asarray(teacher, dtype=float)
    fitted = {name: np.asarray(values, dtype=float) for name, values in students.items()}
    if not fitted or grid.ndim != 1 or any(values.shape != grid.shape for values in (target, *fitted.values())):
        raise FigureError("The toy needs one grid, one teacher and at least one student, all of the same length.")
    figure, axes = panels(len(fitted), columns=4 if len(fitted) == 4 else 3, height=2.4, sharex=True, sharey=True)
    color = colors(fitted)
    for ax, (name, values) in zip(axes, fitted.items(), strict=True):
        area = ax.fill_between(grid, target, color=tint(SOFT, 0.7), linewidth=0)
        ax.plot(grid, values, color=color[name], linewidth=2.2)
        ax.set_title(name_of(name))
        ax.set_xlabel("Outcome")
        ax.margins(x=0)
    axes[0].set_ylabel("Probability")
    legend(figure, [area, Line2D([], [], color=INK, linewidth=2.2)], ["Teacher", "Student fitted to it"])
    return figure


@styled
def moe_diagram(variant: str, languages: Sequence[str]) -> Figure:
    """The parts of one MoE variant, and the way of one sequence routed to the first language.

    variant: "ple" (each expert has its own embedding and output head), "jeet" (one embedding and one output
    projection for all) or "moe_ce" (also a common expert, averaged with the routed one).
    languages: two or more.
    """
    if variant not in ("ple", "jeet", "moe_ce"):
        raise FigureError(f"The MoE diagram knows no variant {variant!r}: choose 'ple', 'jeet' or 'moe_ce'.")
    if len(unique(languages)) < 2:
        raise FigureError("The MoE diagram needs at least two languages.")
    codes = unique(languages)
    color = colors(codes)
    own, common = variant == "ple", variant == "moe_ce"
    pitch, top, tall = 34.0, 64.0, 24.0  # points
    row = [top + pitch * i for i in range(len(codes) + common)]
    bottom = row[-1] + tall + 8
    middle = (row[0] + row[-1] + tall) / 2
    figure = Figure(figsize=(WIDTH, bottom / 72))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 72 * WIDTH), ylim=(bottom, 0))
    ax.set_axis_off()
    _box(ax, 10, middle - 12, 60, tall, "Token ids", FAINT)
    _box(ax, 222, 8, 144, tall, "Router: TF-IDF, linear", FAINT)
    ax.plot([40, 40, 216], [middle - 12, 20, 20], color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    _arrow(ax, (212, 20), (222, 20), SOFT)
    _arrow(ax, (294, 32), (294, top), color[codes[0]])
    ax.text(302, 48, f"chooses {name_of(codes[0])}", size=8, color=SOFT, va="center")
    source, target = (70.0, 496.0) if own else (176.0, 408.0)
    for y, code in zip(row, codes, strict=False):
        live = code == codes[0]
        fill, way = (color[code], INK) if live else (tint(color[code], 0.82), "#CDD1D6")
        parts = [(222.0, 144.0, f"{name_of(code)} expert")]
        if own:
            parts = [(116.0, 84.0, "Embedding"), *parts, (388.0, 62.0, "Head")]
        for x, width, text in parts:
            _box(ax, x, y, width, tall, text, fill, bold=live)
        for (x, width, _), (after, _, _) in pairwise(parts):
            _arrow(ax, (x + width, y + 12), (after, y + 12), way)
        _arrow(ax, (source, middle), (parts[0][0], y + 12), way)
        _arrow(ax, (parts[-1][0] + parts[-1][1], y + 12), (target, middle), way)
    if common:
        _box(ax, 222, row[-1], 144, tall, "Common expert", "#4A4A4A", bold=True)
        _arrow(ax, (source, middle), (222, row[-1] + 12), INK)
        _arrow(ax, (366, row[-1] + 12), (target, middle), INK)
    if own:
        _box(ax, 496, middle - 19, 72, 38, "Next-token\nprobabilities", FAINT)
        return figure
    _box(ax, 92, middle - 19, 84, 38, "Shared\nembedding", "#D9DDE3")
    _arrow(ax, (70, middle), (92, middle), INK)
    _box(ax, 408, middle - 14, 56, 28, "Average" if common else "Routed", FAINT)
    _arrow(ax, (464, middle), (482, middle), INK)
    _box(ax, 482, middle - 26, 86, 52, "Shared output\nprojection\n→ next token", "#D9DDE3")
    return figure


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, fill: str, bold: bool = False) -> None:
    style = "round,pad=0,rounding_size=4"
    edge = tint(SOFT, 0.45) if text_color(fill) == INK else "none"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=0.8, zorder=3)
    )
    ax.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        size=8.5,
        linespacing=1.15,
        zorder=4,
        weight="bold" if bold else "normal",
        color=text_color(fill),
    )


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """An arrow between two points; the way not taken is pale and lies below the one taken."""
    level = 2.5 if text_color(color) == "white" else 2
    look: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 9,
        "linewidth": 1.2,
        "shrinkA": 1,
        "shrinkB": 1,
    }
    ax.add_patch(FancyArrowPatch(start, end, color=color, zorder=level, **look))
