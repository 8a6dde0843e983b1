"""Replay, Fisher diagonals and pulls against their definitions, on tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mome_utils.config import MomeError, Shape
from mome_utils.continual_methods import Pull, fisher_diagonal, flat_like, replayed, summed, with_replay
from mome_utils.models import build_gpt2
from mome_utils.schedules import schedule

torch.set_num_threads(1)


@given(st.integers(2, 4), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_replay_keeps_its_share_exactly(stages, steps, batch, share):
    lengths = {f"l{i}": 5 + 3 * i for i in range(stages)}
    order = schedule("sequential", lengths, steps=steps * stages, batch_size=batch, seed=1)
    mixed = with_replay(order, stages, share, seed=1)
    wanted = round(share * steps * batch)
    assert list(replayed(mixed, stages)) == [0] + [wanted] * (stages - 1)
    assert mixed.shape == order.shape
    old, new = order.reshape(stages, -1, 2), mixed.reshape(stages, -1, 2)
    for stage in range(1, stages):
        kept = new[stage, :, 0] == stage
        assert (new[stage][kept] == old[stage][kept]).all()  # what is not replayed stays in its place
        shown = {tuple(pair) for pair in old[:stage].reshape(-1, 2)}
        assert {tuple(pair) for pair in new[stage][~kept]} <= shown  # only what earlier stages showed
        counts = np.bincount(new[stage][~kept][:, 0], minlength=stage)
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(mixed, with_replay(order, stages, share, seed=1))


def test_replayed_sequences_are_spread_over_the_stage_and_not_repeated_early():
    order = schedule("sequential", {"a": 40, "b": 40}, steps=20, batch_size=4, seed=0)
    mixed = with_replay(order, 2, 0.25, seed=0).reshape(2, 40, 2)
    places = np.flatnonzero(mixed[1, :, 0] == 0)
    assert list(places) == list(range(0, 40, 4))
    assert len(np.unique(mixed[1, places], axis=0)) == len(places)


def test_a_share_that_is_none_is_refused():
    order = schedule("sequential", {"a": 4, "b": 4}, steps=4, batch_size=2, seed=0)
    with pytest.raises(MomeError, match="share of replayed sequences"):
        with_replay(order, 2, 1.0, seed=0)
    with pytest.raises(MomeError, match="cannot be cut into 3"):
        with_replay(order, 3, 0.1, seed=0)


@pytest.fixture(scope="module")
def model():
    return build_gpt2(Shape(1, 8, 2), vocab_size=7, block_size=6, seed=3, bos=0, eos=1).eval()


def test_the_fisher_diagonal_is_the_mean_square_of_per_example_gradients(model):
    """Against gradients of one position at a time, with the tokens that the same generator draws."""
    ids = torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(0))
    found = fisher_diagonal(model, ids, seed=11)
    generator = torch.Generator().manual_seed(11)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sequence in ids:
        gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        with torch.no_grad():
            probabilities = model(input_ids=sequence[None]).logits[0, :-1].softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        for position, token in enumerate(drawn):
            model.zero_grad()
            model(input_ids=sequence[None]).logits[0, position].log_softmax(-1)[token].backward()
            for name, parameter in model.named_parameters():
                gradient[name] += parameter.grad
        for name, value in gradient.items():
            expected[name] += value**2 / (len(ids) * 5)
    model.zero_grad()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_the_drawn_fisher_estimates_the_exact_one(model):
    """The exact diagonal of one sequence: expectation over every token at every position."""
    ids = torch.randint(0, 7, (1, 6), generator=torch.Generator().manual_seed(1))
    exact = torch.zeros_like(model.transformer.ln_f.weight)
    logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    for row in logs:
        for token in range(7):
            (slope,) = torch.autograd.grad(row[token], model.transformer.ln_f.weight, retain_graph=True)
            exact += row[token].exp().detach() * slope**2 / 5
    drawn = fisher_diagonal(model, ids.expand(700, -1), seed=0)["transformer.ln_f.weight"]
    torch.testing.assert_close(drawn, exact, rtol=0.2, atol=float(exact.max()) * 0.03)


def test_a_pull_is_zero_at_its_anchor_and_a_parabola_beside_it(model):
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    fisher = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) for name, p in anchor.items()}
    pull = Pull(anchor, fisher, strength=3.0)
    assert pull.penalty(model).item() == 0
    moved = build_gpt2(Shape(1, 8, 2), vocab_size=7, block_size=6, seed=4, bos=0, eos=1)
    expected = 1.5 * sum((fisher[n] * (p.detach() - anchor[n]) ** 2).sum().item() for n, p in moved.named_parameters())
    assert pull.penalty(moved).item() == pytest.approx(expected, rel=1e-4)
    pull.penalty(moved).backward()
    name, parameter = next(iter(moved.named_parameters()))
    torch.testing.assert_close(parameter.grad, 3 * fisher[name] * (parameter.detach() - anchor[name]))


def test_a_flat_diagonal_keeps_the_trace_and_sums_add_up():
    fisher = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[2.0]])}
    flat = flat_like(fisher)
    assert {name: value.shape for name, value in flat.items()} == {n: v.shape for n, v in fisher.items()}
    assert all((value == 2).all() for value in flat.values())
    both = summed([fisher, fisher])
    assert both["a"].tolist() == [2, 6] and fisher["a"].tolist() == [1, 3]
