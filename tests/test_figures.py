"""Figures: what each one draws, what it refuses, and that its files and colours never vary."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib._pylab_helpers
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from mome_utils import figures, figures_style
from mome_utils.config import MomeError

FOUR = ("en", "fr", "de", "py")
FIVE = (*FOUR, "es")


@pytest.fixture(autouse=True)
def _no_warnings():
    """A warning would end up in a notebook's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def curves(arms=("ce", "fixed"), languages=FOUR, seeds=3, steps=6) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = itertools.product(range(0, 100 * steps, 100), arms, languages, range(seeds))
    table = pd.DataFrame(rows, columns=["step", "arm", "language", "seed"])
    return table.assign(value=2 + np.exp(-table["step"] / 300) + 0.1 * rng.random(len(table)))


def intervals(labels=FOUR, groups=("ce", "fixed", "teacher")) -> pd.DataFrame:
    table = pd.DataFrame(itertools.product(labels, groups), columns=["label", "group"])
    estimate = 2 + 0.01 * np.arange(len(table))
    return table.assign(estimate=estimate, low=estimate - 0.05, high=estimate + 0.07)


def tokens(languages=FOUR) -> pd.DataFrame:
    rows = [
        (code, split, size + 10 * i)
        for i, code in enumerate(languages)
        for split, size in (("train", 800), ("validation", 100), ("test", 100))
    ]
    return pd.DataFrame(rows, columns=["language", "split", "tokens"])


def costs() -> pd.DataFrame:
    rows = [("teacher", 5e6, 1.9), ("ce", 8e5, 2.3), ("fixed", 8e5, 2.29), ("adaptive", 8.1e5, 2.291), ("moe", 3e6, 2)]
    table = pd.DataFrame(rows, columns=["label", "cost", "quality"])
    return table.assign(low=table["quality"] - 0.02, high=table["quality"] + 0.02)


def alphas(seeds=3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(step, 0.5 + 0.002 * rng.standard_normal(), seed) for seed in range(seeds) for step in range(50)]
    return pd.DataFrame(rows, columns=["step", "alpha", "seed"])


def data_axes(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend_names(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


GRID = np.linspace(-4, 4, 50)
EVERY: dict[str, Callable[[], Figure]] = {
    "token_bars": lambda: figures.token_bars(tokens(), bound=1050),
    "grouped_bars": lambda: figures.grouped_bars(intervals(), "label", "estimate", "group", "Tokens per word"),
    "block_picture": lambda: figures.block_picture(["<s>", "Le", "Ġchat", "</s>"], [1, 5, 6, 2], "fr"),
    "learning_curves": lambda: figures.learning_curves(curves(), "Bits per byte"),
    "bars_with_intervals": lambda: figures.bars_with_intervals(intervals(), "Bits per byte"),
    "forest": lambda: figures.forest(intervals(groups=("a",)), 0.01, "Difference (bits per byte)"),
    "confusion": lambda: figures.confusion(np.eye(4) * 9 + 1, FOUR),
    "heat_map": lambda: figures.heat_map(pd.DataFrame(np.eye(3), columns=list("abc")), ".2f", "Bits per byte"),
    "forgetting_curves": lambda: figures.forgetting_curves(
        curves(), [(0, 200, "en"), (200, 500, "fr")], "Bits per byte"
    ),
    "r_matrices": lambda: figures.r_matrices({"moe": (np.eye(2), ("en", "fr"), ("en", "fr"))}),
    "quality_cost": lambda: figures.quality_cost(costs(), "Parameters used", "Bits per byte"),
    "alpha_trajectory": lambda: figures.alpha_trajectory(alphas()),
    "toy_divergences": lambda: figures.toy_divergences(GRID, GRID**2, {"forward_kl": GRID, "reverse_kl": -GRID}),
    "moe_diagram": lambda: figures.moe_diagram("moe_ce", FOUR),
}


# --- every figure ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """Every figure, drawn once in a program whose own settings are far from the study's."""
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.hashsalt": "x", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        made = {name: draw() for name, draw in EVERY.items()}
        assert dict(matplotlib.rcParams) == before
    return made


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_gives_the_same_bytes_each_time(name: str, drawn: dict[str, Figure], tmp_path: Path) -> None:
    figure = drawn[name]
    figures.save_svg(figure, tmp_path / "first.svg")
    png = figures.png_bytes(figure, dpi=50)
    figures.save_svg(figure, tmp_path / "second.svg")
    first = (tmp_path / "first.svg").read_bytes()
    assert isinstance(figure, Figure)
    assert first == (tmp_path / "second.svg").read_bytes()
    assert b"<dc:date>" not in first and b"Matplotlib v" not in first
    assert png.startswith(b"\x89PNG") and b"Software" not in png


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_cut_at_the_edge_of_a_figure(name: str, drawn: dict[str, Figure]) -> None:
    with figures_style.style():
        inside = drawn[name].get_tightbbox()
    width, height = drawn[name].get_size_inches()
    assert inside.x0 > -0.01 and inside.y0 > -0.01 and inside.x1 < width + 0.01 and inside.y1 < height + 0.01


@pytest.mark.parametrize("name", ["learning_curves", "heat_map", "quality_cost"])
def test_the_callers_settings_do_not_change_a_figure(name: str, drawn: dict[str, Figure]) -> None:
    assert figures.png_bytes(EVERY[name](), dpi=50) == figures.png_bytes(drawn[name], dpi=50)


def test_figures_stay_out_of_pyplot(drawn: dict[str, Figure]) -> None:
    """A figure that pyplot knows is shown a second time by a notebook."""
    assert matplotlib._pylab_helpers.Gcf.get_num_fig_managers() == 0


# --- colours --------------------------------------------------------------------------------------


def test_colours_belong_to_languages_and_arms() -> None:
    assert figures.colors(["py", "en"]) == {"py": "#14A57A", "en": "#005F9E"}
    assert figures.colors(["teacher", "adaptive"]) == {"teacher": "#222222", "adaptive": "#C24A00"}
    arms = "ce fixed adaptive alternating reverse_kl forward_kl teacher ple jeet moe_ce sequential single_session moe"
    assert set(arms.split()) == set(figures_style.ARM_COLORS)
    assert len(set(figures_style.ARM_COLORS.values())) == 13


@given(st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=6), unique=True, max_size=8))
def test_unknown_keys_get_colours_of_their_own_whatever_their_order(keys: list[str]) -> None:
    color = figures.colors(keys)
    assert color == figures.colors(reversed(keys)) and list(color) == keys
    unknown = [key for key in keys if key not in {**figures_style.ARM_COLORS, **figures_style.LANGUAGE_COLORS}]
    assert len({color[key] for key in unknown}) == len(unknown)
    for key in unknown:
        assert color[key] not in {*figures_style.ARM_COLORS.values(), *figures_style.LANGUAGE_COLORS.values()}


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def cielab(color: str, vision: np.ndarray) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    linear = np.clip(vision @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]])
    xyz = to_xyz @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    "family",
    [
        FOUR,
        ("ce", "fixed", "adaptive", "alternating", "reverse_kl", "forward_kl", "teacher"),
        ("teacher", "ple", "jeet", "moe_ce"),
        ("sequential", "single_session", "moe"),
    ],
    ids=["languages", "distillation", "moe", "forgetting"],
)
def test_colours_of_a_family_stay_apart_for_every_reader(family: tuple[str, ...], vision: str) -> None:
    """ΔE of 2.3 is just noticeable (CIE 1976); lines and dots want far more."""
    points = [cielab(color, VISION[vision]) for color in figures.colors(family).values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)) > 17


# --- the figures one by one -----------------------------------------------------------------------


@pytest.mark.parametrize("languages", [FOUR[:2], FIVE])
def test_token_bars_stack_the_splits_up_to_the_total(languages: tuple[str, ...]) -> None:
    figure = figures.token_bars(tokens(languages), bound=1050)
    (ax,) = data_axes(figure)
    assert ax.get_xlabel() == "Tokens"
    assert len(ax.patches) == 3 * len(languages)
    assert (
        max(bar.get_x() + bar.get_width() for bar in ax.patches)
        == tokens(languages).groupby("language")["tokens"].sum().max()
    )
    assert legend_names(figure) == ["Train", "Validation", "Test", "Largest allowed"]
    assert texts(ax)[0] == "1,000  (smallest)" and texts(ax)[1] == "1,030  (+3.0 %)"
    assert to_hex(ax.patches[0].get_facecolor()).upper() == figures.colors(["en"])["en"]


def test_grouped_bars_draw_a_bar_per_row_and_the_baseline() -> None:
    figure = figures.grouped_bars(intervals(), "label", "estimate", "group", "Tokens per word", baseline=1.0)
    (ax,) = data_axes(figure)
    assert ax.get_ylabel() == "Tokens per word"
    assert sorted(bar.get_height() for bar in ax.patches) == sorted(intervals()["estimate"])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["English", "French", "German", "Python"]
    assert legend_names(figure) == ["CE only", "Fixed α", "Teacher", "Baseline 1"]
    assert list(ax.lines[0].get_ydata()) == [1.0, 1.0]


def test_block_picture_decodes_byte_level_tokens_and_marks_special_ones() -> None:
    shown = ["<s>", "Ġprix", "Ġ", "Ã", "©", "Ã©tÃ©", "Ċ", "ĉ", "Ġ$x$", "</s>"]
    figure = figures.block_picture(shown, range(10), "fr")
    (ax,) = figure.axes
    words = texts(ax)
    assert ["<s>", "·prix", "·", "C3", "A9", "été", "↵", "→", "·$x$", "</s>"] == words[:20:2]
    assert words[1:20:2] == [str(i) for i in range(10)]
    boxes = [patch for patch in ax.patches if isinstance(patch, FancyBboxPatch)]
    dark = [to_hex(box.get_facecolor()) == "#222222" for box in boxes]
    assert dark == [True] + [False] * 8 + [True]
    assert "French, 10 tokens" in words


def test_block_picture_takes_plain_text_any_script_and_long_blocks() -> None:
    figure = figures.block_picture(["é", "语", "x"] * 100, range(300), "zh", limit=9)
    words = texts(figure.axes[0])
    assert words[:6:2] == ["é", "□", "x"] and "zh, 300 tokens, the first 9 shown" in words
    right = max(patch.get_x() + patch.get_width() for patch in figure.axes[0].patches)
    assert right < 72 * figure.get_figwidth()


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("languages", [FOUR[:2], FIVE])
def test_learning_curves_by_arm(languages: tuple[str, ...], seeds: int) -> None:
    table = curves(("ce", "fixed", "adaptive"), languages, seeds)
    figure = figures.learning_curves(table, "Bits per byte")
    axes = data_axes(figure)
    assert [ax.get_title("left") for ax in axes] == ["CE only", "Fixed α", "Adaptive α"]
    assert all(len(ax.lines) == len(languages) for ax in axes)
    assert all(len(ax.collections) == (len(languages) if seeds > 1 else 0) for ax in axes)
    assert axes[0].get_ylabel() == "Bits per byte" and axes[0].get_xlabel() == "Training step"
    assert ("Smallest to largest seed" in legend_names(figure)) == (seeds > 1)
    first = table[(table["arm"] == "ce") & (table["language"] == languages[0])]
    assert np.allclose(axes[0].lines[0].get_ydata(), first.groupby("step")["value"].mean())


def test_learning_curves_by_language_and_in_one_panel() -> None:
    by_language = figures.learning_curves(curves(), "Bits per byte", panel="language")
    assert [ax.get_title("left") for ax in data_axes(by_language)] == ["English", "French", "German", "Python"]
    assert [line.get_color() for line in by_language.axes[0].lines] == list(figures.colors(["ce", "fixed"]).values())
    (ax,) = data_axes(figures.learning_curves(curves(("teacher",)), "Loss (nats)", panel=None, log_y=True))
    assert len(ax.lines) == 4 and ax.get_yscale() == "log"


def test_a_further_language_keeps_its_colour_between_panels_and_legend() -> None:
    table = curves(("sequential", "moe"), ("en", "es", "it"))
    table = table[(table["arm"] == "moe") | (table["language"] != "es")]
    figure = figures.forgetting_curves(table, {}, "Bits per byte")
    lines = figure.axes[0].lines
    assert [line.get_color() for line in lines] == [figures.colors(["en", "es", "it"])[code] for code in ("en", "it")]


@pytest.mark.parametrize("horizontal", [False, True])
def test_intervals_are_drawn_where_they_are(horizontal: bool) -> None:
    table = intervals()
    figure = figures.bars_with_intervals(table, "Bits per byte", horizontal=horizontal)
    (ax,) = data_axes(figure)
    assert (ax.get_xlabel() if horizontal else ax.get_ylabel()) == "Bits per byte"
    segments = np.concatenate([np.array(lines.get_segments()) for lines in ax.collections])
    along = segments[:, :, 0 if horizontal else 1]
    assert np.allclose(np.sort(along[:, 0]), np.sort(table["low"])) and np.allclose(
        np.sort(along[:, 1]), np.sort(table["high"])
    )
    low, high = ax.get_xlim() if horizontal else ax.get_ylim()
    assert low > 1.5 and high < 3  # not from zero
    assert legend_names(figure) == ["CE only", "Fixed α", "Teacher"]


def test_many_settings_are_listed_downwards() -> None:
    settings = [f"Setting {i}" for i in range(21)]
    (ax,) = data_axes(figures.bars_with_intervals(intervals(settings, ("ple", "jeet", "moe_ce")), "Bits per byte"))
    assert [label.get_text() for label in ax.get_yticklabels()] == settings


def test_forest_shows_margin_zero_numbers_and_verdicts() -> None:
    table = pd.DataFrame(
        [("C1", -0.001, -0.006, 0.004, "reproduced"), ("C4", -0.04, -0.07, -0.021, "not reproduced")],
        columns=["label", "estimate", "low", "high", "verdict"],
    )
    figure = figures.forest(table, 0.01, "Difference (bits per byte)")
    (ax,) = data_axes(figure)
    band = next(patch for patch in ax.patches if isinstance(patch, Rectangle))
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.01, 0.01))
    assert texts(ax) == ["−0.001  [−0.006, +0.004]", "reproduced", "−0.040  [−0.070, −0.021]", "not reproduced"]
    assert ax.get_xlabel() == "Difference (bits per byte)" and legend_names(figure) == ["Within ± 0.01"]
    assert ax.get_xlim()[0] == -ax.get_xlim()[1]
    plain = figures.forest(table.drop(columns="verdict"), None, "Difference")
    assert len(data_axes(plain)[0].texts) == 2 and not plain.legends


def test_confusion_is_normalised_by_row() -> None:
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    (ax,) = data_axes(figures.confusion(counts, ("en", "fr", "de")))
    assert texts(ax) == ["75.00 %\n3", "25.00 %\n1", "0", "0", "100.00 %\n4", "0", "–", "–", "–"]
    shares = ax.collections[0].get_array()
    assert np.allclose(shares[:2].sum(axis=1), 1) and shares.mask[2].all()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Predicted", "True")


def test_heat_map_frames_the_best_of_each_row_or_column() -> None:
    table = pd.DataFrame({"en": [1.0, 2.0], "fr": [3.0, np.nan]}, index=["ple", "jeet"])
    figure = figures.heat_map(table, ".1f", "Bits per byte", best="column")
    (ax,) = data_axes(figure)
    bold = [text.get_text() for text in ax.texts if text.get_weight() == "bold"]
    assert texts(ax) == ["1.0", "3.0", "2.0", "–"] and bold == ["1.0", "3.0"]
    assert figure.axes[1].get_ylabel() == "Bits per byte"
    (ax,) = data_axes(figures.heat_map(table, ".1f", "F1", best="row", lower_is_better=False))
    assert [text.get_text() for text in ax.texts if text.get_weight() == "bold"] == ["3.0", "2.0"]
    wide = figures.heat_map(table * 1000, ",.0f", "Perplexity", log=True)
    assert data_axes(wide)[0].collections[0].norm.__class__.__name__ == "LogNorm"


@pytest.mark.parametrize("seeds", [1, 3])
def test_forgetting_curves_name_the_stages(seeds: int) -> None:
    stages = [(0, 250, "en"), (250, 500, "fr")]
    figure = figures.forgetting_curves(
        curves(("sequential", "moe"), seeds=seeds), {"sequential": stages}, "Bits per byte"
    )
    first, second = data_axes(figure)
    assert texts(first) == ["English", "French"] and texts(second) == []
    assert [(band.get_x(), band.get_width()) for band in first.patches] == [(0, 250), (250, 250)]
    assert len(first.lines) == 4 and first.get_ylabel() == "Bits per byte"
    assert first.get_ylim() == second.get_ylim()


def test_r_matrices_share_one_scale_and_align_their_last_stages() -> None:
    sequential = np.array([[2.0, 3.0], [2.5, 2.1]])
    final = np.array([[1.9, 2.0]])
    figure = figures.r_matrices(
        {"sequential": (sequential, ("en", "fr"), ("en", "fr")), "moe": (final, ("end",), ("en", "fr"))}
    )
    first, second = data_axes(figure)
    assert (first.get_title("left"), second.get_title("left")) == ("Sequential", "MoE")
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == (1.9, 3.0)
    assert texts(first) == ["2.00", "3.00", "2.50", "2.10"]
    assert [text.get_weight() for text in first.texts] == ["bold", "normal", "normal", "bold"]
    assert second.get_ylim() == (1, -1)
    assert figure.axes[-1].get_ylabel() == "Bits per byte"


def test_quality_cost_labels_cover_neither_each_other_nor_the_points() -> None:
    figure = figures.quality_cost(costs(), "Parameters used per token", "Bits per byte")
    (ax,) = data_axes(figure)
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "Parameters used per token", "Bits per byte")
    figure.draw_without_rendering()
    named = [note for note in ax.texts if note.get_text()]
    boxes = [note.get_window_extent() for note in named]
    assert [note.get_text() for note in named] == ["Teacher", "CE only", "Fixed α", "Adaptive α", "MoE"]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = ax.transData.transform(costs()[["cost", "quality"]])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_alpha_trajectory_shows_the_full_range_beside_the_used_one() -> None:
    full, near, bars = data_axes(figures.alpha_trajectory(alphas()))
    assert full.get_ylim() == (0, 1) and near.get_ylim()[1] < 0.52
    assert len(full.lines) == 3 + 1  # a line per seed, and one half
    assert sum(bar.get_height() for bar in bars.patches) == pytest.approx(100)
    assert (bars.get_xlabel(), bars.get_ylabel()) == ("α − 0.5", "Share of steps (%)")
    assert len(data_axes(figures.alpha_trajectory(alphas(1).rename(columns={"seed": "run"}), zoom=False))) == 2
    still = figures.alpha_trajectory(alphas().assign(alpha=0.5))
    assert data_axes(still)[1].get_ylim() == pytest.approx((0.4999, 0.5001))


def test_toy_divergences_draw_a_panel_per_student() -> None:
    figure = figures.toy_divergences(GRID, np.abs(GRID), {"forward_kl": GRID, "reverse_kl": -GRID})
    assert [ax.get_title("left") for ax in data_axes(figure)] == ["Forward KL", "Reverse KL"]
    assert np.array_equal(data_axes(figure)[1].lines[0].get_ydata(), -GRID)


@pytest.mark.parametrize("languages", [FOUR[:2], FIVE])
@pytest.mark.parametrize(
    ("variant", "heads", "shared"), [("ple", True, False), ("jeet", False, True), ("moe_ce", False, True)]
)
def test_moe_diagram_shows_the_parts_of_the_variant(variant: str, heads: bool, shared: bool, languages: tuple) -> None:
    words = texts(figures.moe_diagram(variant, languages).axes[0])
    assert sum(word.endswith("expert") for word in words) == len(languages) + (variant == "moe_ce")
    assert words.count("Head") == words.count("Embedding") == (len(languages) if heads else 0)
    assert ("Shared\nembedding" in words) == shared
    assert ("Average" in words) == (variant == "moe_ce")


# --- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], Figure], str]] = {
    "not a table": (lambda: figures.learning_curves([1, 2], "y"), "DataFrame"),
    "columns": (lambda: figures.learning_curves(curves().drop(columns=["seed", "arm"]), "y"), "lacks arm, seed"),
    "no rows": (lambda: figures.learning_curves(curves().iloc[:0], "y"), "no rows"),
    "words for numbers": (lambda: figures.token_bars(tokens().assign(tokens="many")), "column tokens"),
    "nan": (lambda: figures.learning_curves(curves().assign(value=np.nan), "y"), "column value"),
    "panel": (lambda: figures.learning_curves(curves(), "y", panel="seed"), "no panel 'seed'"),
    "percent": (lambda: figures.token_bars(tokens(), bound=5), "in tokens"),
    "pairs twice": (lambda: figures.grouped_bars(curves(), "arm", "value", "language", "y"), "one row for each pair"),
    "low over high": (lambda: figures.bars_with_intervals(intervals().assign(low=9.0), "y"), "low is above its high"),
    "forest": (lambda: figures.forest(pd.DataFrame({"label": ["a"], "estimate": [1.0]}), 0.1, "x"), "lacks low, high"),
    "ids": (lambda: figures.block_picture(["a"], [1, 2], "en"), "id per token"),
    "not square": (lambda: figures.confusion(np.ones((2, 3)), ("en", "fr")), "shape"),
    "negative": (lambda: figures.confusion(-np.ones((2, 2)), ("en", "fr")), "negative"),
    "words": (lambda: figures.heat_map(pd.DataFrame({"a": ["x"]}), ".1f", "y"), "none in a"),
    "best": (lambda: figures.heat_map(pd.DataFrame({"a": [1.0]}), ".1f", "y", best="all"), "best per 'all'"),
    "stage": (lambda: figures.forgetting_curves(curves(), [(5, 5, "en")], "y"), "stage en"),
    "no matrix": (lambda: figures.r_matrices({}), "at least one"),
    "r shape": (lambda: figures.r_matrices({"a": (np.eye(2), ("en",), ("en", "fr"))}), "shape"),
    "free": (lambda: figures.quality_cost(costs().assign(cost=0.0), "x", "y"), "above zero"),
    "no seed": (lambda: figures.alpha_trajectory(alphas().drop(columns="seed")), "seed (or run)"),
    "lengths": (lambda: figures.toy_divergences(GRID, GRID[1:], {"a": GRID}), "same length"),
    "variant": (lambda: figures.moe_diagram("dense", FOUR), "variant 'dense'"),
    "one language": (lambda: figures.moe_diagram("ple", ("en", "en")), "two languages"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(case: str) -> None:
    draw, words = BAD[case]
    with pytest.raises(MomeError) as caught:
        draw()
    message = str(caught.value)
    assert words in message and message.endswith(".") and "\n" not in message
