"""Figures of numbers in a grid: confusion matrices, tables as heat maps, the matrices R of forgetting.

Import them from ``figures``, which offers every figure of the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .figures_style import (
    FAINT,
    INK,
    SOFT,
    WIDTH,
    FigureError,
    log_ticks,
    name_of,
    number,
    panels,
    require,
    styled,
    text_color,
)

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "mome", ("#F7FAFD", "#CFE1F2", "#93C0E0", "#4A94C7", "#1F6AA8", "#0B3C6F")
).with_extremes(bad=FAINT)
FRAME = "#D55E00"


@styled
def confusion(matrix: np.ndarray, labels: Sequence[str]) -> Figure:
    """A confusion matrix: the share of each true class (row) predicted as each class (column), with counts.

    matrix: counts or weights [classes, classes], non-negative. A class without examples stays grey.
    """
    counts = _matrix(matrix, labels, labels)
    if not (counts >= 0).all():
        raise FigureError(
            "The confusion matrix has negative or missing counts: give counts of true by predicted class."
        )
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    texts = np.array(
        [[_share_text(*cell) for cell in zip(*row, strict=True)] for row in zip(share, counts, strict=True)]
    )
    names = [name_of(label) for label in labels]
    edge = 0.85 * len(labels)
    figure, (ax,) = panels(1, width=min(WIDTH, 2.0 + 1.2 * edge), height=0.9 + 0.8 * edge)
    mesh = _cells(ax, share, names, names, Normalize(0, 1), texts)
    ax.set(xlabel="Predicted", ylabel="True")
    bar = figure.colorbar(mesh, ax=ax, format=PercentFormatter(1, symbol=" %"), fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("Share of the true class")
    return figure


@styled
def heat_map(
    df: pd.DataFrame,
    fmt: str,
    label: str,
    best: str | None = None,
    lower_is_better: bool = True,
    log: bool = False,
) -> Figure:
    """A table of numbers as colours.

    df: wide; the index names the rows, the columns the columns, cells are numbers (nan: not measured, grey).
    fmt: format of a cell, such as ".2f". label: what the colour means, with its unit. best: "row" or "column"
    frames the best cell of each. log: a logarithmic colour scale, for values over several powers of ten.
    """
    require(df, ())
    if best not in (None, "row", "column"):
        raise FigureError(f"The heat map cannot mark the best per {best!r}: choose 'row', 'column' or None.")
    wrong = [str(column) for column in df.columns if not pd.api.types.is_numeric_dtype(df[column])]
    if wrong or not np.isfinite(df.to_numpy(dtype=float)).any():
        raise FigureError(f"The heat map needs numbers, but finds none in {', '.join(wrong) or 'any column'}.")
    rows, columns = [name_of(key) for key in df.index], [name_of(key) for key in df.columns]
    matrix = _matrix(df.to_numpy(), rows, columns)
    bold = np.zeros(matrix.shape, dtype=bool)
    if best is not None:
        signed = np.where(np.isfinite(matrix), matrix if lower_is_better else -matrix, np.inf)
        axis = 1 if best == "row" else 0
        bold = (signed == signed.min(axis=axis, keepdims=True)) & np.isfinite(matrix)
    low, high = float(np.nanmin(matrix)), float(np.nanmax(matrix))
    norm = LogNorm(low, max(high, low * 1.001)) if log and low > 0 else Normalize(low, high if high > low else low + 1)
    texts = np.array([["–" if cell != cell else number(cell, fmt) for cell in row] for row in matrix], dtype=object)
    figure, (ax,) = panels(1, width=min(WIDTH, 3.2 + 0.95 * len(columns)), height=0.8 + 0.36 * max(3, len(rows)))
    mesh = _cells(ax, matrix, rows, columns, norm, texts, bold=bold)
    bar = figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    if isinstance(norm, LogNorm):
        log_ticks(bar.ax.yaxis, high / low)
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    bar.set_label(label)
    return figure


@styled
def r_matrices(
    matrices: Mapping[str, tuple[np.ndarray, Sequence[str], Sequence[str]]],
    label: str = "Bits per byte",
    fmt: str = ".2f",
) -> Figure:
    """The matrices R[stage, language], one panel per model, on one colour scale.

    matrices: name → (R [stages, languages], the stages in training order, the languages). The cell of the
    language learned in a stage is framed. label: what R holds, with its unit.
    """
    if not matrices:
        raise FigureError("The figure of R matrices needs at least one matrix.")
    checked = {name: _matrix(values, stages, languages) for name, (values, stages, languages) in matrices.items()}
    low = min(float(np.nanmin(matrix)) for matrix in checked.values())
    high = max(float(np.nanmax(matrix)) for matrix in checked.values())
    norm = Normalize(low, high if high > low else low + 1)
    columns = min(3, len(matrices))
    deepest = max(matrix.shape[0] for matrix in checked.values())
    figure, axes = panels(
        len(matrices),
        columns=columns,
        height=0.9 + 0.42 * max(2, deepest),
        width=min(WIDTH, 1.6 + 3.2 * columns),
    )
    for ax, (name, (_, stages, languages)) in zip(axes, matrices.items(), strict=True):
        matrix = checked[name]
        texts = np.array([["–" if cell != cell else number(cell, fmt) for cell in row] for row in matrix], dtype=object)
        framed = np.array([[str(stage) == str(language) for language in languages] for stage in stages])
        shown = [name_of(language) for language in languages]
        mesh = _cells(ax, matrix, [name_of(stage) for stage in stages], shown, norm, texts, bold=framed, size=8)
        ax.set_title(name_of(name))
        ax.tick_params(labelsize=8)
        ax.set_ylim(len(stages), len(stages) - deepest)  # the last stages of all models stand side by side
    for ax in axes[::columns]:
        ax.set_ylabel("After stage")
    bar = figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(label)
    return figure


def _matrix(values: object, rows: Sequence[object], columns: Sequence[object]) -> np.ndarray:
    """Check that ``values`` is a non-empty matrix [len(rows), len(columns)] of numbers (nan allowed)."""
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or matrix.size == 0 or matrix.shape != (len(rows), len(columns)):
        raise FigureError(
            f"The figure's matrix has shape {matrix.shape}, its labels say ({len(rows)}, {len(columns)})."
        )
    return matrix


def _cells(
    ax: Axes,
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    norm: Normalize,
    texts: np.ndarray,
    *,
    bold: np.ndarray | None = None,
    size: float = 8.5,
) -> Any:
    """Cells [rows, columns] coloured by ``norm`` with ``texts`` on them; returns the mesh for a colour bar.

    Cells that are nan stay grey. ``bold`` [rows, columns] marks cells to print bold and to frame.
    """
    mesh = ax.pcolormesh(np.ma.masked_invalid(matrix), cmap=SEQUENTIAL, norm=norm, edgecolors="white", linewidth=1.5)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.tick_params(length=0, labelcolor=INK)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(matrix):
        marked = bold is not None and bool(bold[i, j])
        shade = text_color(SEQUENTIAL(norm(value))) if np.isfinite(value) else SOFT
        weight = "bold" if marked else "normal"
        place: dict[str, Any] = {"ha": "center", "va": "center"}
        ax.text(j + 0.5, i + 0.5, str(texts[i, j]), color=shade, weight=weight, size=size, **place)
        if marked:
            corner = (j + 0.035, i + 0.035)
            ax.add_patch(Rectangle(corner, 0.93, 0.93, fill=False, edgecolor=FRAME, linewidth=1.6))
    return mesh


def _share_text(share: float, count: float) -> str:
    """What a cell of the confusion matrix says: nothing but 0 where nothing is, a dash for an empty class."""
    if not np.isfinite(share):
        return "–"
    return "0" if count == 0 else f"{100 * share:.2f} %" + (f"\n{count:,.0f}" if count == round(count) else "")
