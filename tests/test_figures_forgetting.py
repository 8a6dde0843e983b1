"""Figures of notebook 06: what they draw is what their tables say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mome_utils import figures_forgetting as charts
from mome_utils.config import MomeError
from mome_utils.figures_style import FigureError, png_bytes
from mome_utils.recipes_continual import COURSES


def points():
    rows = [("Sequential", "", 0.1, 0.5), ("EWC", "λ = 10", 0.2, 0.4), ("EWC", "λ = 100", 0.3, 0.2)]
    table = pd.DataFrame(rows, columns=["family", "note", "x", "y"])
    return table.assign(x_low=table["x"] - 0.05, x_high=table["x"] + 0.05, y_low=-np.inf, y_high=np.inf)


def test_a_point_per_method_joined_within_a_family():
    figure = charts.stability_plasticity(points(), "x", "y")
    (ax,) = figure.axes
    paths = [line for line in ax.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in paths] == [[0.2, 0.3]]
    notes = {text.get_text() for text in ax.texts}
    assert {"λ = 10", "λ = 100", "better"} <= notes and "" not in notes
    # Intervals are drawn where they have limits, and only there.
    flat = [line for line in ax.get_lines() if len(line.get_xdata()) == 2 and np.ptp(line.get_ydata()) == 0]
    assert len([line for line in flat if np.isclose(np.ptp(line.get_xdata()), 0.1)]) == 3
    with pytest.raises(FigureError, match="lacks y_low"):
        charts.stability_plasticity(points().drop(columns="y_low"), "x", "y")


def test_layers_and_parts_are_drawn_by_stage():
    drift = pd.DataFrame([(p, d + s, g, s) for s in (0, 1) for g in ("fr", "py") for p, d in (("A", 1.0), ("B", 2.0))],
                         columns=["part", "drift", "stage", "seed"])
    layers = pd.DataFrame([(i, 0.9 - 0.1 * s, g, s) for s in (0, 1) for g in ("fr", "py") for i in (0, 1)],
                          columns=["layer", "similarity", "stage", "seed"])
    left, right = charts.layer_changes(drift, layers, "CKA").axes
    means = [list(line.get_xdata()) for line in left.get_lines()]
    assert means == [[1.5, 2.5], [1.5, 2.5]]
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[pytest.approx(0.85)] * 2] * 2
    assert [label.get_text() for label in left.get_yticklabels()] == ["A", "B"]
    assert right.get_ylabel() == "CKA"


def test_relearning_shows_both_curves_and_the_level():
    table = pd.DataFrame([(s, v, a, 0) for a, v in (("learn", 4.0), ("relearn", 3.0)) for s in (0, 10)],
                         columns=["step", "value", "arm", "seed"])
    figure = charts.relearning_curves(table, {"level": 3.5}, "bits", {"learn": "Untrained"})
    (ax,) = figure.axes
    assert any(list(line.get_ydata()) == [3.5, 3.5] for line in ax.get_lines())
    assert "level: 3.500" in [text.get_text() for text in ax.texts]
    assert "Untrained" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert png_bytes(figure) == png_bytes(figure)
    with pytest.raises(FigureError, match="not finite"):
        charts.relearning_curves(table, {"level": np.inf}, "bits")


def test_labels_fall_into_method_and_strength():
    labels = [course.label for course in COURSES.values()]
    split = {label: (charts.family_of(label), charts.note_of(label)) for label in labels}
    assert split["EWC, λ = 100"] == ("EWC", "λ = 100")
    assert split["Replay 5 %"] == ("Replay", "5 %")
    assert split["LwF, weight 0.3"] == ("LwF", "weight 0.3")
    assert split["L2 pull, λ = 10"] == ("L2 pull", "λ = 10")
    assert split["A tenth of the rate"] == ("A tenth of the rate", "")
    assert split["Fresh optimizer, new warm-up"][1] == ""


def test_a_course_is_drawn_with_its_own_bands_or_refused():
    order = ("en", "py")
    points = [(s, 4.0, g, 0) for s in (5, 10) for g in order]
    curve = pd.DataFrame(points, columns=["step", "value", "language", "seed"])
    study = SimpleNamespace(curves=lambda arms: curve.assign(arm=next(iter(arms))))
    runs = [SimpleNamespace(spec=SimpleNamespace(snapshots=(5, 10)))]
    paths, label = {(order, "sequential"): runs}, {"sequential": "Sequential", "ewc": "EWC"}
    (ax,) = charts.course_curves(study, paths, [(order, "sequential")], label).axes
    assert {"English", "Python"} <= {text.get_text() for text in ax.texts}
    with pytest.raises(MomeError, match="EWC has no run in the order en → py"):
        charts.course_curves(study, paths, [(order, "ewc")], label)
