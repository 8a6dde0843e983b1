"""Gradients of the two losses: statistics against plain autograd, schedules against every possible draw."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils import gradient_runs, recipes
from mome_utils.config import MomeError, Shape
from mome_utils.distillation import Objective, micro_losses
from mome_utils.gradient_runs import gradient_rows, row_moments
from mome_utils.gradients import (
    Moments,
    by_kind,
    by_layer,
    conflict,
    gradient_statistics,
    logits_of,
    loss_gradients,
    step_gradient,
    step_noise,
)
from mome_utils.models import build_gpt2, parameter_count
from mome_utils.runs import Run, run_key
from mome_utils.study import Study
from mome_utils.training import build_model, save_model

torch.set_num_threads(1)
VOCABULARY, TOKENS, MICRO, SIZE = 20, 8, 4, 2
OBJECTIVE = Objective("forward_kl")
#: The mean over positions is taken with weights in float32 whatever the model.
CLOSE = {"rtol": 1e-6, "atol": 1e-10}


def tiny(seed: int, width: int = 8):
    shape = Shape(2, width, 2)
    made = build_gpt2(shape, vocab_size=VOCABULARY, block_size=TOKENS, seed=seed, bos=1, eos=2)
    return made.double().eval()


@pytest.fixture(scope="module")
def student():
    return tiny(0)


@pytest.fixture(scope="module")
def teacher():
    return logits_of(tiny(1, 16))


@pytest.fixture(scope="module")
def blocks():
    return torch.randint(0, VOCABULARY, (MICRO * SIZE, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(student, teacher, blocks) -> torch.Tensor:
    """Flat gradients [m, 2, P] of the two losses written out, by the usual backward pass."""
    found = []
    for ids in blocks.split(SIZE):
        pair = []
        for which in range(2):
            student.zero_grad()
            log_q = student(ids).logits[:, :-1].log_softmax(-1)
            log_p = teacher(ids)[:, :-1].log_softmax(-1)
            ce = -log_q.gather(-1, ids[:, 1:, None]).mean()
            kd = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            (ce, kd)[which].backward()
            pair.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        found.append(torch.stack(pair))
    student.zero_grad(set_to_none=True)
    return torch.stack(found)


@pytest.fixture(scope="module")
def statistics(student, teacher, blocks):
    return gradient_statistics(student, blocks, teacher, OBJECTIVE, SIZE)


# --- gradients --------------------------------------------------------------------------------------------------


def test_gradients_are_autograds_and_leave_the_model_alone(student, teacher, blocks, plain) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for i, (losses, *pair) in enumerate(loss_gradients(student, blocks, teacher, OBJECTIVE, SIZE)):
        flat = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in pair])
        torch.testing.assert_close(flat, plain[i], **CLOSE)
        assert losses.shape == (2,) and (losses > 0).all()
    assert i == MICRO - 1
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_statistics_are_those_of_the_stacked_gradients(student, plain, statistics) -> None:
    names = [name for name, p in student.named_parameters() for _ in range(p.numel())]
    for group in ("all", *statistics.groups):
        inside = torch.tensor([group == "all" or by_layer(name) == group for name in names])
        g = plain[..., inside].numpy()
        mean, centred = g.mean(0), g - g.mean(0)
        found = statistics.moments(group)
        assert [found.ce, found.kd, found.dot] == pytest.approx(
            [mean[0] @ mean[0], mean[1] @ mean[1], mean[0] @ mean[1]], rel=1e-6
        )
        spread = np.einsum("map,mbp->ab", centred, centred) / (MICRO - 1)
        assert [found.ce_variance, found.kd_variance, found.covariance] == pytest.approx(
            [spread[0, 0], spread[1, 1], spread[0, 1]], rel=1e-5, abs=1e-12
        )
        each = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in g]
        np.testing.assert_allclose(statistics.cosines(group), each, rtol=1e-5, atol=1e-9)
        row = conflict(statistics).set_index("group").loc[group]
        assert row["cosine"] == pytest.approx(
            mean[0] @ mean[1] / np.linalg.norm(mean[0]) / np.linalg.norm(mean[1])
        )
        assert row["cosine_median"] == pytest.approx(np.median(each)) and row["opposed"] == np.mean(np.array(each) < 0)
        assert row["parameters"] == int(inside.sum())
        assert (row["moment_ce"], row["moment_sequences"]) == (found.ce, SIZE)


def test_groups_divide_the_parameters(student, statistics, teacher, blocks) -> None:
    assert statistics.groups == ("embedding", "positions", "block 1", "block 2", "final norm")
    assert statistics.parameters.sum() == parameter_count(student)
    kinds = gradient_statistics(student, blocks, teacher, OBJECTIVE, SIZE, group=by_kind)
    assert set(kinds.groups) == {"embedding", "positions", "attention", "MLP", "norm"}
    assert kinds.moments().dot == pytest.approx(statistics.moments().dot)
    assert by_layer("lm_head.weight") == "output" and by_layer("router.weight") == "router"


def test_the_cosine_without_noise_is_kept_where_there_is_one() -> None:
    still = Moments(4.0, 9.0, 3.0, 0.0, 0.0, 0.0, 8, 1)
    assert still.unbiased() == (4, 9, 3) and still.noise_scale(1, 0) == 0
    noisy = Moments(0.1, 1.0, 0.0, 4.0, 0.0, 0.0, 8, 1)
    assert np.isnan(noisy.noise_scale(1, 0)) and noisy.noise_scale(0, 1) == 0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 7))
def test_the_noise_scale_is_mccandlishs(seed: int, count: int, sequences: int) -> None:
    """Appendix A.1 of arXiv 1812.06162: from the squared norms at a small and at a big batch."""
    gradients_ = np.random.default_rng(seed).normal(1, 1, (count, 5))
    mean = gradients_.mean(0)
    small, big = sequences, count * sequences
    at_small, at_big = (gradients_**2).sum(1).mean(), mean @ mean
    signal = (big * at_big - small * at_small) / (big - small)
    noise = (at_small - at_big) / (1 / small - 1 / big)
    variance = ((gradients_ - mean) ** 2).sum() / (count - 1)
    moments = Moments(at_big, 0.0, 0.0, variance, 0.0, 0.0, count, sequences)
    if signal > 1e-9:
        assert moments.noise_scale(1, 0) == pytest.approx(noise / signal)


# --- steps ------------------------------------------------------------------------------------------------------


def test_a_step_is_the_weighed_mean_of_its_parts(student, teacher, blocks, plain) -> None:
    weights = [(0.3, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    expected = sum(a * ce + b * kd for (a, b), (ce, kd) in zip(weights, plain, strict=True)) / MICRO
    found = step_gradient(student, blocks, teacher, OBJECTIVE, weights)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_step_is_the_one_that_training_takes(student, teacher, blocks) -> None:
    """Micro-batches one after the other, and as slices of one batch (distillation.micro_losses), are the same."""
    objective = replace(OBJECTIVE, micro_batches=MICRO)
    ce, kd = micro_losses(objective, student(blocks).logits, teacher(blocks), blocks, [(True, True)] * MICRO, pad=2)
    weights = torch.tensor([(1, 0), (0, 1)] * (MICRO // 2), dtype=torch.float64)
    loss = (weights[:, 0] * ce + weights[:, 1] * kd).mean()
    whole = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(student.parameters()))])
    found = step_gradient(student, blocks, teacher, objective, [(1, 0), (0, 1)] * (MICRO // 2))
    torch.testing.assert_close(found, whole, **CLOSE)


def test_the_released_alternation_is_the_combined_loss_on_halves(student, teacher, blocks, plain) -> None:
    turns = [(1.0, 0.0), (0.0, 1.0)] * (MICRO // 2)
    released, swapped, combined = (
        step_gradient(student, blocks, teacher, OBJECTIVE, weights)
        for weights in (turns, turns[1:] + turns[:1], [(0.5, 0.5)] * MICRO)
    )
    halves = 0.5 * plain[0::2, 0].mean(0) + 0.5 * plain[1::2, 1].mean(0)
    torch.testing.assert_close(released, halves, **CLOSE)
    torch.testing.assert_close((released + swapped) / 2, combined, **CLOSE)
    assert (released - combined).norm() > 0.01 * combined.norm()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_the_noise_of_a_schedule_is_that_of_all_its_draws(count: int, alpha: float) -> None:
    """Every way to draw ``count`` micro-batches from four, both orders of turns: mean and variance in full."""
    pool = np.random.default_rng(1).normal(0.5, 1, (4, 2, 3))  # four micro-batches, CE and KD, three parameters
    draws = [np.array(draw) for draw in itertools.product(range(4), repeat=count)]
    steps: dict[str, list[list[np.ndarray]]] = {
        "combined": [[]], "alternating_micro": [[], []], "alternating": [[], []],
    }
    for draw in draws:
        steps["combined"][0].append((alpha * pool[draw, 0] + (1 - alpha) * pool[draw, 1]).mean(0))
        for first in range(2):
            turns = (np.arange(count) + first) % 2
            steps["alternating_micro"][first].append(pool[draw, turns].mean(0))
            steps["alternating"][first].append(pool[draw, first].mean(0))
    mean, centred = pool.mean(0), pool - pool.mean(0)
    spread = np.einsum("map,mbp->ab", centred, centred) / 4
    endless = 10**15  # the means are exact: nothing has to be taken off them
    gram = mean @ mean.T
    moments = Moments(gram[0, 0], gram[1, 1], gram[0, 1], spread[0, 0], spread[1, 1], spread[0, 1], endless, 1)
    table = step_noise(moments, count, alpha).set_index("schedule")
    for name, parts in steps.items():
        means = [np.mean(part, axis=0) for part in parts]
        centre = np.mean(means, axis=0)
        variance = np.mean([((np.array(part) - m) ** 2).sum(1).mean() for part, m in zip(parts, means, strict=True)])
        swing = np.mean([((m - centre) ** 2).sum() for m in means])
        assert table.loc[name, "variance"] == pytest.approx(variance)
        assert table.loc[name, "swing"] == pytest.approx(swing, abs=1e-12)
        assert table.loc[name, "noise"] == pytest.approx((variance + swing) / (centre @ centre))
        if name != "combined" and count % 2 == 0:  # in expectation, both turns follow the combined loss at one half
            np.testing.assert_allclose(centre, mean.mean(0))
    assert table.loc["combined", "ratio"] == 1
    if count == 1:
        np.testing.assert_allclose(*table.loc[["alternating_micro", "alternating"], ["variance", "swing"]].to_numpy())


def test_what_cannot_be_measured_is_refused(student, teacher, blocks) -> None:
    with pytest.raises(MomeError, match="8 blocks cannot be cut"):
        next(loss_gradients(student, blocks, teacher, OBJECTIVE, 3))
    with pytest.raises(MomeError, match="at least two micro-batches"):
        gradient_statistics(student, blocks, teacher, OBJECTIVE, 8)
    with pytest.raises(MomeError, match="3 equal micro-batches"):
        step_gradient(student, blocks, teacher, OBJECTIVE, [(1, 0)] * 3)
    with pytest.raises(MomeError, match="not 0"):
        step_noise(Moments(1, 1, 1, 1, 1, 1, 2, 1), 0)


# --- over a run -------------------------------------------------------------------------------------------------

TINY = {
    "topics": 20, "vocab_size": 400, "block_size": 32, "stride": 16, "teacher": [1, 32, 2], "student": [1, 16, 2],
    "evaluations": 4, "evaluation_blocks": 4, "test_fraction": 0.2, "validation_fraction": 0.2,
}


def test_rows_follow_a_run_from_its_start_to_its_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MOME_ARTIFACTS", str(tmp_path))
    study = Study.open("test", profile="smoke", languages=["en", "py"], overrides=TINY, quiet=True)
    study.build_data()
    spec = replace(recipes.student_spec(study, "en", "fixed", 0), snapshots=(2,))
    folders = {}
    for kept, seed in ((spec, 7), (recipes.teacher_spec(study, 0), 0)):
        folders[kept] = study.store.path("runs", run_key(kept))
        folders[kept].mkdir(parents=True)
        save_model(build_model(kept.model, seed), folders[kept])
    save_model(build_model(spec.model, spec.seed), folders[spec] / "snapshots" / "step-000002")
    run, teacher = (Run(kept, run_key(kept), folder) for kept, folder in folders.items())
    rows = gradient_rows(study, [run], [teacher], micro_batches=3, micro_batch=2)
    assert sorted(set(rows["step"])) == [0, 2, spec.steps] and set(rows["language"]) == {"en"}
    by_step = rows.set_index(["step", "group"])["cosine"].unstack()
    assert list(by_step.columns.sort_values()) == sorted(["all", "embedding", "positions", "block 1", "final norm"])
    # This snapshot holds the weights of the start; a model that was loaded computes attention in another order.
    np.testing.assert_allclose(by_step.loc[0], by_step.loc[2], rtol=1e-4)
    assert (by_step.loc[0] != by_step.loc[spec.steps]).all()
    assert (rows["moment_micro_batches"] == 3).all() and rows["moment_ce"].gt(0).all()
    moments = row_moments(rows.iloc[0])
    assert moments.noise_scale(1, 0) > 0 and moments.ce == pytest.approx(rows["ce_norm"].iloc[0] ** 2)
    monkeypatch.setattr(gradient_runs, "gradient_job", None)
    assert gradient_rows(study, [run], [teacher], micro_batches=3, micro_batch=2).equals(rows)
    with pytest.raises(MomeError, match="not among those given"):
        gradient_rows(study, [run], [run])
