"""Losses in chunks: the numbers of the plain losses in float64, whatever the chunks, and no tensor as large as all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mome_utils import fused
from mome_utils.config import MomeError
from mome_utils.distillation import OBJECTIVES, Objective, micro_losses
from mome_utils.divergences import DIVERGENCES
from mome_utils.fused import covers, fused_ce, fused_losses
from mome_utils.models import shifted_ce

VOCABULARY, HIDDEN, TEACHER = 37, 6, 9


def batch(
    seed: int, sequences: int = 4, length: int = 7, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Hidden states, output matrices and ids, of which some are no targets."""
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=drawn, dtype=torch.float64).to(dtype)

    ids = torch.randint(0, VOCABULARY, (sequences, length), generator=drawn)
    ids[torch.rand(sequences, length, generator=drawn) < 0.2] = -100
    return dict(
        hidden=normal(sequences, length, HIDDEN).requires_grad_(), weight=normal(VOCABULARY, HIDDEN).requires_grad_(),
        states=normal(sequences, length, TEACHER), head=normal(VOCABULARY, TEACHER), input_ids=ids,
    )


def reference(objective, data, needs, weights):
    """Loss, gradients and both losses, from whole logits by autograd in float64."""
    hidden, weight = (data[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    taught = torch.tensor([kd for _, kd in needs]).repeat_interleave(len(hidden) // len(needs))
    teacher = (data["states"].double() @ data["head"].double().T)[taught] if any(taught) else None
    ce, kd = micro_losses(objective, hidden @ weight.T, teacher, data["input_ids"], needs, pad=0)
    alpha, beta = torch.tensor(weights, dtype=torch.float64).T
    loss = (alpha * ce + beta * kd).mean()
    return loss, torch.autograd.grad(loss, (hidden, weight)), ce, kd


def computed(objective, data, needs, weights, **options):
    taught = torch.tensor([kd for _, kd in needs]).repeat_interleave(len(data["hidden"]) // len(needs))
    states = data["states"][taught] if any(taught) else None
    found = fused_losses(
        objective, data["hidden"], data["weight"], states, data["head"], data["input_ids"], needs, weights, **options
    )
    return found, torch.autograd.grad(found.loss, (data["hidden"], data["weight"]))


def same(mine, exact, tolerance: float) -> None:
    torch.testing.assert_close(mine.double(), exact.detach(), rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(DIVERGENCES)), temperature=st.sampled_from([1.0, 2.0, 0.7]),
    parts=st.sampled_from([1, 2, 4]), alpha=st.floats(0, 1), rows=st.sampled_from([1, 3, 5, 64]),
    kind=st.sampled_from(["known", "kept", "twice"]), seed=st.integers(0, 9), single=st.booleans(),
)
def test_losses_and_gradients_are_those_of_whole_logits(name, temperature, parts, alpha, rows, kind, seed, single):
    objective = Objective(name, "fixed", temperature=temperature, micro_batches=parts)
    data = batch(seed, dtype=torch.float32 if single else torch.float64)
    needs = [(True, True), (True, False), (False, True), (True, True)][:parts]
    weights = [(alpha, 1 - alpha), (1.0, 0.0), (0.0, 1.0), (1 - alpha, alpha)][:parts]
    asked: list[tuple] = []

    def weigh(ce, kd, norms):
        asked.append((ce, kd))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK", 1)
        patch.setattr(fused, "ROWS", rows)
        patch.setattr(fused, "KEPT", 0 if kind == "twice" else 10**9)
        found, gradients = computed(objective, data, needs, weights if kind == "known" else weigh)
    loss, exact, ce, kd = reference(objective, data, needs, weights)
    tolerance = 1e-5 if single else 1e-10
    same(found.loss, loss, tolerance)
    same(torch.tensor(found.ce, dtype=torch.float64), ce, tolerance)
    same(torch.tensor(found.kd, dtype=torch.float64), kd, tolerance)
    for mine, theirs in zip(gradients, exact, strict=True):
        same(mine, theirs, tolerance)
    assert found.weights == tuple(weights)
    assert asked == ([] if kind == "known" else [(list(found.ce), list(found.kd))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_alone(dtype):
    data = batch(3, dtype=dtype)
    loss = fused_ce(data["hidden"], data["weight"], data["input_ids"])
    gradients = torch.autograd.grad(3 * loss, (data["hidden"], data["weight"]))
    hidden, weight = (data[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    exact = shifted_ce(hidden @ weight.T, data["input_ids"])
    same(loss, exact, 1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(3 * exact, (hidden, weight)), strict=True):
        same(mine, theirs, 1e-5)
    nothing = fused_ce(data["hidden"], data["weight"], torch.full_like(data["input_ids"], -100))
    assert nothing.item() == 0 and not any(g.any() for g in torch.autograd.grad(nothing, tuple(map(data.get, (
        "hidden", "weight")))))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_bfloat16_cache_moves_the_loss_by_less_than_a_thousandth(name):
    objective = Objective(name, "fixed")
    data = batch(1, sequences=32, length=65, dtype=torch.float32)
    exact, _, _, _ = reference(objective, data, [(True, True)], [(0.5, 0.5)])
    small = {k: v.bfloat16() if k in ("states", "head") else v for k, v in data.items()}
    found, _ = computed(objective, small, [(True, True)], [(0.5, 0.5)])
    assert found.loss.item() == pytest.approx(exact.item(), rel=1e-3)


def test_norms_are_those_of_the_gradients_in_the_logits():
    objective, data = Objective("forward_kl", "gradient_norm", micro_batches=2), batch(5)
    asked = []

    def weigh(ce, kd, norms):
        asked.extend(norms)
        return [(0.5, 0.5)] * 2

    computed(objective, data, [(True, True)] * 2, weigh, norms=True)
    logits = (data["hidden"] @ data["weight"].T).detach().requires_grad_()
    teacher = data["states"] @ data["head"].T
    losses = micro_losses(objective, logits, teacher, data["input_ids"], [(True, True)] * 2, pad=0)
    for side, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        expected = gradient.unflatten(0, (2, -1)).flatten(1).norm(dim=1).tolist()
        assert [pair[side] for pair in asked] == pytest.approx(expected)


class _Largest(TorchDispatchMode):
    """Notes the most elements of a floating-point tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("looks", [False, True])
def test_no_tensor_holds_the_logits_of_the_batch(looks, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1)
    monkeypatch.setattr(fused, "ROWS", 8)
    monkeypatch.setattr(fused, "KEPT", 0)
    data = batch(0, sequences=16, length=33, dtype=torch.float32)
    weights = (lambda ce, kd, norms: [(0.5, 0.5)]) if looks else [(0.5, 0.5)]
    with _Largest() as seen:
        computed(Objective("jensen_shannon", "fixed"), data, [(True, True)], weights)
    assert 8 * VOCABULARY <= seen.elements <= 16 * 33 * TEACHER < 16 * 33 * VOCABULARY


def test_what_is_covered_and_what_cannot_be_done():
    covered = {name for name in OBJECTIVES if covers(Objective(name))}
    assert covered == set(DIVERGENCES) < set(OBJECTIVES)
    data = batch(0)
    loss = fused_ce(data["hidden"], data["weight"], data["input_ids"])
    with pytest.raises(MomeError, match="differentiated once only"):
        torch.autograd.grad(loss, data["hidden"], create_graph=True)
