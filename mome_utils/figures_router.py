"""Figures of the router: quality against cost, short prompts, calibration, abstention, and how it reads a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mome_utils.tokenization import encode

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
    require,
    require_intervals,
    styled,
    tint,
    unique,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mome_utils.routing import TokenRouter

__all__ = [
    "LEAST_MISSING", "MOST_TOKENS", "bake_off_costs", "calibration_curves", "prefix_curves", "reading",
    "risk_coverage_curves", "token_texts",
]

#: Tokens of a text that :func:`reading` shows.
MOST_TOKENS = 40
#: Points to 100 below which an entry is drawn as if that much were missing.
LEAST_MISSING = 0.01
#: Against a language, for a language.
DIVERGING = LinearSegmentedColormap.from_list("for_against", ("#B35806", "#F7F7F7", "#1F6AA8"))
#: What stands for characters that have no picture.
_SIGNS = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})


@styled
def bake_off_costs(df: pd.DataFrame, xlabel: str, ylabel: str) -> Figure:
    """Quality and cost of many entries side by side, a row per classifier and a colour and marker per features.

    Quality is drawn on a logarithmic axis of what is missing to 100, so that 99.9 and 99.99 stay apart; what is
    missing less than :data:`LEAST_MISSING` is drawn there.

    df: ``series`` (features), ``label`` (classifier), ``cost`` (positive), ``quality``, ``low``, ``high`` in per
    cent, one row per entry. Classifiers stand in the order of their best quality.
    """
    require_intervals(require(df, ("series", "label", "cost"), ("cost",)), ("series", "label", "cost"), "quality")
    if (df["cost"] <= 0).any():
        raise FigureError("The costs must be above zero for a logarithmic axis: check the column cost.")
    best = df.groupby(df["label"].astype(str), sort=False)["quality"].max().sort_values(ascending=False, kind="stable")
    names, series = list(best.index), unique(df["series"])
    color, marker = colors(series), markers(series)
    figure, (left, right) = panels(2, columns=2, height=1.0 + 0.36 * len(names), sharey=True, width_ratios=[1.4, 1])
    look: dict[str, Any] = {"linestyle": "none", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
    for key, part in df.groupby(df["series"].astype(str), sort=False):
        shade, sign = color[str(key)], marker[str(key)]
        offset = (series.index(str(key)) - (len(series) - 1) / 2) * 0.14
        rows = np.array([names.index(str(label)) for label in part["label"]]) + offset
        low, middle, high = (
            (100 - part[column].to_numpy(dtype=float)).clip(LEAST_MISSING) for column in ("high", "quality", "low")
        )
        left.hlines(rows, low, high, color=tint(shade, 0.45), linewidth=1.6)
        left.plot(middle, rows, sign, color=shade, **look)
        right.plot(part["cost"], rows, sign, color=shade, **look)
    left.set(xscale="log", xlabel=ylabel, ylim=(len(names) - 0.5, -0.5))
    left.invert_xaxis()
    left.xaxis.set_major_locator(FixedLocator([50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 - value:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_yticks(range(len(names)), names)
    left.tick_params(axis="y", labelcolor=INK)
    right.set(xscale="log", xlabel=xlabel)
    log_ticks(right.xaxis, float(df["cost"].max() / df["cost"].min()))
    handles = [Line2D([], [], color=color[key], marker=marker[key], linestyle="none", markersize=6) for key in series]
    legend(figure, handles, [name_of(key) for key in series])
    return figure


@styled
def prefix_curves(
    df: pd.DataFrame, ylabel: str = "Routed correctly (%)", xlabel: str = "Tokens shown", target: float | None = None
) -> Figure:
    """Accuracy against the number of tokens shown, with intervals as bands; a panel per router.

    df: ``panel``, ``series`` (a language or a method), ``tokens``, ``accuracy``, ``low``, ``high``, in per cent.
    target: a value to reach, drawn as a line.
    """
    require_intervals(require(df, ("panel", "series", "tokens"), ("tokens",)), ("panel", "series"), "accuracy")
    names, color = unique(df["panel"]), colors(df["series"])
    marker = markers(df["series"])
    figure, axes = panels(len(names), columns=2, height=3.2, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        part = df[df["panel"].astype(str) == name]
        if target is not None:
            ax.axhline(target, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
        for key, own in part.groupby(part["series"].astype(str), sort=False):
            own = own.sort_values("tokens")
            ax.fill_between(own["tokens"], own["low"], own["high"], color=color[str(key)], alpha=0.16, linewidth=0)
            ax.plot(own["tokens"], own["accuracy"], color=color[str(key)], marker=marker[str(key)], markersize=4.5,
                    markeredgecolor="white", markeredgewidth=0.5)
        ax.set(xscale="log", xlabel=xlabel)
        ax.set_title(name_of(name) if len(names) > 1 else "")
        _powers_of_two(ax, part["tokens"])
    axes[0].set_ylabel(ylabel)
    handles = [Line2D([], [], color=color[key], marker=marker[key], markersize=5) for key in color]
    labels = [name_of(key) for key in color]
    if target is not None:
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (4, 2))))
        labels.append(f"{number(target, 'g')} %")
    legend(figure, handles, labels)
    return figure


def _powers_of_two(ax: Axes, values: pd.Series) -> None:
    """Ticks at the numbers that were measured."""
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(values.tolist()))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())


@styled
def calibration_curves(df: pd.DataFrame, least: int = 30) -> Figure:
    """Accuracy against confidence, a panel per length of text; below the diagonal the router is too sure.

    df: ``panel``, ``series`` (for example before and after), ``confidence``, ``accuracy`` (shares), ``sequences``:
    rows of :func:`mome_utils.router_confidence.reliability`. least: bins with fewer sequences are left out.
    """
    require(df, ("panel", "series", "confidence", "accuracy", "sequences"), ("confidence", "accuracy", "sequences"))
    names, series = unique(df["panel"]), unique(df["series"])
    color, marker = colors(series), markers(series)
    figure, axes = panels(len(names), width=min(WIDTH, 0.6 + 3.1 * len(names)), height=3.6, sharey=True)
    for ax, name in zip(axes, names, strict=True):
        ax.plot([0, 1], [0, 1], color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        part = df[(df["panel"].astype(str) == name) & (df["sequences"] >= least)]
        for key, own in part.groupby(part["series"].astype(str), sort=False):
            own = own.sort_values("confidence")
            ax.plot(own["confidence"], own["accuracy"], color=color[str(key)], marker=marker[str(key)], markersize=5,
                    markeredgecolor="white", markeredgewidth=0.5)
        ax.set(xlim=(0.2, 1.02), ylim=(0.2, 1.02), aspect="equal", xlabel="Probability of the route")
        ax.set_title(name)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(FixedLocator([0.25, 0.5, 0.75, 1.0]))
    axes[0].set_ylabel("Share that is right")
    legend(figure, [Line2D([], [], color=color[key], marker=marker[key], markersize=5) for key in series], series)
    return figure


@styled
def risk_coverage_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Errors among the sequences that are answered, against the share answered, on a logarithmic risk axis.

    curves: name → (coverage, risk), shares; points without any error are not drawn, since their logarithm is not.
    """
    if not curves:
        raise FigureError("The figure of risk and coverage needs at least one curve.")
    figure, (ax,) = panels(1, height=3.3)
    color, marker = colors(curves), markers(curves)
    for name, (coverage, risk) in curves.items():
        x, y = 100 * np.asarray(coverage, dtype=float), 100 * np.asarray(risk, dtype=float)
        if x.shape != y.shape or x.ndim != 1 or not len(x):
            raise FigureError(f"The curve '{name}' needs as many risks as coverages: give two lists of one length.")
        seen = y > 0
        if seen.any():
            ax.plot(x[seen], y[seen], color=color[name], marker=marker[name], markevery=0.12, markersize=5,
                    markeredgecolor="white", markeredgewidth=0.5)
    if all(not np.any(np.asarray(risk) > 0) for _, risk in curves.values()):
        raise FigureError("No curve has an error, so there is nothing to draw: use shorter texts.")
    ax.set(xlabel="Sequences answered (%)", ylabel="Wrong among the answered (%)", yscale="log", xlim=(None, 101))
    low, high = ax.get_ylim()
    log_ticks(ax.yaxis, high / low)
    legend(figure, [Line2D([], [], color=color[key], marker=marker[key], markersize=5) for key in curves], list(curves))
    return figure


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Each token as a reader can see it: ``·`` a space, ``↵`` a line break; bytes that are no text as they are kept."""
    texts = []
    for token in ids:
        text = str(tokenizer.decode([token]))
        text = str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
        texts.append("".join(c if c.isprintable() else "□" for c in text.translate(_SIGNS)))
    return texts


@styled
def reading(router: TokenRouter, tokenizer: PreTrainedTokenizerFast, text: str) -> Figure:
    """How a router reads a text: its probabilities after each token, and what each token adds in the end.

    Above, the probability of each language when only the tokens so far are shown. Below, the share of each token in
    the logits of the text as shown, minus the mean over languages, since only differences decide. At most
    :data:`MOST_TOKENS` tokens are shown.

    Raises:
        FigureError: a text without a token.
    """
    ids = torch.tensor(encode(tokenizer, [text])[0][:MOST_TOKENS], dtype=torch.int64)
    if not len(ids):
        raise FigureError("There is nothing to read: type a few words.")
    number_of = len(ids)
    so_far = torch.ones(number_of, number_of, dtype=torch.int64).tril()
    chance = router.probabilities(ids.expand(number_of, -1), so_far).cpu().numpy()
    parts = router.contributions(ids).cpu().numpy()
    parts = parts - parts.mean(axis=1, keepdims=True)
    figure, axes = panels(2, columns=1, height=2.0, height_ratios=[1.5, 1], sharex=True)
    above, below = axes
    color, marker = colors(router.languages), markers(router.languages)
    place = np.arange(number_of)
    for row, language in enumerate(router.languages):
        above.plot(place, chance[:, row], color=color[language], marker=marker[language], markersize=4,
                   markeredgecolor="white", markeredgewidth=0.5)
    above.set(ylim=(-0.03, 1.03), ylabel="Probability so far")
    reach = max(float(np.abs(parts).max()), 1e-9)
    edges = np.arange(number_of + 1) - 0.5
    mesh = below.pcolormesh(
        edges, np.arange(len(router.languages) + 1), parts.T, cmap=DIVERGING, norm=TwoSlopeNorm(0, -reach, reach),
        edgecolors="white", linewidth=0.8,
    )
    below.set_yticks(np.arange(len(router.languages)) + 0.5, [name_of(language) for language in router.languages])
    below.set(ylim=(len(router.languages), 0), xlim=(-0.5, number_of - 0.5))
    below.set_xticks(place, token_texts(tokenizer, ids.tolist()), rotation=90, family="monospace")
    below.tick_params(length=0, labelcolor=INK)
    below.grid(False)
    options: dict[str, Any] = {"fraction": 0.05, "pad": 0.02}
    bar = figure.colorbar(mesh, ax=axes, **options)
    bar.outline.set_visible(False)
    bar.set_label("Part of the logit")
    handles = [Line2D([], [], color=color[key], marker=marker[key], markersize=5) for key in router.languages]
    legend(figure, handles, [name_of(key) for key in router.languages])
    return figure
