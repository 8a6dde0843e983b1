"""Divergences against an independent computation with 40 digits (mpmath, explicit loops), limits and properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch import Tensor

from mome_utils.config import MomeError
from mome_utils.divergences import (
    DIVERGENCES,
    PUBLISHED,
    check_settings,
    divergence,
    l1_product,
    log_probabilities,
    published_ce,
    published_forward_kl,
    published_inverse_kl,
    published_l1_product,
    teacher_side,
)

INF = math.inf
mp.dps = 40
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-10}
ABSOLUTE = {torch.float32: 1e-6, torch.float64: 1e-14}  # the floor that the module states, times T**scale
PARAMETERS = {name: (0.1, 0.5, 0.9) if d.parameter else (None,) for name, d in DIVERGENCES.items()}
CASES = [(name, parameter) for name, parameters in PARAMETERS.items() for parameter in parameters]
PROPERTY = settings(max_examples=15, deadline=None, derandomize=True)
seeds, sizes, temperatures = st.integers(0, 10_000), st.integers(2, 30), st.floats(0.3, 5)
inner = st.floats(0.02, 0.98)


# --------------------------------------------------------------------------- the independent computation


def softmax(logits: Sequence, temperature: float) -> list:
    weights = [mpf(0) if x == -INF else mp.exp(mpf(x) / mpf(temperature)) for x in logits]
    return [w / mp.fsum(weights) for w in weights]


def kl(a: list, b: list):
    if any(x > 0 and y == 0 for x, y in zip(a, b, strict=True)):
        return mpf("inf")
    return mp.fsum(x * mp.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixture(a: list, b: list, share: float) -> list:
    return [mpf(share) * x + (1 - mpf(share)) * y for x, y in zip(a, b, strict=True)]


@cache
def reference(name: str, student: tuple, teacher: tuple, temperature: float, parameter: float | None):
    """The formula of a divergence, times T**scale, of one position."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    share = DIVERGENCES[name].default if parameter is None else parameter
    if name == "soft_ce":
        entropy = -mp.fsum(x * mp.log(x) for x in p if x > 0)
        value = entropy + kl(p, q)
    elif name == "forward_kl":
        value = kl(p, q)
    elif name == "reverse_kl":
        value = kl(q, p)
    elif name == "jensen_shannon":
        m = mixture(p, q, share)
        value = mpf(share) * kl(p, m) + (1 - mpf(share)) * kl(q, m)
    elif name == "skew_forward_kl":
        value = kl(p, mixture(p, q, share))
    elif name == "skew_reverse_kl":
        value = kl(q, mixture(q, p, share))
    else:
        value = mp.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
    return value * mpf(temperature) ** (1 if name == "total_variation" else 2)


@cache
def reference_gradient(name: str, student: tuple, teacher: tuple, temperature: float, parameter: float | None) -> list:
    """Central differences with 40 digits; 0 for a token that the student has ruled out."""
    step = mpf(10) ** -12

    def moved(v: int, by):
        there = tuple(x + by if i == v else x for i, x in enumerate(map(mpf, student)))
        return reference(name, there, teacher, temperature, parameter)

    return [
        0.0 if x == -INF else float((moved(v, step) - moved(v, -step)) / (2 * step)) for v, x in enumerate(student)
    ]


def pair(*shape: int, scale: float = 2.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.float().to(dtype), teacher.float().to(dtype)  # the same numbers in either precision


def gradient(student: Tensor, loss) -> Tensor:
    student = student.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student).sum(), student)
    return found


def assert_as_reference(name, parameter, temperature, student, teacher, gradients=True, floor=None) -> None:
    dtype = student.dtype
    scale = temperature ** DIVERGENCES[name].scale
    floor = ABSOLUTE[dtype] * scale if floor is None else floor
    values = divergence(name, student, teacher, temperature, parameter)
    assert values.dtype == dtype and values.shape == student.shape[:-1]
    found = gradient(student, lambda s: divergence(name, s, teacher, temperature, parameter))
    for row, value in enumerate(values.tolist()):
        s, t = tuple(student[row].tolist()), tuple(teacher[row].tolist())
        expected = float(reference(name, s, t, temperature, parameter))
        assert value == pytest.approx(expected, rel=RELATIVE[dtype], abs=floor), (name, row)
        if gradients and math.isfinite(expected):
            # An error of the value, spread over the vocabulary, is the floor of the gradient.
            allowed = 10 * ABSOLUTE[dtype] * scale / temperature + RELATIVE[dtype] * expected / temperature
            wanted = reference_gradient(name, s, t, temperature, parameter)
            assert found[row].tolist() == pytest.approx(wanted, rel=RELATIVE[dtype], abs=allowed), (name, row)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_values_and_gradients_equal_the_independent_computation(name, parameter, dtype) -> None:
    for temperature in (1.0, 2.0, 0.7):
        student, teacher = pair(2, 6, dtype=dtype)
        assert_as_reference(name, parameter, temperature, student, teacher, floor=0)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_extreme_logits_are_exact(name, parameter, dtype) -> None:
    student, teacher = pair(4, 5, scale=1e4, dtype=dtype)
    student[1], student[2] = teacher[1], teacher[2]  # equal, and nearly equal on an offset of 1e4
    student[2, 0] += 8
    student[3] = pair(1, 5, seed=5, dtype=dtype)[0] + 1e4
    teacher[3] = pair(1, 5, seed=6, dtype=dtype)[0] - 1e4
    for temperature in (1.0, 3.0):
        assert_as_reference(name, parameter, temperature, student, teacher)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_a_token_that_both_rule_out_counts_nothing(name, parameter, dtype) -> None:
    student, teacher = pair(3, 7, dtype=dtype)
    student[:, 2] = teacher[:, 2] = -INF
    student[1, 5] = teacher[1, 5] = -INF
    for temperature in (1.0, 3.0):
        assert_as_reference(name, parameter, temperature, student, teacher)
    found = gradient(student, lambda s: divergence(name, s, teacher, 1.0, parameter))
    assert (found[:, 2] == 0).all() and found[1, 5] == 0 and (found[0, [0, 1, 3]] != 0).all()
    kept = [v for v in range(7) if v != 2]  # as if the token were not in the vocabulary
    without = divergence(name, student[::2, kept], teacher[::2, kept], 1.0, parameter)
    torch.testing.assert_close(divergence(name, student, teacher, 1.0, parameter)[::2], without)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_a_token_that_one_side_rules_out(name, parameter, dtype) -> None:
    student, teacher = pair(4, 6, dtype=dtype)
    student[0, 1] = -INF  # only the student
    teacher[1, 2] = -INF  # only the teacher
    student[2, 1], teacher[2, 1] = -INF, -1e4  # where the teacher's probability is too small for the dtype
    student[3, 1], teacher[3, 1] = -1e4, -INF
    assert_as_reference(name, parameter, 1.0, student, teacher)
    values = divergence(name, student, teacher, 1.0, parameter)
    infinite = {"soft_ce": [0, 2], "forward_kl": [0, 2], "reverse_kl": [1, 3]}.get(name, [])
    assert [row for row in range(4) if values[row] == INF] == infinite and not values.isnan().any()
    found = gradient(student, lambda s: divergence(name, s, teacher, 1.0, parameter))
    if name != "reverse_kl":
        assert torch.isfinite(found).all()
    if name in ("soft_ce", "forward_kl"):  # the pull towards the teacher stays what it is
        torch.testing.assert_close(found, student.softmax(-1) - teacher.softmax(-1))


def test_an_infinite_value_that_is_masked_has_no_gradient() -> None:
    student, teacher = pair(3, 5)
    teacher[1, 2] = -INF
    kept = torch.tensor([True, False, True])
    for name in DIVERGENCES:
        found = gradient(student, lambda s, name=name: torch.where(kept, divergence(name, s, teacher), 0))
        assert (found[1] == 0).all() and torch.isfinite(found).all() and (found[::2] != 0).any()


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_gradcheck(name, parameter) -> None:
    student, teacher = pair(3, 7)
    student.requires_grad_()
    for temperature in (1.0, 2.0, 0.6):
        assert torch.autograd.gradcheck(lambda s, t=temperature: divergence(name, s, teacher, t, parameter), (student,))
    target = torch.tensor([1, 6, -100])
    assert torch.autograd.gradcheck(
        lambda s: l1_product(log_probabilities(teacher), log_probabilities(s), target), (student,)
    )


def plain(name: str, log_p: Tensor, q: Tensor, share: float) -> Tensor:
    """The formulas in probabilities, for autograd to differentiate."""
    p, log_q = log_p.exp(), q.log()
    m, m_reverse = share * p + (1 - share) * q, share * q + (1 - share) * p
    return {
        "soft_ce": -p * log_q,
        "forward_kl": p * (log_p - log_q),
        "reverse_kl": q * (log_q - log_p),
        "jensen_shannon": share * p * (log_p - m.log()) + (1 - share) * q * (log_q - m.log()),
        "skew_forward_kl": p * (log_p - m.log()),
        "skew_reverse_kl": q * (log_q - m_reverse.log()),
        "total_variation": (p - q).abs() / 2,
    }[name].sum(-1)


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_the_written_pull_is_the_derivative_of_the_formula_in_log_q(name, parameter) -> None:
    log_q, log_p = (log_probabilities(x) for x in pair(4, 9))
    share = parameter or 0.0
    found = gradient(log_q, lambda x: DIVERGENCES[name].compute(log_p, x, share))
    torch.testing.assert_close(found, gradient(log_q, lambda x: plain(name, log_p, x.exp(), share)))


def test_the_gradient_is_the_one_that_is_documented() -> None:
    student, teacher = pair(6, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    reverse = q * ((q / p).log() - divergence("reverse_kl", student, teacher).unsqueeze(-1))
    for name, expected in (("soft_ce", q - p), ("forward_kl", q - p), ("reverse_kl", reverse)):
        found = gradient(student, lambda s, name=name: divergence(name, s, teacher))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    near = {  # the generalized Jensen-Shannon divergence near its two ends, the skewed ones near λ = 0
        "forward_kl": [("jensen_shannon", 1e-7, 1e7), ("skew_forward_kl", 1e-7, 1.0)],
        "reverse_kl": [("jensen_shannon", 1 - 1e-7, 1e7), ("skew_reverse_kl", 1e-7, 1.0)],
    }
    for name, others in near.items():
        expected = gradient(student, lambda s, name=name: divergence(name, s, teacher))
        for other, parameter, factor in others:
            found = gradient(student, lambda s, o=other, x=parameter: divergence(o, s, teacher, 1.0, x))
            torch.testing.assert_close(factor * found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_gets_no_gradient_and_inputs_stay_as_they_are(name) -> None:
    student, teacher = (x.requires_grad_() for x in pair(3, 7))
    before = student.detach().clone(), teacher.detach().clone()
    loss = divergence(name, student, teacher, 3.0).sum()
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()  # a rule for α may ask for the gradient of each loss before the combined one
    assert teacher.grad is None and torch.equal(student.grad, 2 * once) and (once != 0).any()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    log_p, log_q = teacher.log_softmax(-1).detach(), student.log_softmax(-1).detach()
    copies = log_p.clone(), log_q.clone()
    with torch.no_grad():
        DIVERGENCES[name].compute(log_p, log_q, DIVERGENCES[name].default)
    assert torch.equal(log_p, copies[0]) and torch.equal(log_q, copies[1])


def test_a_second_derivative_is_refused_instead_of_being_wrong() -> None:
    student, teacher = pair(2, 5)
    student.requires_grad_()
    with pytest.raises(MomeError, match="differentiated once"):
        torch.autograd.grad(divergence("reverse_kl", student, teacher).sum(), student, create_graph=True)


# ---------------------------------------------------------------------------------- temperature and precision


def limit(name: str, parameter: float | None, student: Tensor, teacher: Tensor) -> Tensor:
    """What the value tends to for T → ∞, as the module states it."""
    gap = student - teacher
    if name == "total_variation":
        return (gap - gap.mean(-1, keepdim=True)).abs().mean(-1) / 2
    c = {"jensen_shannon": lambda b: b * (1 - b), "forward_kl": lambda _: 1, "reverse_kl": lambda _: 1}.get(
        name, lambda skew: (1 - skew) ** 2
    )(parameter)
    return c / 2 * gap.var(-1, correction=0)


@pytest.mark.parametrize(("name", "parameter"), [case for case in CASES if case[0] != "soft_ce"])
def test_at_high_temperature_the_value_tends_to_the_stated_form_of_the_logit_gap(name, parameter) -> None:
    student, teacher = pair(5, 12)
    torch.testing.assert_close(
        divergence(name, student, teacher, 1e4, parameter), limit(name, parameter, student, teacher), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_the_scale_keeps_the_gradients_size_at_every_temperature(name, parameter) -> None:
    student, teacher = pair(8, 24, scale=1.0)
    norms = {
        t: gradient(student, lambda s, t=t: divergence(name, s, teacher, t, parameter)).norm().item()
        for t in (1.0, 2.0, 4.0, 8.0, 16.0)
    }
    smooth = "forward_kl" if name == "soft_ce" else name  # both have the same gradient
    final = gradient(student, lambda s: limit(smooth, parameter, s, teacher)).norm().item()
    for temperature, norm in norms.items():
        assert abs(norm / final - 1) < 2 / temperature  # it converges, to first order in 1 / T
    # One power less and the norm falls with T, one more and it grows.
    assert norms[16] / 16 < norms[2] / 2 / 4 and norms[16] * 16 > norms[2] * 2 * 4


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_at_low_temperature_only_the_most_likely_tokens_count(name, parameter) -> None:
    student, teacher = pair(40, 5)
    temperature = 1e-4
    value = divergence(name, student, teacher, temperature, parameter) / temperature ** DIVERGENCES[name].scale
    mine, theirs = student.argmax(-1), teacher.argmax(-1)
    gaps = {  # by how much a side's own favourite beats the other side's, times 1 / T
        "reverse_kl": teacher.amax(-1) - teacher.gather(-1, mine.unsqueeze(-1)).squeeze(-1),
        "forward_kl": student.amax(-1) - student.gather(-1, theirs.unsqueeze(-1)).squeeze(-1),
    }
    if name in ("soft_ce", "forward_kl", "reverse_kl"):
        expected = gaps["reverse_kl" if name == "reverse_kl" else "forward_kl"] / temperature
    else:
        b = parameter
        most = {"total_variation": lambda: 1.0, "jensen_shannon": lambda: -b * math.log(b) - (1 - b) * math.log1p(-b)}
        expected = (mine != theirs) * most.get(name, lambda: -math.log(b))()
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-6)
    assert 0 < (mine == theirs).sum() < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_half_precision_is_widened_before_anything_is_computed(name, dtype) -> None:
    student, teacher = pair(5, 31, dtype=dtype)
    for temperature in (1.0, 3.0):
        values = divergence(name, student, teacher, temperature)
        assert values.dtype == torch.float32
        assert torch.equal(values, divergence(name, student.float(), teacher.float(), temperature))
    assert log_probabilities(student, 2.0).dtype == torch.float32
    assert divergence(name, student, teacher.double()).dtype == torch.float64
    assert gradient(student, lambda s: divergence(name, s, teacher)).dtype == dtype


def test_log_probabilities_of_large_logits_at_any_temperature_keep_their_digits() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, 1e4 - 2.5]])
    for temperature in (0.3, 1.0, 3.0, 7.0, 8.0):
        p = softmax(logits[0].tolist(), temperature)
        found = log_probabilities(logits, temperature)[0].tolist()
        assert found == pytest.approx([float(mp.log(x)) for x in p], rel=1e-6, abs=1e-7)


def test_any_number_of_leading_dimensions_and_the_cheap_teacher_side() -> None:
    student, teacher = pair(2, 3, 4, 6)
    for name, chosen in DIVERGENCES.items():
        values = divergence(name, student, teacher, 2.0)
        assert values.shape == (2, 3, 4)
        torch.testing.assert_close(
            values.flatten(), divergence(name, student.reshape(24, 6), teacher.reshape(24, 6), 2.0)
        )
        sides = [teacher_side(name, teacher, 2.0), log_probabilities(teacher, 2.0)]
        found = [chosen.compute(log_p, log_probabilities(student, 2.0), chosen.default or 0.5) for log_p in sides]
        torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------------------------ properties


@PROPERTY
@given(seeds, sizes, temperatures, inner)
def test_values_are_in_their_range_and_zero_only_for_equal_sides(seed, size, temperature, share) -> None:
    student, teacher = pair(6, size, seed=seed)
    far = pair(6, size, seed=seed, scale=60.0)
    most = {
        "jensen_shannon": -share * math.log(share) - (1 - share) * math.log1p(-share),
        "skew_forward_kl": -math.log(share),
        "skew_reverse_kl": -math.log(share),
        "total_variation": 1.0,
    }
    for name, chosen in DIVERGENCES.items():
        parameter = share if chosen.parameter else None
        scale = temperature**chosen.scale
        values = divergence(name, student, teacher, temperature, parameter) / scale
        equal = divergence(name, student, student + 3, temperature, parameter) / scale
        if name == "soft_ce":  # its least value is the teacher's entropy
            log_p = log_probabilities(teacher, temperature)
            values = values + (log_p.exp() * log_p).sum(-1)
            log_q = log_probabilities(student, temperature)
            equal = equal + (log_q.exp() * log_q).sum(-1)
        assert (values > 1e-9).all()
        torch.testing.assert_close(equal, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)
        extreme = divergence(name, *far, temperature, parameter) / scale
        assert (extreme >= 0).all() and (extreme <= most.get(name, INF) * (1 + 1e-12)).all()


@PROPERTY
@given(seeds, sizes, temperatures, inner)
def test_symmetries(seed, size, temperature, share) -> None:
    student, teacher = pair(4, size, seed=seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mirrored = {
        "forward_kl": ("reverse_kl", None),
        "skew_forward_kl": ("skew_reverse_kl", share),
        "jensen_shannon": ("jensen_shannon", 1 - share),
        "total_variation": ("total_variation", None),
    }
    for name, chosen in DIVERGENCES.items():
        parameter = share if chosen.parameter else None
        values = divergence(name, student, teacher, temperature, parameter)
        moved = divergence(name, (student + 3)[:, order], (teacher - 5)[:, order], temperature, parameter)
        torch.testing.assert_close(values, moved, rtol=1e-9, atol=1e-12)
        if name in mirrored:
            other, its = mirrored[name]
            swapped = divergence(other, teacher, student, temperature, its)
            torch.testing.assert_close(values, swapped, rtol=1e-9, atol=1e-13)
    half = divergence("jensen_shannon", student, teacher, temperature, 0.5)
    torch.testing.assert_close(half, divergence("jensen_shannon", teacher, student, temperature, 0.5))


@PROPERTY
@given(seeds, sizes, inner)
def test_inequalities_between_divergences(seed, size, share) -> None:
    student, teacher = pair(8, size, seed=seed)
    of = {name: divergence(name, student, teacher) for name in DIVERGENCES}
    pinsker = (torch.minimum(of["forward_kl"], of["reverse_kl"]) / 2).sqrt()
    assert (of["total_variation"] <= pinsker + 1e-12).all()
    assert (divergence("jensen_shannon", student, teacher, 1.0, 0.5) <= math.log(2) * of["total_variation"]).all()
    for skewed, kl_name in (("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        # KL is convex in its second side, so mixing the first into it by λ keeps at most 1 − λ of it.
        assert (divergence(skewed, student, teacher, 1.0, share) <= (1 - share) * of[kl_name] + 1e-12).all()


def test_skew_and_jensen_shannon_tend_to_kl() -> None:
    student, teacher = pair(6, 13)
    forward, reverse = (divergence(name, student, teacher) for name in ("forward_kl", "reverse_kl"))
    for name, parameter, factor, expected in (
        ("skew_forward_kl", 1e-9, 1, forward), ("skew_reverse_kl", 1e-9, 1, reverse),
        ("jensen_shannon", 1e-6, 1e6, forward), ("jensen_shannon", 1 - 1e-6, 1e6, reverse),
    ):
        torch.testing.assert_close(
            factor * divergence(name, student, teacher, 1.0, parameter), expected, rtol=1e-3, atol=1e-6
        )


def test_soft_ce_is_forward_kl_plus_the_teachers_entropy() -> None:
    student, teacher = pair(6, 13)
    for temperature in (1.0, 2.5):
        log_p = log_probabilities(teacher, temperature)
        entropy = -(log_p.exp() * log_p).sum(-1) * temperature**2
        both = (divergence(name, student, teacher, temperature) for name in ("soft_ce", "forward_kl"))
        torch.testing.assert_close(next(both) - next(both), entropy)


# ---------------------------------------------------------------------------------------- one clear sentence


@pytest.mark.parametrize(
    ("name", "temperature", "parameter", "message"),
    [
        ("kl", 1.0, None, "Unknown divergence 'kl': choose one of soft_ce, forward_kl"),
        *[("forward_kl", t, None, "must be a positive number") for t in (0.0, -1.0, math.nan, INF, 1e7)],
        *[("jensen_shannon", 1.0, b, "parameter β of jensen_shannon must lie strictly") for b in (0.0, 1.0, math.nan)],
        *[(f"skew_{way}_kl", 1.0, x, "parameter λ of skew_") for way in ("forward", "reverse") for x in (0, 1, -0.1)],
        *[(name, 1.0, 0.5, f"{name} has no parameter") for name, d in DIVERGENCES.items() if not d.parameter],
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(name, temperature, parameter, message) -> None:
    for call in (
        lambda: check_settings(name, temperature, parameter),
        lambda: divergence(name, *pair(2, 3), temperature, parameter),
    ):
        with pytest.raises(MomeError, match=message) as caught:
            call()
        text = str(caught.value)
        assert text.endswith(".") and text.count(". ") == 0 and "\n" not in text


def test_logits_of_unequal_shapes_are_refused() -> None:
    student, _ = pair(4, 6)
    for teacher in (student[:1], student[:, :5]):
        with pytest.raises(MomeError, match="must have the same shape"):
            divergence("forward_kl", student, teacher)
    with pytest.raises(MomeError, match="positive number"):
        log_probabilities(student, 0.0)


def test_every_divergence_says_what_it_is() -> None:
    for name, chosen in DIVERGENCES.items():
        assert chosen.name == name and check_settings(name) == chosen.default
        assert all(len(text) > 4 and "\n" not in text for text in (chosen.formula, chosen.gradient, chosen.range))
        assert "arXiv" in chosen.source
        assert (chosen.parameter is None) == (chosen.default == 0) and chosen.bounds == (0, 1)
        assert chosen.parameter is None or chosen.parameter in chosen.formula
    with pytest.raises(TypeError):
        DIVERGENCES["mine"] = DIVERGENCES["soft_ce"]  # type: ignore[index]


# -------------------------------------------------------------------------------- the release's own losses


def rows(logits: Tensor) -> list[list[list[float]]]:
    """softmax of [B, T, V] as nested lists of numbers."""
    return [[[float(x) for x in softmax(row, 1.0)] for row in block] for block in logits.double().tolist()]


IDS = torch.tensor([[3, 1, 2, 8, 2, 2], [4, 2, 5, 7, 6, 1]])  # pad = eos = 2: real ends at (0, 2) and (1, 1)
PAD = 2


def test_published_inverse_kl_equals_a_loop_and_is_bfloat16() -> None:
    student, teacher = pair(2, 6, 9, dtype=torch.float32)
    p, q = rows(teacher), rows(student)
    kept = [(b, t) for b in range(2) for t in range(6) if IDS[b, t] != PAD]  # the last position counts too
    expected = sum(-sum(x * math.log(y) for x, y in zip(p[b][t], q[b][t], strict=True)) for b, t in kept) / len(kept)
    value = published_inverse_kl(student, teacher, IDS, PAD)
    assert value.shape == () and value.item() == pytest.approx(expected, rel=1e-2)
    assert value == value.bfloat16().float() and value.item() != pytest.approx(expected, rel=1e-5)
    found = gradient(student, lambda s: published_inverse_kl(s, teacher, IDS, PAD))
    touched = (found != 0).any(-1)
    assert {(b, t) for b in range(2) for t in range(6) if touched[b, t]} == set(kept)
    q_minus_p = (student.softmax(-1) - teacher.softmax(-1)) / len(kept)
    torch.testing.assert_close(found[touched], q_minus_p[touched], rtol=0.05, atol=1e-3)  # forward KL's, in bfloat16
    student[0, 0, 4] = -INF
    assert math.isfinite(published_inverse_kl(student, teacher, IDS, PAD))  # ruled out by the student: counts 0


def test_published_forward_kl_sums_over_time_and_masks_nothing() -> None:
    student, teacher = pair(2, 6, 9)
    total = sum(
        reference("forward_kl", tuple(student[b, t].tolist()), tuple(teacher[b, t].tolist()), 2.0, None)
        for b in range(2) for t in range(6)
    )
    value = published_forward_kl(student, teacher)
    assert value.item() == pytest.approx(float(total / 2), rel=1e-10)
    released = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean"
    )
    assert value.item() == pytest.approx(4 * released.item(), rel=1e-10)
    assert value.item() == pytest.approx(6 * divergence("forward_kl", student, teacher, 2.0).mean().item(), rel=1e-10)


@pytest.mark.parametrize("dtype", RELATIVE)
def test_l1_product_as_released_and_as_meant(dtype) -> None:
    student, teacher = pair(2, 6, 9, dtype=dtype)
    p, q = rows(teacher), rows(student)

    def product(b: int, t: int, y: int) -> float:
        error = sum(abs(x - (v == y)) for v, x in enumerate(p[b][t]))
        return error * sum(abs(x - z) for x, z in zip(p[b][t], q[b][t], strict=True))

    released = sum(product(b, t, IDS[b, t].item()) for b in range(2) for t in range(6))
    assert published_l1_product(student, teacher, IDS).item() == pytest.approx(released, rel=RELATIVE[dtype])
    targets = torch.cat([IDS[:, 1:], torch.full((2, 1), -100)], 1)
    meant = l1_product(log_probabilities(teacher), log_probabilities(student), targets)
    assert meant.shape == (2, 6) and (meant[:, 5] == 0).all()
    assert meant[:, :5].flatten().tolist() == pytest.approx(
        [product(b, t, IDS[b, t + 1].item()) for b in range(2) for t in range(5)], rel=RELATIVE[dtype]
    )
    ignored = IDS.clone()
    ignored[0, 3] = -100
    without = published_l1_product(student, teacher, ignored).item()
    assert without == pytest.approx(released - product(0, 3, 8), rel=RELATIVE[dtype])


def test_l1_product_reaches_its_bounds_and_leaves_the_teacher_alone() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0]])
    log_p, log_q = log_probabilities(logits), log_probabilities(logits.roll(1, -1))
    assert l1_product(log_p, log_q, torch.tensor([1])).item() == 4.0  # the teacher is wrong, the student elsewhere
    assert l1_product(log_p, log_q, torch.tensor([0])).item() == 0.0  # the teacher is right: nothing to learn
    teacher = pair(2, 5)[1].requires_grad_()
    student = pair(2, 5)[0].requires_grad_()
    l1_product(log_probabilities(teacher), log_probabilities(student), torch.tensor([1, 2])).sum().backward()
    assert teacher.grad is None or (teacher.grad == 0).all()
    assert (student.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_ce_drops_real_ends(dtype) -> None:
    student = pair(2, 6, 9, dtype=dtype)[0]
    q = rows(student)
    kept = [(b, t) for b in range(2) for t in range(5) if IDS[b, t + 1] != PAD]
    expected = sum(-math.log(q[b][t][IDS[b, t + 1]]) for b, t in kept) / len(kept)
    assert published_ce(student, IDS, PAD).item() == pytest.approx(expected, rel=1e-5)
    assert published_ce(student, IDS, pad=0).item() != pytest.approx(expected, rel=1e-2)  # with the real ends
    labels = IDS.clone()
    labels[:, 4:] = -100
    assert published_ce(student, labels, pad=0).dtype == torch.float32
    touched = (gradient(student, lambda s: published_ce(s, labels, 0)) != 0).any(-1)
    assert touched.sum(1).tolist() == [3, 3]
    assert set(PUBLISHED) == {f"published_{x}" for x in ("inverse_kl", "forward_kl", "l1_product", "ce")}
