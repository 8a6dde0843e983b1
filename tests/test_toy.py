"""The toys of notebook 03: what each divergence does to a student that cannot follow, and one position of text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mome_utils.config import MomeError
from mome_utils.divergences import DIVERGENCES
from mome_utils.toy import POSITION, STEPS, look_at, toy_path, toy_paths, two_modes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def paths():
    return toy_paths(["forward_kl", "reverse_kl", "jensen_shannon"], steps=STEPS[:-1])


def right_half(table) -> float:
    return float(table.loc[table["outcome"] >= 30, "student"].sum())


def test_forward_kl_covers_both_modes_and_reverse_kl_seeks_one(paths) -> None:
    end = paths[paths["step"] == STEPS[-2]]
    share = {name: right_half(part) for name, part in end.groupby("divergence")}
    teacher = float(two_modes().softmax(-1)[30:].sum())
    assert abs(share["forward_kl"] - teacher) < 0.1
    assert share["reverse_kl"] < 0.01
    seeking = end[end["divergence"] == "reverse_kl"]
    assert seeking.loc[seeking["student"].idxmax(), "outcome"] == int(two_modes().argmax())


def test_paths_are_of_probabilities_and_their_gradients(paths) -> None:
    for (_, _), part in paths.groupby(["divergence", "step"]):
        assert part["student"].sum() == pytest.approx(1) and part["teacher"].sum() == pytest.approx(1)
        assert part["gradient"].sum() == pytest.approx(0, abs=1e-12)  # logits may all be moved by the same amount
    start = paths[paths["step"] == 0].groupby("divergence")["student"].apply(np.array)
    assert all(np.array_equal(start.iloc[0], other) for other in start)
    forward = paths[paths["divergence"] == "forward_kl"]
    np.testing.assert_allclose(forward["gradient"], forward["student"] - forward["teacher"], atol=1e-12)
    assert forward.groupby("step")["loss"].first().is_monotonic_decreasing
    assert toy_path("reverse_kl", two_modes(), steps=(0, 5)).equals(toy_path("reverse_kl", two_modes(), steps=(0, 5)))


def test_a_free_student_gets_anywhere_but_reverse_kl_hardly_moves() -> None:
    ends = {}
    for name in ("forward_kl", "reverse_kl"):
        path = toy_path(name, two_modes(), steps=(0, 60), student="free")
        ends[name] = [right_half(path[path["step"] == step]) for step in (0, 60)]
    assert ends["forward_kl"][0] < 0.01 < 0.3 < ends["forward_kl"][1]
    assert ends["reverse_kl"][1] < 0.01


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_the_text_every_divergence_draws_to_the_teacher(name: str) -> None:
    view = look_at(0.0, 1.0, name)
    np.testing.assert_allclose(view.target, view.teacher, atol=1e-4)
    assert np.allclose(view.ce, 0) and view.loss == pytest.approx(view.kd_loss)
    np.testing.assert_allclose(look_at(1.0, 2.0, name).target, np.eye(len(POSITION.tokens))[POSITION.label])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_forward_kls_target_is_the_mixture_of_text_and_teacher(alpha: float) -> None:
    view = look_at(alpha, 1.0, "forward_kl")
    mixture = (1 - alpha) * view.teacher
    mixture[POSITION.label] += alpha
    np.testing.assert_allclose(view.target, mixture, atol=1e-6)
    one = np.eye(len(POSITION.tokens))[POSITION.label]
    np.testing.assert_allclose(view.ce, alpha * (view.student - one), atol=1e-12)
    np.testing.assert_allclose(view.kd, (1 - alpha) * (view.student - view.teacher), atol=1e-12)
    assert view.loss == pytest.approx(alpha * view.ce_loss + (1 - alpha) * view.kd_loss)


def test_temperature_softens_the_teacher_and_keeps_the_size_of_the_gradient() -> None:
    cold, hot = look_at(0.0, 1.0), look_at(0.0, 8.0)
    entropy = [-(p * np.log(p)).sum() for p in (cold.softened, hot.softened)]
    assert entropy[0] < entropy[1] and np.array_equal(cold.softened, cold.teacher)
    assert 0.3 < np.linalg.norm(hot.kd) / np.linalg.norm(cold.kd) < 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: look_at(1.5), "alpha must lie between 0 and 1"),
        (lambda: look_at(0.5, 0.0), "temperature must be"),
        (lambda: look_at(0.5, 1.0, "nothing"), "Unknown divergence"),
        (lambda: toy_path("forward_kl", two_modes(), steps=(5, 0)), "must rise"),
        (lambda: toy_path("forward_kl", two_modes(), student="tree"), "no toy student 'tree'"),
    ],
)
def test_toys_refuse_what_cannot_be(call, words: str) -> None:
    with pytest.raises(MomeError, match=words):
        call()
