"""The error of caches of k tokens: against plain formulas, how it falls with k, and what is bias and what is noise."""

from __future__ import annotations

import math

import pytest
import torch

from mome_utils import top_k
from mome_utils.config import MomeError
from mome_utils.distillation import Objective
from mome_utils.top_k import SparseCache
from mome_utils.top_k_errors import STATES, cache_errors, caches

V, WIDTH = 40, 8


def both(seed: int = 0, blocks: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, T, V] of a teacher and of a student that is near it, and ids of which some are no targets."""
    drawn = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(blocks, length, V, generator=drawn)
    ids = torch.randint(0, V, (blocks, length), generator=drawn)
    ids[:, 4] = -100
    return teacher, teacher + torch.randn(blocks, length, V, generator=drawn), ids


def test_the_error_falls_with_k_and_is_rounding_where_all_tokens_are_kept():
    teacher, student, ids = both()
    table = cache_errors(teacher, student, ids, width=WIDTH, chosen=caches(V, (1, 2, 4, 8, 16, 32)))
    for kind in ("smoothed", "truncated"):
        rows = table[table["kind"] == kind]
        assert list(rows["k"]) == [1, 2, 4, 8, 16, 32, V]
        for column in ("loss_error", "gradient_error", "shared_error"):
            assert rows[column].abs().is_monotonic_decreasing, (kind, column)
        assert rows["mass"].is_monotonic_increasing and rows["mass"].iloc[-1] == pytest.approx(1)
        assert rows["gradient_error"].iloc[-1] < 2e-3 and abs(rows["loss_error"].iloc[-1]) < 2e-3
    wide = table.pivot(index="k", columns="kind", values="gradient_error").loc[[1, 2, 4, 8, 16, 32]]
    assert (wide["smoothed"] < wide["truncated"]).all(), "a spread tail is nearer than none"
    assert list(table["bytes"]) == [4 * k if kind != "sampled" else 2 * k for kind, k in zip(
        table["kind"], table["k"], strict=True)]
    assert list(table["of_states"] * 2 * WIDTH) == list(table["of_logits"] * 2 * V) == list(table["bytes"])


def test_one_row_by_hand(monkeypatch):
    monkeypatch.setattr(top_k, "CHUNK", 8 * V * 5)  # several chunks
    teacher, student, ids = both(1)
    k = 5
    row = cache_errors(teacher, student, ids, width=WIDTH, chosen=[SparseCache(k)]).iloc[0]
    kept = torch.zeros(ids.shape, dtype=torch.bool)
    kept[:, :-1] = ids[:, 1:] != -100
    p, q = teacher.double().softmax(-1)[kept], student.double().softmax(-1)[kept]
    order = p.argsort(-1, descending=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(V).expand_as(order))
    mass = torch.where(rank < k, p, 0).sum(-1, keepdim=True)
    spread = torch.where(rank < k, p, (1 - mass) / (V - k))
    assert row["mass"] == pytest.approx(mass.mean().item())
    assert row["loss_error"] == pytest.approx(((p - spread) * q.log()).sum(-1).mean().item(), abs=2e-3)
    assert row["gradient_error"] == pytest.approx(((p - spread).norm() / (q - p).norm()).item(), rel=1e-2)
    assert row["shared_error"] == pytest.approx(
        ((p - spread).mean(0).norm() / (q - p).mean(0).norm()).item(), rel=1e-2)


def test_only_draws_lose_their_error_in_the_mean():
    """Over many positions of one distribution, the error of draws shrinks as 1 / √n and that of the top k stays."""
    teacher, student, _ = both(2)
    n = 4000
    many = [x[:1, :1].expand(1, n + 1, V) for x in (teacher, student)]
    ids = torch.zeros(1, n + 1, dtype=torch.long)
    chosen = [SparseCache(6, kind) for kind in top_k.KINDS]
    rows = cache_errors(*many, ids, width=WIDTH, chosen=chosen).set_index("kind")
    shrunk = rows["shared_error"] / rows["gradient_error"]
    assert shrunk["smoothed"] == pytest.approx(1) and shrunk["truncated"] == pytest.approx(1)
    assert 0.5 < shrunk["sampled"] * math.sqrt(n) < 2
    assert abs(rows.loc["sampled", "loss_error"]) < 0.1 * abs(rows.loc["truncated", "loss_error"])


def test_the_row_of_the_hidden_states_and_objectives_that_a_cache_cannot_give():
    teacher, student, ids = both(3)
    table = cache_errors(teacher, student, ids, width=WIDTH, rebuilt=teacher, objective=Objective("reverse_kl"))
    last = table.iloc[-1]
    assert (last["kind"], last["k"], last["bytes"], last["of_states"]) == (STATES, V, 2 * WIDTH, 1)
    assert abs(last["loss_error"]) < 1e-12 and last["gradient_error"] < 1e-12
    assert set(table["kind"]) == {"smoothed", "truncated", STATES}
    assert list(table.loc[table["kind"] == "truncated", "k"]) == [V], "truncated to fewer, reverse KL is infinite"
    with pytest.raises(MomeError, match="reverse_kl is infinite"):
        cache_errors(teacher, student, ids, width=WIDTH, chosen=[SparseCache(3, "truncated")],
                     objective=Objective("reverse_kl"))
