"""The objective on batches: losses against loops over targets, micro-batches against real accumulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mome_utils import divergences
from mome_utils.config import MomeError
from mome_utils.distillation import OBJECTIVES, Objective, micro_losses, shifted_ce, shifted_divergence
from mome_utils.divergences import DIVERGENCES

PAD = 2
BOTH = (True, True)


def batch(seed: int, sequences: int = 4, time: int = 5, vocabulary: int = 7):
    """Student and teacher logits [B, T, V] in float64, and ids [B, T] with a few paddings."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, sequences, time, vocabulary, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, vocabulary, (sequences, time), generator=generator)


def by_loop(objective: Objective, student, teacher, ids) -> tuple[float, float]:
    """Cross-entropy and divergence of sequences [b, T, V], one target after the other."""
    ce, kd = [], []
    for sequence in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            row = student[sequence, place]
            ce.append(float(torch.logsumexp(row, 0) - row[ids[sequence, place + 1]]))
            pair = (row[None], teacher[sequence, place][None])
            kd.append(float(divergences.divergence(
                objective.divergence, *pair, objective.temperature, objective.parameter)))
    return math.fsum(ce) / len(ce), math.fsum(kd) / len(kd)


# ------------------------------------------------------------------------------------- means over a batch


@pytest.mark.parametrize("name", DIVERGENCES)
def test_shifted_losses_are_means_over_the_targets(name) -> None:
    student, teacher, ids = batch(0)
    ce, kd = by_loop(Objective(name), student, teacher, ids)
    assert shifted_ce(student, ids).item() == pytest.approx(ce, rel=1e-10)
    assert shifted_divergence(name, student, teacher, ids).item() == pytest.approx(kd, rel=1e-10)


@pytest.mark.parametrize("loss", ["ce", *DIVERGENCES])
def test_ignored_positions_get_exactly_no_gradient(loss) -> None:
    student, teacher, ids = batch(1)
    ids[1, 2:] = -100
    student.requires_grad_()
    value = shifted_ce(student, ids) if loss == "ce" else shifted_divergence(loss, student, teacher, ids)
    value.backward()
    assert torch.equal(student.grad[1, 1:], torch.zeros_like(student.grad[1, 1:]))
    assert torch.equal(student.grad[:, -1], torch.zeros_like(student.grad[:, -1]))
    assert student.grad[0, 0].abs().max() > 0


@pytest.mark.parametrize("loss", ["ce", *DIVERGENCES])
def test_no_target_at_all_gives_zero_and_no_gradient(loss) -> None:
    student, teacher, ids = batch(2)
    student.requires_grad_()
    nothing = torch.full_like(ids, -100)
    value = shifted_ce(student, nothing) if loss == "ce" else shifted_divergence(loss, student, teacher, nothing)
    value.backward()
    assert value.item() == 0 and not student.grad.any()


# ----------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize(("name", "temperature"), [(name, 1.0) for name in DIVERGENCES] + [("forward_kl", 2.0)])
def test_every_micro_batch_is_a_mean_of_its_own(name, temperature, parts) -> None:
    student, teacher, ids = batch(3)
    objective = Objective(name, temperature=temperature, micro_batches=parts)
    ce, kd = micro_losses(objective, student, teacher, ids, [BOTH] * parts, pad=PAD)
    size = len(ids) // parts
    for i in range(parts):
        rows = slice(i * size, (i + 1) * size)
        expected = by_loop(objective, student[rows], teacher[rows], ids[rows])
        assert (ce[i].item(), kd[i].item()) == pytest.approx(expected, rel=1e-10)


def test_one_pass_over_the_batch_has_the_gradient_of_real_accumulation() -> None:
    """Weights differ between micro-batches, and the model is shared: a linear map from features to logits."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    _, teacher, ids = batch(4)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.2, 0.8]], dtype=torch.float64)
    matrix = torch.randn(3, 7, generator=generator, dtype=torch.float64)

    whole = matrix.clone().requires_grad_()
    ce, kd = micro_losses(Objective(micro_batches=4), features @ whole, teacher, ids, [BOTH] * 4, pad=PAD)
    (weights[:, 0] * ce + weights[:, 1] * kd).mean().backward()

    accumulated = matrix.clone().requires_grad_()
    for i, (alpha, beta) in enumerate(weights):
        logits = features[i : i + 1] @ accumulated
        one = alpha * shifted_ce(logits, ids[i : i + 1])
        other = beta * shifted_divergence("soft_ce", logits, teacher[i : i + 1], ids[i : i + 1])
        ((one + other) / 4).backward()
    torch.testing.assert_close(whole.grad, accumulated.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_needed_is_zero_and_changes_nothing_else(name) -> None:
    student, teacher, ids = batch(5)
    objective = Objective(name, micro_batches=4)
    every = micro_losses(objective, student, teacher, ids, [BOTH] * 4, pad=PAD)
    needs = [(True, False), (False, True), (False, False), (True, True)]
    chosen = teacher[[1, 3]]
    ce, kd = micro_losses(objective, student, chosen, ids, needs, pad=PAD)
    wanted = torch.tensor(needs)
    for some, all_of_them, want in zip((ce, kd), every, wanted.T, strict=True):
        torch.testing.assert_close(some, torch.where(want, all_of_them, 0))
    none = micro_losses(objective, student, None, ids, [(True, False)] * 4, pad=PAD)
    assert not none[1].any()
    torch.testing.assert_close(none[0], every[0])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name.startswith("published_")])
def test_the_releases_losses_come_with_the_releases_cross_entropy(name) -> None:
    student, teacher, ids = batch(6)
    objective = Objective(name, micro_batches=2)
    ce, kd = micro_losses(objective, student, teacher, ids, [BOTH] * 2, pad=PAD)
    arguments = {
        "published_inverse_kl": lambda rows: (student[rows], teacher[rows], ids[rows], PAD),
        "published_forward_kl": lambda rows: (student[rows], teacher[rows]),
        "published_l1_product": lambda rows: (student[rows], teacher[rows], ids[rows]),
    }[name]
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        torch.testing.assert_close(kd[i], getattr(divergences, name)(*arguments(rows)), check_dtype=False)
        torch.testing.assert_close(
            ce[i], divergences.published_ce(student[rows], ids[rows], PAD), check_dtype=False)


def test_infinite_distances_where_nothing_is_a_target_do_not_count() -> None:
    student, teacher, ids = batch(7)
    student[:, -1, 0] = -math.inf  # the last position predicts nothing
    student.requires_grad_()
    ce, kd = micro_losses(Objective("forward_kl"), student, teacher, ids, [BOTH], pad=PAD)
    (ce + kd).sum().backward()
    assert torch.isfinite(kd).all() and not student.grad[:, -1].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_of_any_size_and_type_give_finite_losses_and_gradients(name) -> None:
    generator = np.random.default_rng(8)
    for dtype, size in ((torch.float32, 1e4), (torch.bfloat16, 1e2)):
        student, teacher = torch.from_numpy(size * generator.standard_normal((2, 4, 5, 7))).to(dtype)
        student.requires_grad_()
        ids = torch.from_numpy(generator.integers(0, 7, (4, 5)))
        ce, kd = micro_losses(Objective(name), student, teacher, ids, [BOTH], pad=PAD)
        assert ce.dtype == kd.dtype == torch.float32
        (ce + kd).sum().backward()
        assert torch.isfinite(ce).all() and torch.isfinite(kd).all() and torch.isfinite(student.grad).all()


# ---------------------------------------------------------------------------------------------- complaints


@pytest.mark.parametrize(("fields", "message"), [
    ({"divergence": "backward_kl"}, "Unknown divergence 'backward_kl'"),
    ({"alpha": "magic"}, "Unknown rule for alpha 'magic'"),
    ({"value": 1.5}, "between 0 and 1"),
    ({"value": math.nan}, "between 0 and 1"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"divergence": "jensen_shannon", "parameter": 1.5}, "jensen_shannon"),
    ({"divergence": "forward_kl", "parameter": 0.5}, "forward_kl"),
    ({"divergence": "published_inverse_kl", "temperature": 2.0}, "as released"),
    ({"micro_batches": 0}, "one micro-batch or more"),
])
def test_a_wrong_objective_is_refused_in_one_sentence(fields, message) -> None:
    with pytest.raises(MomeError, match=message) as error:
        Objective(**fields)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
