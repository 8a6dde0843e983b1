"""Figures of similarity: what they draw is what they were given, and wrong tables get one sentence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mome_utils import figures_similarity as charts
from mome_utils.figures import FigureError, png_bytes

NAMES = ["ce", "fixed", "jeet", "common"]


def square(seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).uniform(0.3, 0.8, size=(4, 4))
    return pd.DataFrame((values + values.T) / 2, index=NAMES, columns=NAMES)


def texts(figure: Figure, panel: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[panel].texts]


def ticks(figure: Figure, panel: int = 0) -> list[str]:
    return [label.get_text() for label in figure.axes[panel].get_yticklabels()]


def test_rows_are_ordered_by_the_tree_and_cells_keep_their_values() -> None:
    near = pd.DataFrame(np.full((4, 4), 0.1) + 0.4 * np.eye(4), index=NAMES, columns=NAMES)
    near.loc["ce", "jeet"] = near.loc["jeet", "ce"] = 0.9
    near.loc["fixed", "common"] = near.loc["common", "fixed"] = 0.8
    for matrix, distance in ((near, False), (1 - near, True)):
        figure = charts.clustered({"A": matrix}, "Similarity", distance=distance)
        order = ticks(figure)
        assert {frozenset(order[:2]), frozenset(order[2:])} == {
            frozenset({"CE only", "JEET"}), frozenset({"Fixed α", "Common expert"})}
        shown = np.array(texts(figure), dtype=float).reshape(4, 4)
        assert sorted(shown.ravel()) == pytest.approx(sorted(matrix.to_numpy().ravel()), abs=0.006)
        assert shown == pytest.approx(shown.T)
        assert len(figure.axes[0].lines) == 3  # four leaves make three joints


def test_two_matrices_share_one_scale() -> None:
    figure = charts.clustered({"A": square(), "B": square(1) / 2}, "Similarity")
    meshes = [ax.collections[0] for ax in figure.axes[:2]]
    assert meshes[0].norm.vmin == meshes[1].norm.vmin and meshes[0].norm.vmax == meshes[1].norm.vmax
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["A", "B"]


@pytest.mark.parametrize(("frame", "sentence"), [
    (square().iloc[:2], "must be square"), (square().iloc[:2, :2], "three names or more"),
    (square() + np.triu(np.ones((4, 4)), 1), "must be symmetric"), (square().mask(square() > 0.5), "missing values"),
])
def test_what_is_no_matrix_of_similarity_is_refused(frame: pd.DataFrame, sentence: str) -> None:
    with pytest.raises(FigureError, match=sentence):
        charts.clustered({"A": frame}, "Similarity")
    with pytest.raises(FigureError, match="at least one matrix"):
        charts.clustered({}, "Similarity")


def curves(**columns: object) -> pd.DataFrame:
    rows = [{"panel": p, "layer": i, "kind": k, "value": i / 4 + n} for p in "AB" for n, k in enumerate(NAMES[:2])
            for i in range(3)]
    return pd.DataFrame(rows).assign(**columns)


def test_curves_are_drawn_over_layers_with_their_levels() -> None:
    levels = pd.DataFrame([{"panel": p, "layer": i, "name": n, "value": v} for p in "AB" for i in range(3)
                           for n, v in (("Ceiling", 2.0), ("Floor", -1.0))])
    figure = charts.layer_curves(curves(), "CKA", levels=levels)
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[2] * 3, [-1] * 3, [0, 0.25, 0.5], [1, 1.25, 1.5]]
    assert [line.get_linestyle() for line in lines[:2]] == ["--", ":"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CE only", "Fixed α", "Ceiling", "Floor"]
    assert figure.axes[0].get_title(loc="left") == "A"


def test_intervals_of_curves_stand_beside_each_other() -> None:
    figure = charts.layer_curves(curves(low=-1.0, high=1.0), "CKA")
    places = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert places[0] < 0 < places[1]
    assert len(figure.axes[0].collections) == 2


def test_places_have_a_row_for_each_measure() -> None:
    table = pd.DataFrame([{"row": r, "kind": k, "value": v, "low": v - 0.1, "high": v + 0.1}
                          for r, v in (("CKA", 0.4), ("RSA", 0.7)) for k in NAMES])
    figure = charts.placed_scores(table)
    assert ticks(figure) == ["CKA", "RSA"]
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert [list(line.get_xdata()) for line in drawn] == [[0.4, 0.7]] * 4
    heights = [line.get_ydata()[0] for line in drawn]
    assert heights == sorted(heights) and -0.5 < heights[0] < heights[-1] < 0.5
    assert len(charts.placed_scores(table.drop(columns=["low", "high"])).axes[0].collections) == 0


def test_tables_without_what_a_figure_needs_are_refused() -> None:
    with pytest.raises(FigureError, match="lacks kind"):
        charts.layer_curves(curves().drop(columns="kind"), "CKA")
    with pytest.raises(FigureError, match="missing or infinite"):
        charts.placed_scores(pd.DataFrame([{"row": "CKA", "kind": "ce", "value": np.nan}]))


def test_a_figure_drawn_twice_is_the_same_file() -> None:
    assert png_bytes(charts.layer_curves(curves(), "CKA")) == png_bytes(charts.layer_curves(curves(), "CKA"))
