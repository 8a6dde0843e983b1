"""Rules for α against independent computations: the published formula in numpy, torch's Adam, and known values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.alpha import (
    STRATEGIES,
    AlphaStrategy,
    GradientNormAlpha,
    PlateauAlpha,
    Signals,
    UncertaintyAlpha,
    adaptive_window,
    make_alpha,
    relative_change,
)
from mome_utils.config import MomeError

NAN = math.nan
SCHEDULES = [name for name in STRATEGIES if name.split("_")[0] in {"linear", "cosine"}]
READS_BOTH = ["published_adaptive", "adaptive", "uncertainty"]


def signals(losses: np.ndarray, micro_batches: int = 1, total: int = 400, first_step: int = 0) -> Iterable[Signals]:
    """One Signals per row (CE, KD, norm of CE, norm of KD); rows are micro-batches in order."""
    for i, row in enumerate(losses.tolist()):
        step, micro = divmod(i, micro_batches)
        yield Signals(first_step + step, total, micro, micro_batches, *row)


def recorded(rows: int, seed: int = 0) -> np.ndarray:
    """Signals [rows, 4] of the kind a run records: two losses that fall together with noise, and two norms."""
    rng = np.random.default_rng(seed)
    trend = 3 + 5 * np.exp(-np.arange(rows) / 80)
    shared = rng.normal(0, 0.2, rows)
    ce, kd = trend + shared, 0.9 * trend + 0.7 * shared + rng.normal(0, 0.1, rows)
    return np.stack([ce, kd, rng.uniform(0.5, 1.5, rows), rng.uniform(0.05, 3, rows)], 1)


def run(strategy: AlphaStrategy, losses: np.ndarray, micro_batches: int = 1, total: int = 400) -> list[float]:
    """α of every micro-batch, driven as the trainer does: ``needs`` for the whole step, then ``weights``."""
    alphas = []
    for now in signals(losses, micro_batches, total):
        if now.micro == 0:
            needs = [strategy.needs(now.step, micro) for micro in range(micro_batches)]
        ce_needed, kd_needed = needs[now.micro]
        seen = Signals(now.step, total, now.micro, micro_batches, now.ce if ce_needed else NAN,
                       now.kd if kd_needed else NAN, now.ce_norm, now.kd_norm)
        alpha, beta = strategy.weights(seen)
        assert 0 <= alpha <= 1 and alpha + beta == pytest.approx(1, abs=1e-15)
        assert (ce_needed or alpha == 0) and (kd_needed or beta == 0)  # what was not computed has no weight
        alphas.append(alpha)
    return alphas


# ----------------------------------------------------------------------------------- what holds for every rule


@pytest.mark.parametrize("micro_batches", [1, 3, 16])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rule_gives_weights_that_sum_to_one_for_losses_it_asked_for(name, micro_batches) -> None:
    alphas = run(make_alpha(name, 0.3, 60), recorded(60 * micro_batches), micro_batches, 60)
    assert len(alphas) == 60 * micro_batches
    again = run(make_alpha(name, 0.3, 60), recorded(60 * micro_batches), micro_batches, 60)
    assert alphas == again


@pytest.mark.parametrize("cut", [0, 1, 37, 117, 200])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_rule_goes_on_as_the_unbroken_one(name, cut) -> None:
    """The cuts lie at the start, inside a step of 3 micro-batches, and at its end; 300 micro-batches in all."""
    losses = recorded(300, seed=3)
    losses[150:, 1] = 5.0  # the KD loss stops falling, so that "plateau" has switched at the last cut
    now = list(signals(losses, 3, 100))
    unbroken, first, second = (make_alpha(name, 0.4, 100) for _ in range(3))
    whole = [unbroken.weights(s) for s in now]
    parts = [first.weights(s) for s in now[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for micro in range(3):
        step = now[cut].step
        assert second.needs(step, micro) == first.needs(step, micro)
    parts += [second.weights(s) for s in now[cut:]]
    assert parts == whole
    assert second.state_dict() == unbroken.state_dict()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_state_is_a_copy_on_both_ways(name) -> None:
    strategy, other = make_alpha(name, 0.4, 100), make_alpha(name, 0.4, 100)
    now = list(signals(recorded(90), 3, 100))
    for s in now[:43]:
        strategy.weights(s)
    state = strategy.state_dict()
    text = json.dumps(state)
    other.load_state_dict(state)
    for s in now[43:]:
        strategy.weights(s)
        other.weights(s)
    assert json.dumps(state) == text


def test_a_state_of_another_rule_is_refused() -> None:
    with pytest.raises(MomeError, match="does not belong to the rule FixedAlpha"):
        make_alpha("fixed", 0.5, 10).load_state_dict(make_alpha("uncertainty", 0.5, 10).state_dict())


@pytest.mark.parametrize("field", ["ce", "kd"])
@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize("name", READS_BOTH)
def test_a_loss_that_is_not_finite_is_refused_with_its_step(name, field, value) -> None:
    with pytest.raises(MomeError, match=rf"A loss is not finite at step 7 \({field} = {value}\)"):
        make_alpha(name, 0.5, 100).weights(Signals(7, 100, **{"ce": 2.0, "kd": 2.0, field: value}))


def test_the_same_for_the_rules_that_look_at_something_else() -> None:
    with pytest.raises(MomeError, match=r"A loss is not finite at step 3 \(kd = nan\)"):
        make_alpha("plateau", 0.5, 100).weights(Signals(3, 100))
    with pytest.raises(MomeError, match=r"A gradient norm is not finite at step 3 \(kd_norm = nan\)"):
        make_alpha("gradient_norm", 0.5, 100).weights(Signals(3, 100, ce=1.0, kd=1.0, ce_norm=1.0))


def test_a_micro_batch_in_the_middle_of_a_step_is_refused_as_well() -> None:
    rule = make_alpha("adaptive", 0.5, 100)
    rule.weights(Signals(4, 100, 0, 4, 2.0, 2.0))
    with pytest.raises(MomeError, match="not finite at step 4"):
        rule.weights(Signals(4, 100, 1, 4, 2.0, math.inf))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("often", 0.5, 10), "Unknown rule for alpha 'often': choose one of fixed, ce, kd"),
        (("fixed", 1.5, 10), "between 0 and 1, not 1.5"),
        (("fixed", NAN, 10), "between 0 and 1, not nan"),
        (("fixed", 0.5, 0), "at least one optimizer step, not 0"),
    ],
)
def test_a_wrong_choice_is_refused_in_one_sentence(arguments, message) -> None:
    with pytest.raises(MomeError, match=message):
        make_alpha(*arguments)


def test_only_gradient_norm_asks_for_norms() -> None:
    assert [name for name in STRATEGIES if make_alpha(name, 0.5, 10).needs_norms] == ["gradient_norm"]


class ConfidentTeacher(AlphaStrategy):
    """A rule of ten lines: follow the data by the share of the KD loss that is left of its first value."""

    def __init__(self) -> None:
        self.first: float | None = None

    def weights(self, now: Signals) -> tuple[float, float]:
        if self.first is None:
            self.first = now.kd
        alpha = 1 - min(now.kd / self.first, 1.0)
        return alpha, 1 - alpha


def test_a_new_rule_of_ten_lines_works_through_the_same_interface() -> None:
    losses = np.array([[5.0, 4.0, NAN, NAN], [5.0, 3.0, NAN, NAN], [5.0, 8.0, NAN, NAN], [5.0, 1.0, NAN, NAN]])
    assert run(ConfidentTeacher(), losses) == [0.0, 0.25, 0.0, 0.75]
    first, second = ConfidentTeacher(), ConfidentTeacher()
    assert (first.needs(0), first.needs_norms) == ((True, True), False)
    now = list(signals(losses))
    first.weights(now[0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.weights(now[3]) == (0.75, 0.25)


# -------------------------------------------------------------------------------------------- simple rules


def test_fixed_rules_compute_only_what_has_weight() -> None:
    for name, value, alpha, needs in (
        ("fixed", 0.25, 0.25, (True, True)),
        ("fixed", 1.0, 1.0, (True, False)),
        ("fixed", 0.0, 0.0, (False, True)),
        ("ce", 0.3, 1.0, (True, False)),
        ("kd", 0.3, 0.0, (False, True)),
    ):
        strategy = make_alpha(name, value, 100)
        assert strategy.needs(5) == needs
        assert strategy.weights(Signals(5, 100)) == (alpha, 1 - alpha)


@pytest.mark.parametrize("total", [2, 3, 101, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_from_end_to_end_without_turning_back(name, total) -> None:
    strategy = make_alpha(name, 0.5, total)
    alphas = np.array([strategy.weights(Signals(step, total))[0] for step in range(total)])
    up = name.endswith("_up")
    assert (alphas[0], alphas[-1]) == ((0.0, 1.0) if up else (1.0, 0.0))
    assert (np.diff(alphas if up else alphas[::-1]) > 0).all()
    np.testing.assert_allclose(alphas + alphas[::-1], 1, atol=1e-15)  # symmetric, so the mean is one half
    assert strategy.weights(Signals(total + 5, total))[0] == alphas[-1]
    t = np.linspace(0, 1, total) if up else np.linspace(1, 0, total)
    formula = t if name.startswith("linear") else np.sin(np.pi * t / 2) ** 2
    np.testing.assert_allclose(alphas, formula, atol=1e-14)


def test_a_schedule_of_one_step_stays_at_its_start() -> None:
    alphas = {name: make_alpha(name, 0.5, 1).weights(Signals(0, 1))[0] for name in SCHEDULES}
    assert alphas == {"linear_up": 0.0, "linear_down": 1.0, "cosine_up": 0.0, "cosine_down": 1.0}


def test_schedules_skip_the_loss_that_weighs_nothing() -> None:
    strategy = make_alpha("cosine_up", 0.5, 11)
    assert [strategy.needs(step) for step in (0, 5, 10)] == [(False, True), (True, True), (True, False)]


def test_two_phases_change_once_at_half() -> None:
    for total, first in ((10, 5), (11, 6), (1, 1)):
        alphas = [make_alpha("kd_then_ce", 0.5, total).weights(Signals(step, total))[0] for step in range(total)]
        assert alphas == [0.0] * first + [1.0] * (total - first)
        mirrored = [make_alpha("ce_then_kd", 0.5, total).weights(Signals(step, total))[0] for step in range(total)]
        assert mirrored == [1 - alpha for alpha in alphas]


def test_alternating_follows_one_loss_per_step_whatever_the_micro_batches() -> None:
    alphas = np.array(run(make_alpha("alternating", 0.5, 6), recorded(96), 16)).reshape(6, 16)
    assert (alphas == np.array([1, 0, 1, 0, 1, 0])[:, None]).all()


def test_published_alternating_mixes_eight_and_eight_in_every_step() -> None:
    alphas = np.array(run(make_alpha("published_alternating", 0.5, 5), recorded(80), 16)).reshape(5, 16)
    assert (alphas.sum(1) == 8).all() and (alphas == np.tile([1.0, 0.0], 8)).all()


def test_published_alternating_carries_its_parity_over_odd_steps() -> None:
    alphas = np.array(run(make_alpha("published_alternating", 0.5, 4), recorded(12), 3)).reshape(4, 3)
    assert alphas.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert run(make_alpha("published_alternating", 0.5, 4), recorded(5)) == [1, 0, 1, 0, 1]


def test_published_alternating_may_be_asked_before_or_between_its_micro_batches() -> None:
    strategy = make_alpha("published_alternating", 0.5, 4)
    for step in range(3):
        for micro in range(5):
            planned = [strategy.needs(step, m) for m in range(5)]
            alpha, beta = strategy.weights(Signals(step, 4, micro, 5))
            assert planned == [strategy.needs(step, m) for m in range(5)]
            even = (5 * step + micro) % 2 == 0
            assert planned[micro] == (alpha == 1, beta == 1) == (even, not even)


# ------------------------------------------------------------------------------------------ the adaptive rules


def published_rule(ce: np.ndarray, kd: np.ndarray, k: int, start: float) -> np.ndarray:
    """α after every entry, by section 1 of the study's specification, from windows cut out of the whole record."""
    alphas = np.full(len(ce), start)
    for t in range(k - 1, len(ce)):
        w = []
        for losses in (ce, kd):
            window = losses[t - k + 1 : t + 1]
            mean = window.mean()
            d = (losses[t] - losses[t - k + 1]) / mean if mean != 0 else 0.0
            w.append(1 - np.clip(d, 0, 1))
        alphas[t] = w[0] / (w[0] + w[1]) if w[0] + w[1] > 0 else 0.5
    return alphas


@pytest.mark.parametrize("micro_batches", [1, 4, 16])
@pytest.mark.parametrize(("total", "k"), [(300, 20), (1999, 20), (2500, 25), (20_000, 200)])
def test_published_adaptive_reproduces_the_published_rule_from_recorded_losses(total, k, micro_batches) -> None:
    losses = recorded(640, seed=k + micro_batches)
    alphas = run(make_alpha("published_adaptive", 0.5, total), losses, micro_batches, total)
    np.testing.assert_allclose(alphas, published_rule(losses[:, 0], losses[:, 1], k, 0.5), rtol=1e-12)
    assert len(set(alphas)) > 20  # the record does exercise the rule


@pytest.mark.parametrize("micro_batches", [4, 16])
def test_adaptive_applies_the_formula_to_the_means_of_finished_steps(micro_batches) -> None:
    losses, steps = recorded(100 * micro_batches, seed=micro_batches), 100
    alphas = np.array(run(make_alpha("adaptive", 0.3, 300), losses, micro_batches, 300)).reshape(steps, -1)
    assert (alphas == alphas[:, :1]).all()  # decided once per step
    means = losses[:, :2].reshape(steps, micro_batches, 2).mean(1)
    decided = published_rule(means[:, 0], means[:, 1], 20, 0.3)
    np.testing.assert_allclose(alphas[1:, 0], decided[:-1], rtol=1e-12)
    assert alphas[0, 0] == 0.3 and len(set(decided)) > 5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=1, max_size=60), st.floats(0, 1))
def test_both_adaptive_rules_coincide_with_one_micro_batch_per_step(pairs, start) -> None:
    losses = np.array([(ce, kd, NAN, NAN) for ce, kd in pairs])
    published, meant = (run(make_alpha(name, start, 100), losses) for name in ("published_adaptive", "adaptive"))
    assert published == meant
    np.testing.assert_allclose(published, published_rule(losses[:, 0], losses[:, 1], 20, start), rtol=1e-9, atol=1e-12)


FALLING, RISING, FLAT = np.linspace(4, 3, 20), np.linspace(3, 4, 20), np.full(20, 3.0)
EXPLODING, ZERO = np.array([0.01] * 19 + [100.0]), np.zeros(20)
D = 1 / 3.5  # rise over mean of RISING


@pytest.mark.parametrize("name", ["published_adaptive", "adaptive"])
@pytest.mark.parametrize(
    ("ce", "kd", "alpha"),
    [
        (FALLING, FALLING, 0.5),
        (FLAT, FALLING, 0.5),
        (FALLING, 10 * FALLING, 0.5),  # the size of a loss does not matter
        (RISING, FALLING, (1 - D) / (2 - D)),
        (FALLING, RISING, 1 / (2 - D)),
        (RISING, RISING, 0.5),
        (EXPLODING, FALLING, 0.0),  # a rise of more than the mean: w is 0
        (FALLING, EXPLODING, 1.0),
        (EXPLODING, RISING, 0.0),
        (EXPLODING, EXPLODING, 0.5),  # 0 / 0 in the release
        (ZERO, ZERO, 0.5),  # mean 0: no change
        (ZERO, RISING, 1 / (2 - D)),
    ],
)
def test_the_adaptive_rules_in_every_corner(name, ce, kd, alpha) -> None:
    losses = np.stack([ce, kd, ZERO, ZERO], 1)
    alphas = run(make_alpha(name, 0.4, 100), losses)
    assert alphas[:19] == [0.4] * 19  # the window is not full
    assert alphas[19] == pytest.approx(alpha, rel=1e-12)


def test_the_window_and_the_relative_change() -> None:
    assert [adaptive_window(total) for total in (1, 2000, 2099, 2100, 50_000)] == [20, 20, 20, 21, 500]
    assert relative_change(RISING.tolist()) == pytest.approx(D) == -relative_change(RISING[::-1].tolist())
    assert relative_change([0.0, 0.0]) == relative_change([-1.0, 1.0]) == 0.0


def test_with_accumulation_the_published_window_spans_hardly_more_than_one_step() -> None:
    """The defect the study shows: over 16 micro-batches a CE that rises from step to step goes unnoticed."""
    steps = np.repeat(np.linspace(3, 6, 60), 16)
    losses = np.stack([steps, np.full_like(steps, 3.0), steps, steps], 1)
    published, meant = (run(make_alpha(name, 0.5, 60), losses, 16, 60) for name in ("published_adaptive", "adaptive"))
    assert 0.48 < min(published) and min(meant) < 0.45


# ------------------------------------------------------------------------------------------------ uncertainty


@pytest.mark.parametrize(("ce", "kd"), [(4.0, 4.0), (6.0, 1.5), (0.02, 3.0), (15.0, 4.0)])
def test_uncertainty_converges_to_weights_inversely_proportional_to_the_losses(ce, kd) -> None:
    """d/ds [exp(−s)·L + s/2] = 0 at exp(s) = 2L, so the weights exp(−s) are 1 / 2L and α = kd / (ce + kd)."""
    rule = UncertaintyAlpha(3000)
    alphas = run(rule, np.tile([ce, kd, NAN, NAN], (3000, 1)), total=3000)
    assert alphas[0] == 0.5
    assert alphas[-1] == pytest.approx(kd / (ce + kd), rel=1e-3)
    np.testing.assert_allclose(np.exp(rule.s), [2 * ce, 2 * kd], rtol=1e-3)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_uncertainty_equals_autograd_and_adam_on_the_two_scalars(micro_batches) -> None:
    steps, total = 200, 600
    losses = recorded(steps * micro_batches, seed=9)
    alphas = np.array(run(UncertaintyAlpha(total), losses, micro_batches, total)).reshape(steps, -1)
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=30 / total)
    expected = []
    for mean in torch.tensor(losses[:, :2]).unflatten(0, (steps, -1)).mean(1):
        expected.append((-s).softmax(0)[0].item())  # the weights of a step are those before its update
        optimizer.zero_grad()
        ((-s).exp() * mean + s / 2).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(alphas, np.repeat(np.array(expected)[:, None], micro_batches, 1), rtol=1e-10)
    assert max(expected) - min(expected) > 0.01


def test_uncertainty_stays_bounded_and_arrives_in_short_runs_as_in_long_ones() -> None:
    for extreme in (0.0, 1e-300, 1e300):
        rule = UncertaintyAlpha(200)
        alphas = run(rule, np.tile([extreme, 3.0, NAN, NAN], (400, 1)))
        assert all(abs(s) <= rule.BOUND for s in rule.s) and all(math.isfinite(alpha) for alpha in alphas)
    assert [UncertaintyAlpha(total).rate for total in (10, 300, 3000, 10**6)] == [0.1, 0.1, 0.01, 0.001]
    for total in (300, 624, 3000):  # after the same share of the run, whatever its length
        rule = UncertaintyAlpha(total)
        run(rule, np.tile([6.0, 0.02, NAN, NAN], (total // 4, 1)), total=total)
        np.testing.assert_allclose(rule.s, np.log([12.0, 0.04]), atol=0.15)


# ---------------------------------------------------------------------------------------------- gradient norms


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("ce", "kd"), [(1.0, 1.0), (0.9, 0.3), (0.02, 15.0)])
def test_gradient_norm_makes_both_gradients_equally_long(ce, kd, micro_batches) -> None:
    alphas = np.array(run(GradientNormAlpha(0.3), np.tile([NAN, NAN, ce, kd], (12, 1)), micro_batches))
    known = alphas[micro_batches if micro_batches > 1 else 0 :]
    np.testing.assert_allclose(known * ce, (1 - known) * kd, rtol=1e-12)
    assert micro_batches == 1 or (alphas[:micro_batches] == 0.3).all()


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradient_norm_follows_the_exponential_mean_of_the_steps_means(micro_batches) -> None:
    steps = 50
    losses = recorded(steps * micro_batches, seed=2)
    alphas = np.array(run(make_alpha("gradient_norm", 0.5, steps), losses, micro_batches)).reshape(steps, -1)
    means = losses[:, 2:].reshape(steps, -1, 2).mean(1)
    powers = 0.9 ** np.arange(steps)
    decided = []
    for t in range(steps):  # weights 0.1 · 0.9^age, and what is left for the first step
        weights = 0.1 * powers[: t + 1]
        weights[-1] = powers[t]
        ce, kd = weights @ means[t::-1]
        decided.append(kd / (ce + kd))
    expected = decided if micro_batches == 1 else [0.5, *decided[:-1]]
    np.testing.assert_allclose(alphas, np.repeat(np.array(expected)[:, None], micro_batches, 1), rtol=1e-12)


def test_gradient_norm_is_bounded_and_keeps_alpha_where_there_is_no_gradient() -> None:
    def alpha(ce: float, kd: float) -> float:
        return GradientNormAlpha(0.3).weights(Signals(0, 10, ce_norm=ce, kd_norm=kd))[0]

    assert (alpha(0.0, 1.0), alpha(1.0, 0.0), alpha(0.0, 0.0)) == (1 - 1e-4, 1e-4, 0.3)
    assert (alpha(1e-320, 1e300), alpha(1e308, 1e308)) == (1 - 1e-4, 1e-4)


# ----------------------------------------------------------------------------------------------------- plateau


def kd_only(values: Iterable[float]) -> np.ndarray:
    return np.array([(NAN, value, NAN, NAN) for value in values])


def test_plateau_never_switches_before_two_windows_are_full() -> None:
    for values in (np.full(30, 3.0), np.linspace(3, 9, 30)):
        alphas = run(PlateauAlpha(window=10), kd_only(values))
        assert alphas == [0.0] * 20 + [1.0] * 10
    assert run(make_alpha("plateau", 0.5, 39), kd_only([3.0] * 39), total=39) == [0.0] * 39
    assert run(make_alpha("plateau", 0.5, 500), kd_only([3.0] * 110)) == [0.0] * 100 + [1.0] * 10


def test_plateau_stays_with_the_teacher_while_the_loss_falls_fast_enough() -> None:
    """A loss that falls geometrically by a factor r per step falls by 1 − r^k over a window of k steps."""
    steps = np.arange(200)
    fast, slow = 0.985 ** (1 / 10), 0.995 ** (1 / 10)
    assert run(PlateauAlpha(10, fall=0.01), kd_only(5 * fast**steps)) == [0.0] * 200
    assert run(PlateauAlpha(10, fall=0.01), kd_only(5 * slow**steps)) == [0.0] * 20 + [1.0] * 180


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_plateau_switches_where_the_running_mean_stops_falling_and_never_back(micro_batches) -> None:
    rng = np.random.default_rng(0)
    kd = np.concatenate([np.linspace(8, 4, 60), np.full(40, 4.0), np.linspace(4, 1, 60)]) + rng.normal(0, 0.02, 160)
    alphas = np.array(run(PlateauAlpha(10), kd_only(np.repeat(kd, micro_batches)), micro_batches)).reshape(160, -1)
    assert (alphas == alphas[:, :1]).all()
    switch = next(s for s in range(20, 161) if kd[s - 10 : s].mean() > 0.99 * kd[s - 20 : s - 10].mean())
    assert 60 < switch < 100
    assert alphas[:, 0].tolist() == [0.0] * switch + [1.0] * (160 - switch)  # although the loss falls again
