"""Losses against independent float64 computations in numpy; α rules against the published rule by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.config import MomeError
from mome_utils.distillation import (
    DIVERGENCES,
    Objective,
    forward_kl,
    make_alpha,
    needs,
    published_forward_kl,
    published_inverse_kl,
    published_l1_product,
    relative_change,
    reverse_kl,
    shifted_ce,
    shifted_divergence,
)

INF = float("inf")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


# ------------------------------------------------------ the independent computation: numpy, float64, loops


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row - row.max()
    return row - math.log(math.fsum(math.exp(x) for x in row))


def product(weight: float, value: float) -> float:
    """weight · value with 0 · anything = 0, as 0 · log 0 is meant."""
    return 0.0 if weight == 0 else weight * value


@np.errstate(invalid="ignore")
def expected(name: str, student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    values = []
    for s_row, t_row in zip(student.astype(np.float64), teacher.astype(np.float64), strict=True):
        log_q, log_p = log_softmax(s_row / temperature), log_softmax(t_row / temperature)
        if name == "published_inverse_kl":
            terms = [-product(math.exp(p), q) for p, q in zip(log_p, log_q, strict=True)]
        elif name == "forward_kl":
            terms = [product(math.exp(p), p - q) for p, q in zip(log_p, log_q, strict=True)]
        else:
            terms = [product(math.exp(q), q - p) for p, q in zip(log_p, log_q, strict=True)]
        values.append(temperature**2 * math.fsum(terms))
    return np.array(values)


def pair(*shape: int, scale: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return student.to(dtype), teacher.to(dtype)


CASES = [
    (name, t) for name in DIVERGENCES for t in ((1.0,) if name.startswith("published") else (1.0, 2.0, 0.5))
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "temperature"), CASES)
@pytest.mark.parametrize("scale", [2.0, 1e4])
def test_divergence_equals_independent_computation(name, temperature, dtype, scale) -> None:
    student, teacher = pair(17, 23, scale=scale, dtype=dtype)
    values = DIVERGENCES[name](student, teacher, temperature)
    assert values.dtype == dtype and values.shape == (17,)
    np.testing.assert_allclose(
        values.numpy(), expected(name, student.numpy(), teacher.numpy(), temperature), rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_half_precision_logits_are_widened_before_anything_is_computed(name, temperature) -> None:
    student, teacher = pair(9, 31, dtype=torch.bfloat16)
    values = DIVERGENCES[name](student, teacher, temperature)
    assert values.dtype == torch.float32
    wide = expected(name, student.float().numpy(), teacher.float().numpy(), temperature)
    np.testing.assert_allclose(values.numpy(), wide, rtol=1e-5)


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_a_token_that_both_rule_out_counts_nothing(name, temperature) -> None:
    student, teacher = pair(6, 11)
    student[:, 3] = teacher[:, 3] = -INF
    student[2, 7] = teacher[2, 7] = -INF
    student.requires_grad_()
    values = DIVERGENCES[name](student, teacher, temperature)
    np.testing.assert_allclose(
        values.detach().numpy(),
        expected(name, student.detach().numpy(), teacher.numpy(), temperature),
        rtol=1e-10,
    )
    values.sum().backward()
    assert torch.isfinite(student.grad).all() and (student.grad[:, 3] == 0).all()
    kept = [v for v in range(11) if v != 3]  # as if the token were not in the vocabulary
    without = DIVERGENCES[name](student.detach()[:2, kept], teacher[:2, kept], temperature)
    np.testing.assert_allclose(values.detach()[:2].numpy(), without.numpy(), rtol=1e-12)


def test_where_only_one_side_rules_a_token_out() -> None:
    student, teacher = pair(2, 5)
    student[0, 1] = -INF  # the teacher believes in it
    teacher[1, 1] = -INF  # the student believes in it
    assert forward_kl(student, teacher).tolist()[0] == INF and math.isfinite(forward_kl(student, teacher)[1])
    assert reverse_kl(student, teacher).tolist()[1] == INF and math.isfinite(reverse_kl(student, teacher)[0])
    assert published_inverse_kl(student, teacher).tolist()[0] == INF
    np.testing.assert_allclose(
        published_inverse_kl(student, teacher)[1].item(),
        expected("published_inverse_kl", student.numpy(), teacher.numpy())[1],
        rtol=1e-12,
    )


@pytest.mark.parametrize(("name", "temperature"), CASES)
def test_gradcheck(name, temperature) -> None:
    student, teacher = pair(3, 7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: DIVERGENCES[name](s, teacher, temperature), (student,))


def test_the_teacher_gets_no_gradient() -> None:
    for name in DIVERGENCES:
        student, teacher = (x.requires_grad_() for x in pair(3, 7))
        DIVERGENCES[name](student, teacher, 1.0).sum().backward()
        assert teacher.grad is None and student.grad is not None


def gradient(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_()
    DIVERGENCES[name](student, teacher, 1.0).sum().backward()
    assert student.grad is not None
    return student.grad


def test_published_inverse_kl_pulls_as_forward_kl_does_and_not_as_reverse_kl() -> None:
    student, teacher = pair(8, 19)
    published = gradient("published_inverse_kl", student, teacher)
    q_minus_p = student.softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(published, q_minus_p, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(published, gradient("forward_kl", student, teacher), rtol=1e-12, atol=1e-14)
    difference = (published - gradient("reverse_kl", student, teacher)).norm() / published.norm()
    assert difference > 0.1
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(
        published_inverse_kl(student, teacher) - forward_kl(student, teacher), entropy, rtol=1e-12, atol=0
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 4), st.integers(2, 40))
def test_kl_properties(seed, temperature, vocabulary) -> None:
    student, teacher = pair(4, vocabulary, seed=seed)
    for divergence, mirrored in ((forward_kl, reverse_kl), (reverse_kl, forward_kl)):
        values = divergence(student, teacher, temperature)
        assert (values >= -1e-12).all()
        # Swapping the sides swaps the direction, and a shift of all logits changes nothing.
        torch.testing.assert_close(values, mirrored(teacher, student, temperature), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            values, divergence(student + 3, teacher - 5, temperature), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            divergence(student, student, temperature), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_at_high_temperature_both_directions_become_half_the_variance_of_the_logit_gap() -> None:
    student, teacher = pair(5, 12)
    limit = 0.5 * (student - teacher).var(-1, correction=0)  # the reason for the factor T²
    for divergence in (forward_kl, reverse_kl):
        torch.testing.assert_close(divergence(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------- the release's own losses


def test_published_forward_kl_sums_over_time() -> None:
    batch, time = 3, 10
    student, teacher = pair(batch, time, 13)
    value = published_forward_kl(student, teacher)
    total = sum(
        expected("forward_kl", student[b].numpy(), teacher[b].numpy(), 2.0).sum() for b in range(batch)
    )
    np.testing.assert_allclose(value.item(), total / batch, rtol=1e-12)
    mean = forward_kl(student.flatten(0, 1), teacher.flatten(0, 1), 2.0).mean()
    np.testing.assert_allclose(value.item() / mean.item(), time, rtol=1e-12)
    # The same number as the release's call (batchmean divides the sum by the size of the first dimension)
    released = 4 * torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )
    np.testing.assert_allclose(value.item(), released.item(), rtol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_published_l1_product_equals_a_loop(dtype) -> None:
    student, teacher = pair(2, 6, 9, dtype=dtype)
    labels = torch.randint(0, 9, (2, 6), generator=torch.Generator().manual_seed(1))
    labels[1, 4] = -100
    total = 0.0
    for b in range(2):
        for t in range(6):
            if labels[b, t] == -100:
                continue
            p = np.exp(log_softmax(teacher[b, t].double().numpy()))
            q = np.exp(log_softmax(student[b, t].double().numpy()))
            onehot = np.eye(9)[labels[b, t]]
            total += np.abs(p - onehot).sum() * np.abs(q - p).sum()
    np.testing.assert_allclose(
        published_l1_product(student, teacher, labels).item(), total, rtol=TOLERANCE[dtype]
    )


# -------------------------------------------------------------------------------------- means over a batch


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shifted_losses_equal_a_loop_over_targets(dtype) -> None:
    student, teacher = pair(3, 8, 15, dtype=dtype)
    labels = torch.randint(0, 15, (3, 8), generator=torch.Generator().manual_seed(2))
    labels[0, 5:] = -100
    labels[2, 0] = -100  # never a target, so nothing is lost
    positions = [(b, t) for b in range(3) for t in range(7) if labels[b, t + 1] != -100]
    ce = [-log_softmax(student[b, t].double().numpy())[labels[b, t + 1]] for b, t in positions]
    np.testing.assert_allclose(shifted_ce(student, labels).item(), np.mean(ce), rtol=TOLERANCE[dtype])
    rows = tuple(zip(*positions, strict=True))
    for name in DIVERGENCES:
        value = shifted_divergence(name, student, teacher, labels)
        mean = expected(name, student[rows].numpy(), teacher[rows].numpy()).mean()
        np.testing.assert_allclose(value.item(), mean, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("loss", ["ce", *DIVERGENCES])
def test_ignored_positions_get_exactly_no_gradient(loss) -> None:
    student, teacher = pair(2, 7, 11)
    labels = torch.zeros(2, 7, dtype=torch.long)
    labels[0, 3] = labels[1, 1] = -100
    student.requires_grad_()
    value = (
        shifted_ce(student, labels) if loss == "ce" else shifted_divergence(loss, student, teacher, labels)
    )
    value.backward()
    touched = (student.grad != 0).any(-1)
    ignored = {(0, 2), (1, 0), (0, 6), (1, 6)}  # position t predicts label t + 1, the last one nothing
    assert {(b, t) for b in range(2) for t in range(7) if not touched[b, t]} == ignored


@pytest.mark.parametrize("loss", ["ce", *DIVERGENCES])
def test_no_target_at_all_gives_zero_and_no_gradient(loss) -> None:
    student, teacher = pair(2, 4, 5)
    labels = torch.full((2, 4), -100)
    student.requires_grad_()
    value = (
        shifted_ce(student, labels) if loss == "ce" else shifted_divergence(loss, student, teacher, labels)
    )
    value.backward()
    assert value.item() == 0 and (student.grad == 0).all()


# ------------------------------------------------------------------------------------------------- α rules


def published_rule_by_hand(ce: list[float], kd: list[float], step: int, k: int) -> float:
    """α at a step by the spec's formulas, from the whole recorded histories."""
    if step + 1 < k:
        return 0.5
    w = []
    for losses in (ce, kd):
        window = np.array(losses[step - k + 1 : step + 1], dtype=np.float64)
        d = (losses[step] - losses[step - k + 1]) / window.mean()
        w.append(1 - np.clip(d, 0, 1))
    return 0.5 if sum(w) == 0 else w[0] / (w[0] + w[1])


def recorded(steps: int, seed: int) -> tuple[list[float], list[float]]:
    """Two losses of the kind a run records: falling together, with shared and separate noise."""
    rng = np.random.default_rng(seed)
    trend = 3 + 5 * np.exp(-np.arange(steps) / 80)
    shared = rng.normal(0, 0.2, steps)
    return (trend + shared).tolist(), (0.9 * trend + 0.7 * shared + rng.normal(0, 0.1, steps)).tolist()


@pytest.mark.parametrize(("total", "k"), [(300, 20), (1999, 20), (2500, 25), (40_000, 400)])
def test_adaptive_rule_reproduces_the_published_one(total, k) -> None:
    ce, kd = recorded(600, seed=k)
    strategy = make_alpha(Objective(alpha="published_adaptive"), total)
    weights = [strategy.weights(i, a, b) for i, (a, b) in enumerate(zip(ce, kd, strict=True))]
    by_hand = [published_rule_by_hand(ce, kd, i, k) for i in range(600)]
    np.testing.assert_allclose([alpha for alpha, _ in weights], by_hand, rtol=1e-12)
    assert all(alpha + beta == pytest.approx(1, abs=1e-15) for alpha, beta in weights)
    assert len(set(by_hand)) > 20 or k == 400  # the recorded losses do exercise the rule


def run_adaptive(ce: list[float], kd: list[float]) -> list[float]:
    strategy = make_alpha(Objective(alpha="published_adaptive"), 100)
    return [strategy.weights(i, a, b)[0] for i, (a, b) in enumerate(zip(ce, kd, strict=True))]


def test_adaptive_alpha_in_every_corner() -> None:
    falling, rising = np.linspace(4, 3, 20).tolist(), np.linspace(3, 4, 20).tolist()
    flat, exploding = [3.0] * 20, [0.01] * 19 + [100.0]
    d = 1 / 3.5  # rise over mean of the rising window
    assert run_adaptive(falling, falling)[-1] == 0.5
    assert run_adaptive(flat, falling)[-1] == 0.5
    assert run_adaptive(rising, falling)[-1] == pytest.approx((1 - d) / (2 - d), rel=1e-12)
    assert run_adaptive(falling, rising)[-1] == pytest.approx(1 / (2 - d), rel=1e-12)
    assert run_adaptive(rising, rising)[-1] == 0.5
    assert run_adaptive(exploding, falling)[-1] == 0.0
    assert run_adaptive(falling, exploding)[-1] == 1.0
    assert run_adaptive(exploding, exploding)[-1] == 0.5  # both w are 0: undefined in the release
    assert run_adaptive([0.0] * 20, [0.0] * 20)[-1] == 0.5  # mean 0: no change
    assert run_adaptive(rising, falling)[:-1] == [0.5] * 19  # shorter than k = 20
    assert relative_change(rising) == pytest.approx(d)


def test_adaptive_rule_starts_at_the_objectives_value() -> None:
    strategy = make_alpha(Objective(alpha="published_adaptive", value=0.3), 100)
    assert strategy.weights(0, 2.0, 2.0) == (0.3, 0.7)


def test_adaptive_rule_refuses_a_loss_that_is_not_finite() -> None:
    with pytest.raises(MomeError, match="not finite at step 7"):
        make_alpha(Objective(alpha="published_adaptive"), 100).weights(7, 2.0, math.nan)


@pytest.mark.parametrize("alpha", ["fixed", "published_adaptive", "alternating", "ce"])
def test_state_dict_round_trip_through_json(alpha) -> None:
    ce, kd = recorded(80, seed=5)
    unbroken, first, second = (make_alpha(Objective(alpha=alpha), 400) for _ in range(3))
    whole = [unbroken.weights(i, ce[i], kd[i]) for i in range(80)]
    parts = [first.weights(i, ce[i], kd[i]) for i in range(37)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    parts += [second.weights(i, ce[i], kd[i]) for i in range(37, 80)]
    assert parts == whole


def test_weights_and_needs_of_the_simple_rules_agree() -> None:
    for objective in (
        Objective(),
        Objective(value=1.0),
        Objective(value=0.0),
        Objective(alpha="ce"),
        Objective(alpha="alternating"),
    ):
        strategy = make_alpha(objective, 100)
        for step in range(6):
            alpha, beta = strategy.weights(step, math.nan, math.nan)
            assert alpha + beta == 1
            assert needs(objective, step) == (alpha > 0, beta > 0)
    assert make_alpha(Objective(value=0.25), 100).weights(0, 1.0, 1.0) == (0.25, 0.75)
    assert [needs(Objective(alpha="alternating"), s) for s in range(3)] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert needs(Objective(alpha="published_adaptive"), 0) == (True, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "Unknown divergence 'kl'"),
        ({"alpha": "often"}, "Unknown rule for alpha 'often'"),
        ({"value": 1.5}, "between 0 and 1"),
        ({"divergence": "forward_kl", "temperature": 0.0}, "positive number"),
        ({"divergence": "forward_kl", "temperature": INF}, "positive number"),
        ({"temperature": 2.0}, "temperature 1 only"),
    ],
)
def test_a_wrong_objective_is_refused_in_one_sentence(fields, message) -> None:
    with pytest.raises(MomeError, match=message):
        Objective(**fields)
    with pytest.raises(MomeError, match="temperature 1 only"):
        published_inverse_kl(*pair(1, 2), 2.0)
