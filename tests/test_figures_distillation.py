"""The figures of distillation: what each one draws, what it refuses, and that no two arms look alike."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib._pylab_helpers
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from mome_utils import figures_arms, figures_style, recipes
from mome_utils import figures_distillation as figures
from mome_utils.alpha import STRATEGIES
from mome_utils.config import MomeError
from mome_utils.divergences import DIVERGENCES
from mome_utils.figures_style import ARM_COLORS, png_bytes, save_svg
from mome_utils.gradients import Moments, step_noise
from mome_utils.toy import look_at, toy_paths


@pytest.fixture(autouse=True)
def _no_warnings():
    """A warning would end up in a notebook's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def effects(verdicts: bool = True) -> pd.DataFrame:
    rows = [
        ("Baselines", "ce", 0.02, 0.01, 0.03, "worse"), ("Baselines", "kd", 0.001, -0.004, 0.006, "equal"),
        ("Rules", "adaptive", -0.02, -0.03, -0.01, "better"), ("Rules", "plateau", 0.0, -0.02, 0.02, "undecided"),
    ]
    table = pd.DataFrame(rows, columns=["group", "label", "estimate", "low", "high", "verdict"])
    return table if verdicts else table.drop(columns="verdict")


def alphas() -> pd.DataFrame:
    steps = np.arange(60)
    paths = {"fixed": np.full(60, 0.5), "alternating": 1.0 - steps % 2, "linear_up": steps / 59}
    return pd.concat([
        pd.DataFrame({"rule": rule, "step": steps, "alpha": path, "seed": seed})
        for rule, path in paths.items() for seed in range(2)
    ])


def changes() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    d = rng.normal(0, 0.02, (200, 1)) + rng.normal(0, 0.01, (200, 2))
    part = pd.DataFrame({"alpha": 0.5 + 0.001 * rng.normal(size=200), "d_ce": d[:, 0], "d_kd": d[:, 1]})
    return pd.concat([part.assign(rule="published_adaptive"), part.assign(rule="adaptive")])


def calibration(arms=("fixed", "ce")) -> pd.DataFrame:
    rows = [
        (arm, relation, b / 15, (b + 1) / 15, positions := 4000 // (b + 1) ** 2, positions / 6000, (b + 0.5) / 15,
         0.9 * (b + 0.5) / 15)
        for arm in arms for relation in ("student_data", "teacher_data", "student_teacher") for b in range(15)
    ]
    names = ["arm", "relation", "low", "high", "positions", "share", "confidence", "accuracy"]
    return pd.DataFrame(rows, columns=names)


def cosines(languages=("en", "py")) -> pd.DataFrame:
    rows = [
        (step, language, group, 0.9 - step / 100, 0.4 - step / 200, 0.95 - step / 200)
        for step in (0, 50, 100) for language in languages for group in ("all", "embedding", "block 1")
    ]
    return pd.DataFrame(rows, columns=["step", "language", "group", "cosine", "cosine_low", "cosine_high"])


def noise() -> pd.DataFrame:
    moments = Moments(1.0, 0.5, 0.2, 3.0, 0.2, 0.1, 10**9, 4)
    tables = [step_noise(moments, m).assign(micro_batches=m, moment=f"Step {s}") for s in (0, 9) for m in (1, 4, 16)]
    return pd.concat(tables)


PATHS = toy_paths(["forward_kl", "reverse_kl"], steps=(0, 5))
VIEWS = [look_at(0.5, 1.0, "forward_kl"), look_at(0.9, 2.0, "reverse_kl")]
EVERY: dict[str, Callable[[], Figure]] = {
    "grouped_forest": lambda: figures.grouped_forest(effects(), 0.01, "Bits per byte minus fixed α"),
    "alpha_rules": lambda: figures.alpha_rules(alphas()),
    "alpha_distribution": lambda: figures.alpha_distribution(changes()),
    "reliability_diagrams": lambda: figures.reliability_diagrams(calibration()),
    "gradient_cosines": lambda: figures.gradient_cosines(cosines()),
    "step_noise_curves": lambda: figures.step_noise_curves(noise()),
    "toy_grid": lambda: figures.toy_grid(PATHS),
    "explore_position": lambda: figures.explore_position(VIEWS),
}


# --- every figure -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    """Every figure, drawn once in a program whose own settings are far from the study's."""
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": False}):
        return {name: draw() for name, draw in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
def test_a_figure_is_whole_and_the_same_each_time(name: str, drawn: dict[str, Figure], tmp_path: Path) -> None:
    figure = drawn[name]
    for file in ("first.svg", "second.svg"):
        save_svg(figure, tmp_path / file)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert png_bytes(figure, dpi=40).startswith(b"\x89PNG")
    with figures_style.style():
        inside = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert inside.x0 > -0.01 and inside.y0 > -0.01 and inside.x1 < width + 0.01 and inside.y1 < height + 0.01
    assert figure.get_suptitle() == "" and width == figures_style.WIDTH
    assert matplotlib._pylab_helpers.Gcf.get_num_fig_managers() == 0


@pytest.mark.parametrize("name", EVERY)
def test_text_is_large_enough_to_read(name: str, drawn: dict[str, Figure]) -> None:
    """At 900 pixels a figure of eight inches has 112 dots per inch: 7.5 points are 12 pixels."""
    def visible(artist) -> bool:
        return artist.get_visible() and hasattr(artist, "get_fontsize") and bool(artist.get_text())

    assert all(text.get_fontsize() >= 7.5 for text in drawn[name].findobj(visible))


# --- arms -------------------------------------------------------------------------------------------------------


def test_every_arm_divergence_and_rule_has_a_look_and_a_name() -> None:
    for key in (*recipes.arm_names(), *DIVERGENCES, *STRATEGIES):
        assert key in figures_arms._LOOKS, key
        assert figures.arm_name(key) != key and "_" not in figures.arm_name(key)
    for key in set(figures_arms._LOOKS) & set(ARM_COLORS):
        assert figures.arm_look(key).color == ARM_COLORS[key]  # the same as in every other figure
    assert figures.arm_look("mine").name == "mine"


@pytest.mark.parametrize(
    "family", [recipes.arm_names(), tuple(DIVERGENCES), tuple(STRATEGIES)], ids=["arms", "divergences", "rules"]
)
def test_no_two_arms_look_alike_even_in_grey(family: tuple[str, ...]) -> None:
    """Two arms differ in marker or line, or in how light they are (steps of L*, CIE 1976)."""
    def lightness(color: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        y = np.dot([0.2126, 0.7152, 0.0722], linear)
        return float(116 * np.cbrt(y) - 16)

    for one, other in itertools.combinations([figures.arm_look(key) for key in family], 2):
        shapes = (one.marker, one.line) != (other.marker, other.line)
        assert shapes or abs(lightness(one.color) - lightness(other.color)) > 15, (one, other)
        assert lightness(one.color) < 78  # visible on white
        if one.color == other.color:
            assert one.marker != other.marker and one.line != other.line, (one, other)


# --- the figures one by one -------------------------------------------------------------------------------------


def test_the_forest_has_headings_numbers_and_filled_dots_for_what_is_better(drawn) -> None:
    (ax,) = drawn["grouped_forest"].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "CE only", "KD only", "Adaptive α", "Teacher until plateau"
    ]
    words = [note.get_text() for note in ax.texts]
    assert {"Baselines", "Rules", "better", "undecided", "−0.020  [−0.030, −0.010]"} <= set(words)
    dots = [line for line in ax.lines if line.get_marker() not in ("None", "")]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [True, True, False, True]
    right = figures.grouped_forest(effects(verdicts=False), None, "Agreement", better="right")
    filled = [line.get_markerfacecolor() != "white" for line in right.axes[0].lines
              if line.get_marker() not in ("None", "")]
    assert filled == [True, False, False, False] and len(right.legends[0].get_texts()) == 2


def test_paths_of_alpha_are_lines_or_points_beside_their_distribution(drawn) -> None:
    fixed, alternating, linear = drawn["alpha_rules"].axes[:3]
    assert [ax.get_title("left") for ax in (fixed, alternating, linear)] == [
        "Fixed α", "Alternating by step", "Linear, teacher first"
    ]
    assert alternating.lines[1].get_linestyle() == "None" and linear.lines[1].get_linestyle() == "-"
    assert [text.get_text() for text in fixed.texts] == ["0.5"] and not linear.texts
    (inset,) = linear.child_axes
    assert len(inset.patches) == 40 and max(bar.get_width() for bar in inset.patches) == 1


def test_the_distribution_of_alpha_shows_how_the_two_changes_move_together(drawn) -> None:
    figure = drawn["alpha_distribution"]
    assert len(figure.axes) == 6
    left, middle, right = figure.axes[:3]
    assert left.get_title("left") == "Adaptive α (published)"
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(100)
    correlation = changes().query("rule == 'adaptive'")[["d_ce", "d_kd"]].corr().iloc[0, 1]
    assert right.texts[0].get_text() == f"correlation {correlation:.2f}"
    assert [text.get_text() for text in middle.get_legend().get_texts()] == ["CE", "KD"]


def test_reliability_curves_leave_out_bins_with_few_positions(drawn) -> None:
    figure = drawn["reliability_diagrams"]
    tops, below = figure.axes[:3], figure.axes[3:]
    assert [ax.get_title("left") for ax in tops] == ["Student and text", "Teacher and text", "Student and teacher"]
    assert [len(ax.lines) for ax in tops] == [3, 2, 3]  # the diagonal and a curve per arm; the teacher's once
    curve = tops[0].lines[1]
    assert len(curve.get_xdata()) == sum(4000 // (b + 1) ** 2 >= 100 for b in range(15))
    np.testing.assert_allclose(curve.get_ydata(), 0.9 * curve.get_xdata())
    assert all(ax.get_yscale() == "log" for ax in below)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Fixed α", "CE only", "Teacher"]


def test_cosines_are_drawn_over_training_and_by_layer(drawn) -> None:
    left, right = drawn["gradient_cosines"].axes
    assert len(left.lines) == 2 + 1 and left.get_ylim() == (-1, 1)
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.9, 0.4, -0.1])
    assert [label.get_text() for label in right.get_yticklabels()] == ["Embedding", "Block 1"]
    with pytest.raises(MomeError, match="group 'all'"):
        figures.gradient_cosines(cosines().query("group != 'all'"))


def test_the_noise_of_schedules_is_relative_to_the_combined_loss(drawn) -> None:
    figure = drawn["step_noise_curves"]
    assert [ax.get_title("left") for ax in figure.axes] == ["Step 0", "Step 9"]
    combined, micro, step = (line.get_ydata() for line in figure.axes[0].lines[:3])
    assert (combined == 1).all() and micro[1] == pytest.approx(micro[2]) and step[2] > step[1] > step[0]
    low, high = figure.axes[0].get_ylim()
    assert low < 1 and high > step[2]


def test_the_toy_grid_has_a_row_per_divergence_and_a_column_per_step(drawn) -> None:
    figure = drawn["toy_grid"]
    assert len(figure.axes) == 2 * 2
    assert [ax.get_title("left") for ax in figure.axes] == ["Step 0", "Step 5", "", ""]
    assert [ax.get_ylabel().replace("\n", " ") for ax in figure.axes] == ["Forward KL", "", "Reverse KL", ""]
    student = figure.axes[3].lines[0]
    last = PATHS.query("divergence == 'reverse_kl' and step == 5")
    np.testing.assert_array_equal(student.get_ydata(), last["student"])
    assert to_hex(student.get_color()) == ARM_COLORS["reverse_kl"].lower()


def test_a_position_shows_probabilities_pushes_and_the_loss(drawn) -> None:
    figure = drawn["explore_position"]
    left, right = figure.axes[2:]
    assert left.get_title("left") == "α = 0.9, T = 2, Reverse KL"
    view = VIEWS[1]
    assert f"= {view.loss:.2f} nats" in right.get_title("left")
    heights = [bar.get_height() for bar in right.patches[:16]]
    np.testing.assert_allclose(heights, [*-view.ce, *-view.kd])
    assert [label.get_text() for label in left.get_xticklabels()][:3] == ["door", "window", "letter"]
    assert len(figures.explore_position(VIEWS[:1]).axes) == 2


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: figures.grouped_forest(effects().drop(columns="group"), None, "x"), "lacks group"),
        (lambda: figures.grouped_forest(effects(), None, "x", better="up"), "left or on the right"),
        (lambda: figures.alpha_rules(alphas().drop(columns="seed")), "lacks seed"),
        (lambda: figures.alpha_distribution(changes().assign(d_ce=np.nan)), "missing or infinite"),
        (lambda: figures.reliability_diagrams(calibration().assign(relation="x")), "know the relations"),
        (lambda: figures.explore_position([]), "at least one setting"),
        (lambda: figures.toy_grid(PATHS.iloc[:0]), "no rows"),
    ],
)
def test_figures_refuse_what_they_cannot_draw(draw: Callable[[], Figure], words: str) -> None:
    with pytest.raises(MomeError, match=words):
        draw()
