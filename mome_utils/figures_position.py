"""Figures of position bias: where positives stand in training, and what a word costs at each position."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .figures_arms import arm_name
from .figures_style import colors, legend, panels, require, styled, thousands, tint, unique

__all__ = ["position_profile"]


@styled
def position_profile(seen: pd.DataFrame, losses: pd.DataFrame, bins: int = 8) -> Figure:
    """Left: how often training showed a positive at each position. Right: the loss of a test word, by position.

    seen: ``position``, ``count``. losses: ``position``, ``nats`` (sum), ``words``, ``kind`` (a line), and any number of
    rows for a position (seeds, say). bins: positions that are taken together in the lines; where they hold less than a
    tenth of the usual number of words, no line is drawn. The shade on the right are the positions that training showed.
    """
    require(seen, ("position", "count"), ("position", "count"))
    require(losses, ("position", "nats", "words", "kind"), ("position", "nats", "words"))
    figure, (left, right) = panels(2, columns=2, height=3.2)
    places = seen.groupby("position")["count"].sum()
    left.bar(places.index, places, width=1.0, color=tint("#0067C0", 0.35), linewidth=0)
    end = int(losses["position"].max()) + 1
    thousands(left, "y")
    left.set(xlim=(0, end), xlabel="Position", ylabel="Positives in training", title="Training")
    kinds = unique(losses["kind"])
    color = colors(kinds)
    right.axvspan(0, int(places.index.max()), color="#DFE7F0", linewidth=0, zorder=0)
    for kind in kinds:
        part = losses[losses["kind"].astype(str) == kind]
        table = part.groupby(part["position"] // bins)[["nats", "words"]].sum()
        table = table[table["words"] >= 0.1 * table["words"].mean()]
        middle = np.minimum((table.index + 0.5) * bins, end)
        right.plot(middle, table["nats"] / table["words"], color=color[kind])
    right.set(xlim=(0, end), xlabel="Position", ylabel="Nats per word", title="Test")
    handles = [*(Line2D([], [], color=color[kind]) for kind in kinds), Patch(color="#DFE7F0")]
    legend(figure, handles, [*(arm_name(kind) for kind in kinds), "seen in training"])  # inside, lines would cross it
    return figure
