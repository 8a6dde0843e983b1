"""The figures of the router: what each one draws, what it refuses, and that a reading adds up."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from mome_utils import figures_router as figures
from mome_utils.figures_style import FigureError, colors, png_bytes
from mome_utils.router_fit import fit_router
from mome_utils.routing import TokenRouter
from mome_utils.tokenization import encode, train_tokenizer

TEXTS = {"en": ["the sea and the land are wide", "the wind and the rain"] * 4,
         "fr": ["la mer et la terre sont vastes", "le vent et la pluie é"] * 4}
TOKENIZER = train_tokenizer([text for part in TEXTS.values() for text in part], 300)


@pytest.fixture(autouse=True)
def _no_warnings():
    """A warning would end up in a notebook's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def router() -> TokenRouter:
    return fit_router({g: [np.array(ids) for ids in encode(TOKENIZER, part)] for g, part in TEXTS.items()},
                      len(TOKENIZER))


def entries() -> pd.DataFrame:
    rows = [("tokens", "SGD", 1.0, 99.0), ("tokens", "SVM", 2.0, 98.0), ("pairs", "SGD", 5.0, 99.5)]
    table = pd.DataFrame(rows, columns=["series", "label", "cost", "quality"])
    return table.assign(low=table["quality"] - 0.1, high=table["quality"] + 0.1)


def prefixes() -> pd.DataFrame:
    return pd.DataFrame([
        {"panel": panel, "series": g, "tokens": n, "accuracy": 50.0 + n, "low": 49.0 + n, "high": 51.0 + n}
        for panel in ("blocks", "crops") for g in ("en", "fr") for n in (1, 2, 4)
    ])


def bins() -> pd.DataFrame:
    return pd.DataFrame([
        {"panel": "8 tokens", "series": series, "confidence": c, "accuracy": c - 0.1, "sequences": size}
        for series in ("before", "after") for c, size in ((0.4, 5), (0.6, 50), (0.9, 500))
    ])


def test_classifiers_stand_in_the_order_of_their_best() -> None:
    figure = figures.bake_off_costs(entries(), "Cost", "F1")
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["SGD", "SVM"]
    tokens, pairs = left.lines
    assert np.allclose(tokens.get_xdata(), [1.0, 2.0])  # what is missing to 100
    assert np.allclose(pairs.get_xdata(), [0.5])
    assert right.lines[1].get_xdata().tolist() == [5.0]
    assert abs(tokens.get_ydata()[0] - pairs.get_ydata()[0]) < 0.5  # one row, side by side
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tokens", "pairs"]


def test_a_faultless_entry_can_be_drawn() -> None:
    figure = figures.bake_off_costs(entries().assign(quality=100.0, high=100.0, low=99.0), "Cost", "F1")
    assert figure.axes[0].lines[0].get_xdata().tolist() == [figures.LEAST_MISSING] * 2


def test_curves_show_the_measured_lengths_and_the_target() -> None:
    figure = figures.prefix_curves(prefixes(), target=99.0)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["blocks", "crops"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "4"]
    english = next(line for line in figure.axes[1].lines if line.get_color() == colors(["en"])["en"])
    assert english.get_ydata().tolist() == [51.0, 52.0, 54.0]
    assert figure.legends[0].get_texts()[-1].get_text() == "99 %"


def test_thin_bins_are_left_out() -> None:
    figure = figures.calibration_curves(bins(), least=30)
    diagonal, before, after = figure.axes[0].lines
    assert before.get_xdata().tolist() == after.get_xdata().tolist() == [0.6, 0.9]
    assert diagonal.get_xdata().tolist() == [0, 1]


def test_risk_is_drawn_where_there_is_some() -> None:
    figure = figures.risk_coverage_curves({"8 tokens": ([0.2, 0.5, 1.0], [0.0, 0.01, 0.1])})
    assert np.allclose(figure.axes[0].lines[0].get_xdata(), [50, 100])
    assert np.allclose(figure.axes[0].lines[0].get_ydata(), [1, 10])


def test_a_reading_ends_with_the_probabilities_of_the_whole_text() -> None:
    fitted, text = router(), "the mer and"
    figure = figures.reading(fitted, TOKENIZER, text)
    ids = torch.tensor(encode(TOKENIZER, [text]))
    above, below = figure.axes[:2]
    last = [line.get_ydata()[-1] for line in above.lines]
    assert np.allclose(last, fitted.probabilities(ids)[0])
    first = [line.get_ydata()[0] for line in above.lines]
    assert np.allclose(first, fitted.probabilities(ids[:, :1])[0])
    shown = below.collections[0].get_array().reshape(2, -1)
    assert np.allclose(shown.sum(0), 0)
    logits = (fitted(ids)[0] - fitted.bias).numpy()
    assert np.allclose(shown.sum(1), logits - logits.mean())
    names = [label.get_text() for label in below.get_xticklabels()]
    assert names == figures.token_texts(TOKENIZER, ids[0].tolist())


def test_a_long_text_is_cut() -> None:
    figure = figures.reading(router(), TOKENIZER, "the sea " * 100)
    assert len(figure.axes[1].get_xticks()) == figures.MOST_TOKENS


def test_every_token_can_be_seen() -> None:
    ids = encode(TOKENIZER, [" a\n\té\x00"])[0]
    shown = "".join(figures.token_texts(TOKENIZER, ids))
    assert shown.isprintable()
    assert shown.startswith("·a↵→")
    half = encode(TOKENIZER, ["€"])[0][:1]  # one byte of three
    assert figures.token_texts(TOKENIZER, half) == [TOKENIZER.convert_ids_to_tokens(half[0])]


@pytest.mark.parametrize("draw", [
    lambda: figures.bake_off_costs(entries().assign(cost=0.0), "", ""),
    lambda: figures.bake_off_costs(entries().drop(columns="series"), "", ""),
    lambda: figures.prefix_curves(prefixes().assign(low=200.0)),
    lambda: figures.calibration_curves(bins().drop(columns="sequences")),
    lambda: figures.risk_coverage_curves({}),
    lambda: figures.risk_coverage_curves({"a": ([0.5, 1.0], [0.1])}),
    lambda: figures.risk_coverage_curves({"a": ([0.5, 1.0], [0.0, 0.0])}),
    lambda: figures.reading(router(), TOKENIZER, ""),
])
def test_what_cannot_be_drawn_is_refused(draw: Callable[[], Figure]) -> None:
    with pytest.raises(FigureError, match=r"\.$"):
        draw()


@pytest.mark.parametrize("draw", [
    lambda: figures.bake_off_costs(entries(), "Cost", "F1"), lambda: figures.prefix_curves(prefixes(), target=99.0),
    lambda: figures.calibration_curves(bins()), lambda: figures.reading(router(), TOKENIZER, "the sea and é\n la mer"),
    lambda: figures.risk_coverage_curves({"a": ([0.5, 1.0], [0.01, 0.1])}),
])
def test_figures_are_reproducible(draw: Callable[[], Figure]) -> None:
    assert png_bytes(draw(), dpi=40) == png_bytes(draw(), dpi=40)
