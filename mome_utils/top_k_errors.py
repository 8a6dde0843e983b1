"""What a cache of k tokens costs: how far losses and gradients are from those of the teacher's whole distribution."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from mome_utils.distillation import Objective
from mome_utils.divergences import divergence
from mome_utils.models import IGNORED, next_tokens
from mome_utils.top_k import KINDS, SparseCache, SparseHead, encode, pack, row_chunks

__all__ = ["STATES", "cache_errors", "caches"]

#: The kind of the row that stands for the study's own cache, the hidden states.
STATES = "hidden states"


def caches(vocabulary: int, ks: Sequence[int] = (1, 8, 32, 128, 512)) -> tuple[SparseCache, ...]:
    """Each kind of cache with each of ``ks`` below V; and the top-k kinds with all V tokens."""
    found = [SparseCache(k, kind) for kind in KINDS for k in ks if k < vocabulary]
    return (*found, *(SparseCache(vocabulary, kind) for kind in KINDS if kind != "sampled"))


def cache_errors(
    teacher: Tensor, student: Tensor, input_ids: Tensor, *, width: int, chosen: Sequence[SparseCache] | None = None,
    rebuilt: Tensor | None = None, objective: Objective | None = None, seed: int = 0,
) -> pd.DataFrame:
    """The error of caches on some sequences, against the exact teacher in float64.

    Args:
        teacher, student: logits [B, T, V], any floating type; the teacher's are the exact ones.
        input_ids: [B, T]; −100 marks a position that is no target.
        width: H, of the teacher's hidden states, with which the sizes are compared.
        chosen: the caches; by default :func:`caches`, but for those from which the objective cannot be computed.
        rebuilt: the teacher's logits as they come back from its cached hidden states, for a row STATES.
        objective: whose divergence, temperature and parameter L_KD has; one of ``DIVERGENCES``.
        seed: of the draws of ``sampled`` caches.
    Returns:
        One row per cache: ``kind, k``; ``mass``, the teacher's probability of the tokens kept (distinct ones, where
        they are drawn); ``bytes`` per token, and ``of_states`` and ``of_logits``, how many times those of bfloat16
        hidden states and of bfloat16 logits that is; ``loss_error``, cached minus exact L_KD in nats per target;
        ``gradient_error``, the Euclidean distance between both gradients of L_KD in the student's logits, over the
        length of the exact one; and ``shared_error``, the same after the mean over positions, where errors that
        differ from position to position cancel and a bias stays.
    Raises:
        MomeError: for a cache that the objective cannot be computed from.
    """
    goal, vocabulary = Objective() if objective is None else objective, teacher.shape[-1]
    if chosen is None:
        chosen = tuple(cache for cache in caches(vocabulary) if not cache.refusal(goal, vocabulary))
    for cache in chosen:
        cache.check(goal, vocabulary)
    kept = next_tokens(input_ids) != IGNORED
    exact, learner = teacher[kept], student[kept]
    device = exact.device
    draws = [torch.Generator(device).manual_seed(seed) for _ in chosen]
    sums = [_Sums(vocabulary, device) for _ in range(len(chosen) + (rebuilt is not None))]
    whole = _Sums(vocabulary, device)
    for rows in row_chunks(len(exact), 8 * vocabulary):  # float64, and some tensors of it at once
        log_p = exact[rows].double().log_softmax(-1)
        loss, gradient = _loss(goal, learner[rows], log_p)
        whole.add(torch.ones_like(loss), loss, gradient)
        for cache, draw, found in zip(chosen, draws, sums, strict=False):
            parts = encode(log_p, cache, draw)
            named = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, parts["indices"].long(), True)
            back = _loss(goal, learner[rows], SparseHead(cache, vocabulary)(pack(parts)))
            found.add((log_p.exp() * named).sum(-1), back[0] - loss, back[1] - gradient)
        if rebuilt is not None:
            back = _loss(goal, learner[rows], rebuilt[kept][rows])
            sums[-1].add(torch.ones_like(loss), back[0] - loss, back[1] - gradient)
    names = [(cache.kind, cache.k, cache.bytes_per_token(vocabulary)) for cache in chosen]
    table = pd.DataFrame([
        {
            "kind": kind, "k": k, "mass": found.mass / len(exact), "bytes": size, "of_states": size / (2 * width),
            "of_logits": size / (2 * vocabulary), "loss_error": found.loss / len(exact),
            "gradient_error": (found.squares / whole.squares) ** 0.5,
            "shared_error": float(found.gradient.norm() / whole.gradient.norm()),
        }
        for (kind, k, size), found in zip([*names, (STATES, vocabulary, 2 * width)], sums, strict=False)
    ])
    return table


class _Sums:
    """Sums over positions: mass, loss, squared lengths of gradients, and the gradients themselves, [V]."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.mass = self.loss = self.squares = 0.0
        self.gradient = torch.zeros(vocabulary, dtype=torch.float64, device=device)

    def add(self, mass: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Some more positions: [r], [r] and [r, V]."""
        self.mass += mass.sum().item()
        self.loss += loss.sum().item()
        self.squares += gradient.square().sum().item()
        self.gradient += gradient.sum(0)


def _loss(objective: Objective, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """L_KD [r] of logits [r, V] in float64, and its gradient [r, V] in the student's."""
    with torch.enable_grad():
        logits = student.detach().double().requires_grad_()
        value = divergence(
            objective.divergence, logits, teacher.double(), objective.temperature, objective.parameter
        )
        (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient
