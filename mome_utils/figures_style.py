"""The look of every figure: one style, fixed colours, checked input, reproducible files.

``figures`` builds on this module. Nothing here touches matplotlib's global settings: the style
holds only inside ``style()``, and figures are made without pyplot, so a notebook shows them once.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .artifacts import write_atomic
from .config import MomeError

P = ParamSpec("P")

INK, SOFT, GRID, FAINT = "#222222", "#5F6368", "#E4E6E9", "#F4F5F7"
WIDTH = 8.0  # inches; a notebook's text column at 150 dots per inch

# The hues of Okabe and Ito (2008) and Tol (2021), with lightness moved apart until the languages, the
# distillation arms, the modular models and the forgetting arms each stay apart in simulated deuteranopia,
# protanopia and tritanopia; a test measures it.
LANGUAGE_COLORS: Mapping[str, str] = MappingProxyType(
    {"en": "#005F9E", "fr": "#C24A00", "de": "#EDB120", "py": "#14A57A"}
)
ARM_COLORS: Mapping[str, str] = MappingProxyType(
    {
        "ce": "#6F6F6F",
        "fixed": "#0067C0",
        "adaptive": "#C24A00",
        "alternating": "#12AE7D",
        "reverse_kl": "#DDA0CF",
        "forward_kl": "#EFA31D",
        "teacher": "#222222",
        "ple": "#33A1DE",
        "jeet": "#AA4499",
        "moe_ce": "#332288",
        "sequential": "#DD7788",
        "single_session": "#A89B2E",
        "moe": "#117733",
    }
)
# Neither list holds these, so a further language or series never looks like a known one.
_RESERVE = ("#7A45C8", "#83C058", "#54390F", "#24C4D4", "#7F1D55", "#CF5BD0", "#7A869A", "#232C86")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "h", "<", ">", "d", "*")

_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "en": "English",
        "fr": "French",
        "de": "German",
        "py": "Python",
        "ce": "CE only",
        "fixed": "Fixed α",
        "adaptive": "Adaptive α",
        "alternating": "Alternating",
        "reverse_kl": "Reverse KL",
        "forward_kl": "Forward KL",
        "teacher": "Teacher",
        "ple": "PLE",
        "jeet": "JEET",
        "moe_ce": "MoE-CE",
        "sequential": "Sequential",
        "single_session": "Single session",
        "moe": "MoE",
        "common": "Common expert",
        "untrained": "Untrained",
        "untrained_teacher": "Untrained teacher",
        "plain": "Usual training",
        "twice": "Same batch twice",
        "rps": "RPS",
        "cp": "CP",
        "left": "Left padding",
        "rps_cp": "RPS and CP",
        "rps_alone": "RPS alone",
        "cp_alone": "CP alone",
        "published_adaptive": "Adaptive α (published)",
        "published_inverse_kl": "“Inverse KL” (published)",
        "published_forward_kl": "Forward KL (published)",
        "published_l1_product": "L1 product (published)",
        "train": "Train",
        "validation": "Validation",
        "test": "Test",
    }
)

_RC: Mapping[str, Any] = MappingProxyType(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.monospace": ["DejaVu Sans Mono"],
        "font.size": 9.0,
        "text.color": INK,
        "text.usetex": False,
        "text.parse_math": False,  # a "$" in a label or in code is a dollar sign
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 7.0,
        "axes.labelsize": 9.0,
        "axes.labelcolor": INK,
        "axes.labelpad": 5.0,
        "axes.edgecolor": "#B5B9BF",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "grid.linestyle": "-",
        "xtick.color": "#B5B9BF",
        "ytick.color": "#B5B9BF",
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3.0,
        "ytick.major.size": 0.0,
        "xtick.major.width": 0.8,
        "lines.linewidth": 1.7,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.4,
        "figure.facecolor": "white",
        "figure.dpi": 100.0,
        "savefig.facecolor": "white",
        "savefig.bbox": None,
        "svg.hashsalt": "mome",
        "svg.fonttype": "path",  # looks the same where the font is not installed
    }
)


class FigureError(MomeError):
    """A figure was asked for with data it cannot draw; the message is one sentence."""


@contextmanager
def style() -> Iterator[None]:
    """The study's matplotlib settings inside the block; the caller's are back after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(dict(_RC))  # type: ignore[arg-type]
        yield


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a figure function inside ``style()`` and lay its figure out before the style ends.

    matplotlib makes ticks when it first draws, so the figure is drawn while the style holds; then its layout
    is fixed, because the layout engine moves things by a hair at each drawing and files would differ.
    """

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        return figure

    return inside


def save_svg(fig: Figure, path: str | Path) -> None:
    """Write ``fig`` as SVG; the same figure gives the same bytes each time (no date, fixed ids)."""
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    write_atomic(Path(path), buffer.getvalue())


def png_bytes(fig: Figure, dpi: float = 150) -> bytes:
    """``fig`` as a PNG image of ``dpi`` dots per inch, without metadata."""
    buffer = io.BytesIO()
    with style():
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def name_of(key: object) -> str:
    """What a reader sees for a language code, an arm or a split; any other key is shown as it is."""
    return _NAMES.get(str(key), str(key))


def colors(keys: Iterable[object]) -> dict[str, str]:
    """One colour per key: fixed for a known language or arm, else found in a reserve by the key's hash.

    A key keeps its colour from figure to figure, unless another unknown key of the same figure hashes to
    the same place: then the alphabetically later one moves on to the next free colour.

    >>> colors(["py", "en"])
    {'py': '#14A57A', 'en': '#005F9E'}
    """
    ordered = unique(keys)
    found = {**ARM_COLORS, **LANGUAGE_COLORS}
    taken: set[int] = set()
    for key in sorted(set(ordered) - set(found)):
        place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(_RESERVE)
        while place in taken and len(taken) < len(_RESERVE):
            place = (place + 1) % len(_RESERVE)
        taken.add(place)
        found[key] = _RESERVE[place]
    return {key: found[key] for key in ordered}


def markers(keys: Iterable[object]) -> dict[str, str]:
    """One marker per key, in order of appearance, so that colour is never the only difference."""
    return {key: _MARKERS[i % len(_MARKERS)] for i, key in enumerate(unique(keys))}


def unique(keys: Iterable[object]) -> list[str]:
    """The different keys as strings, in order of first appearance."""
    return list(dict.fromkeys(str(key) for key in keys))


def tint(color: str, amount: float) -> str:
    """``color`` mixed with white: 0 leaves it, 1 gives white."""
    red, green, blue = (1 - (1 - part) * (1 - amount) for part in to_rgb(color))
    return to_hex((red, green, blue))


def text_color(background: object) -> str:
    """Dark or white, whichever reads better on ``background`` (WCAG relative luminance)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in to_rgb(background)  # type: ignore[arg-type]
    )
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.32 else INK


def number(value: float, fmt: str = ".3f") -> str:
    """``value`` formatted, with a true minus sign."""
    return format(value, fmt).replace("-", "−")


def require(data: object, columns: Sequence[str], numeric: Sequence[str] = ()) -> pd.DataFrame:
    """Check a figure's table and return it: a non-empty DataFrame with ``columns``, finite where ``numeric``.

    Raises FigureError in one sentence that says which column is missing or wrong.
    """
    if not isinstance(data, pd.DataFrame):
        raise FigureError(f"The figure needs a pandas DataFrame with {', '.join(columns) or 'numbers'}.")
    missing = [column for column in columns if column not in data.columns]
    if missing:
        raise FigureError(f"The figure's table lacks {', '.join(missing)}: give it the columns {', '.join(columns)}.")
    if data.empty:
        raise FigureError("The figure's table has no rows: check the selection it was made from.")
    for column in numeric:
        if not pd.api.types.is_numeric_dtype(data[column]):
            raise FigureError(f"The figure's column {column} must hold numbers, not {data[column].dtype}.")
        if not np.isfinite(data[column].to_numpy(dtype=float)).all():
            raise FigureError(f"The figure's column {column} has missing or infinite values: drop them first.")
    return data


def require_intervals(data: object, columns: Sequence[str], middle: str) -> pd.DataFrame:
    """``require`` with the numeric columns ``middle``, low and high, and low ≤ high in each row."""
    frame = require(data, (*columns, middle, "low", "high"), (middle, "low", "high"))
    if (frame["low"] > frame["high"]).any():
        raise FigureError("The figure's table has an interval whose low is above its high: swap them.")
    return frame


def panels(
    count: int, *, columns: int = 3, width: float = WIDTH, height: float = 2.8, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels in rows of at most ``columns``; ``height`` is one row's, in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    spaces = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(width, height * rows), layout=spaces)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend above all panels, in as few rows of equal length as fit."""
    letters, columns = int(figure.get_figwidth() * 15), len(labels)
    while columns > 1 and sum(max(map(len, part)) + 7 for part in _split(labels, columns)) > letters:
        columns -= 1
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=-(-len(labels) // -(-len(labels) // columns)),
        borderaxespad=0.6,
        borderpad=0,
    )


def _split(labels: Sequence[str], columns: int) -> list[Sequence[str]]:
    """The columns of a legend: one after the other, the first ones longer by one where they do not come out even."""
    rows, longer = divmod(len(labels), columns)
    starts = [column * rows + min(column, longer) for column in range(columns + 1)]
    return [labels[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def thousands(ax: Axes, which: str = "x") -> None:
    """Whole numbers with thousands separators on an axis."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, ",.0f")))


def compact(value: float) -> str:
    """A short number for a logarithmic axis: 20k, 1.5M, 3G (powers of a thousand), plain below 10,000.

    >>> [compact(v) for v in (0.02, 5000, 20000, 1.5e6)]
    ['0.02', '5,000', '20k', '1.5M']
    """
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (4, "k")):
        if value >= 10**power:
            return f"{value / 10 ** max(3, power - power % 3):g}{letter}"
    return number(value, ",.6g")


def log_ticks(axis: Axis, span: float) -> None:
    """Compact numbers on a logarithmic axis: at 1, 2 and 5 of each power of ten if it spans few of them."""
    subs = (1.0, 2.0, 5.0) if span < 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axis.set_minor_locator(NullLocator())
