"""Cross-entropy and distance from the teacher in one pass over the vocabulary, a chunk of positions at a time.

Logits of a whole batch, [B, T, V], are the largest tensors of a training step: student and teacher, their softmaxes
and the gradients of both losses make six of them and more. Here a chunk of positions goes the whole way, from hidden
states to the gradients in the student's hidden states and output matrix, before the next one begins; what remains
are the gradients. (Computing the gradient in the forward pass, chunk by chunk, is how Liger Kernel treats the
cross-entropy: Hsu et al., arXiv 2410.10989.) So the backward pass of these losses is one multiplication.

It works wherever a loss is a sum over positions of a function of both logits: the cross-entropy and all of
:data:`~mome_utils.divergences.DIVERGENCES`. The release's own losses see whole batches, with masks of their own
(:func:`covers` says no), and so does a mixture, whose experts may have output matrices of their own: both keep to
:func:`~mome_utils.distillation.micro_losses`.

*Weights.* The gradient needs α and β. A rule that looks at the losses of the same step knows them when all chunks
have been seen: then their softmaxes wait, where all together are small (:data:`KEPT`), and are computed a second time
where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mome_utils.config import MomeError
from mome_utils.distillation import Objective
from mome_utils.divergences import DIVERGENCES, log_probabilities, teacher_side
from mome_utils.models import IGNORED, next_tokens

__all__ = ["CHUNK", "KEPT", "FusedLosses", "Head", "Weigh", "covers", "fused_ce", "fused_losses"]

#: Logits of a chunk on a processor (on a GPU 128 times as many), as near as its rows allow, and the fewest rows:
#: products of fewer are slow.
CHUNK, ROWS = 2**20, 128
#: Logits of a batch up to which a rule that looks at the losses finds the softmaxes kept: 16 MB for each side.
KEPT = 2**22

Weigh = Callable[[Sequence[float], Sequence[float], Sequence[Sequence[float]]], Sequence[tuple[float, float]]]
"""(L_LM [m], L_KD [m], both norms of each micro-batch's gradients [m, 2]) → (α, β) [m]."""
Head = Tensor | Callable[[Tensor], Tensor]
"""What makes the teacher's logits: its output matrix [V, D], or a function of rows, [r, D] → [r, V]."""


def covers(objective: Objective) -> bool:
    """Whether an objective's losses are sums over positions, so that chunks can be taken one after the other."""
    return objective.divergence in DIVERGENCES


@dataclass(frozen=True)
class FusedLosses:
    """Losses of a batch of ``m`` micro-batches.

    Attributes:
        loss: the mean over micro-batches of α · L_LM + β · L_KD, [], which can be differentiated once.
        ce, kd: L_LM and L_KD of each in nats per target; 0 where not needed.
        weights: (α, β) of each.
    """

    loss: Tensor
    ce: tuple[float, ...]
    kd: tuple[float, ...]
    weights: tuple[tuple[float, float], ...]


class _Known(torch.autograd.Function):
    """A number whose gradients are already known."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, value: Tensor, by_hidden: Tensor, by_weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(by_hidden, by_weight)
        return value

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        if torch.is_grad_enabled():  # create_graph: second derivatives would be missing, silently
            raise MomeError("Fused losses can be differentiated once only: call backward without create_graph.")
        by_hidden, by_weight = ctx.saved_tensors
        return above * by_hidden, above * by_weight, None, None, None


@dataclass(frozen=True)
class _Chunk:
    """Some positions of one micro-batch: their losses, and what their gradient is made of.

    Attributes:
        ce, kd: [r] of each position; ``kd`` is 0 without a teacher.
        q: [r, V] probabilities of the student at temperature 1.
        p: [r, V] of the teacher where the gradient of L_KD in the logits is q − p. kd_slope: that gradient elsewhere.
        targets: [r, 1].
    """

    ce: Tensor
    kd: Tensor
    q: Tensor
    p: Tensor | None
    kd_slope: Tensor | None
    targets: Tensor

    def slope(self, alpha: float, beta: float) -> Tensor:
        """∂(α · ce + β · kd) / ∂ logits, [r, V], for α + β = 1: a tensor of its own."""
        if self.p is not None:
            slope = torch.sub(self.q, self.p, alpha=beta)
        elif self.kd_slope is not None:
            slope = (self.q * alpha).add_(self.kd_slope, alpha=beta)
        else:
            slope = self.q * alpha
        return slope.scatter_add_(-1, self.targets, slope.new_full(self.targets.shape, -alpha))


def _chunk(logits: Tensor, teacher: Tensor | None, targets: Tensor, objective: Objective | None) -> _Chunk:
    """Losses of positions from their logits: student and teacher [r, V] in any type, targets [r]."""
    targets = targets.unsqueeze(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if teacher is None or objective is None:
        q, ce, _ = _cross_entropy(wide, targets)
        return _Chunk(ce, torch.zeros_like(ce), q, None, None, targets)
    temperature, found = objective.temperature, DIVERGENCES[objective.divergence]
    if objective.divergence == "soft_ce" and temperature == 1:
        q, ce, log_sum = _cross_entropy(wide, targets)
        p = torch.softmax(teacher, -1, dtype=wide.dtype)
        return _Chunk(ce, log_sum - torch.linalg.vecdot(p, wide), q, p, None, targets)
    log_q = log_probabilities(wide)
    softened = log_q if temperature == 1 else log_probabilities(wide, temperature)
    log_p = teacher_side(objective.divergence, teacher.to(wide.dtype), temperature)
    value = found.default if objective.parameter is None else objective.parameter
    distance, pull = found.rule(log_p, softened, value)
    # Through log softmax, whose derivative takes the mean of the pull away, and through the temperature.
    slope = (softened.exp() * pull.sum(-1, keepdim=True)).sub_(pull).mul_(temperature ** (found.scale - 1))
    ce = -log_q.gather(-1, targets).squeeze(-1)
    return _Chunk(ce, distance * temperature**found.scale, log_q.exp(), None, slope, targets)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax [r, V] of float logits, cross-entropy [r] and log Σ exp [r], with one pass over exp.

    The largest entry and its probability tell the sum, without a loss of digits.
    """
    q = torch.softmax(logits, -1)
    log_sum = (logits.amax(-1) - q.amax(-1).log())
    return q, log_sum - logits.gather(-1, targets).squeeze(-1), log_sum


def fused_ce(hidden: Tensor, weight: Tensor, input_ids: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Next-token cross-entropy, :func:`~mome_utils.models.shifted_ce` of the logits ``hidden @ weight.T``.

    Args:
        hidden: [B, T, H]. weight: [V, H]. input_ids: [B, T]; −100 marks a position that is no target.
        dtype: of the products; ``None`` for that of ``hidden``.
    Returns:
        [] nats per target, which can be differentiated once; 0 where nothing is a target.
    """
    return _losses(None, hidden, weight, None, None, input_ids, [(True, False)], [(1.0, 0.0)], dtype, False).loss


def fused_losses(
    objective: Objective, hidden: Tensor, weight: Tensor, states: Tensor | None, head: Head | None, input_ids: Tensor,
    needs: Sequence[tuple[bool, bool]], weights: Sequence[tuple[float, float]] | Weigh, *,
    dtype: torch.dtype | None = None, norms: bool = False,
) -> FusedLosses:
    """L_LM and L_KD of every micro-batch and the gradient of their weighted mean.

    The same numbers as :func:`~mome_utils.distillation.micro_losses` of the logits.

    Args:
        objective: one that :func:`covers`; ``m`` micro-batches of ``B / m`` sequences each.
        hidden: [B, T, H], the student's last hidden states. weight: [V, H], its output matrix.
        states: [K, T, D], the teacher's last hidden states of the sequences whose micro-batches need L_KD, in order;
            ``None`` where none does. head: [V, D], the teacher's output matrix; or a function that makes logits of
            rows of ``states``, whatever they hold: [r, D] → [r, V], any floating type.
        input_ids: [B, T]; −100 marks a position that is no target.
        needs: (L_LM, L_KD) for each micro-batch: whether it is computed.
        weights: (α, β) for each micro-batch, or a function that finds them once the losses are known.
        dtype: of the student's products; ``None`` for that of ``hidden``. The teacher's is that of ``states``.
        norms: whether that function wants the Euclidean norms of the two losses' gradients in the logits (else 0).
    """
    return _losses(objective, hidden, weight, states, head, input_ids, needs, weights, dtype, norms)


@torch.no_grad()
def _gradients(
    objective: Objective | None, hidden: Tensor, weight: Tensor, states: Tensor | None, head: Head | None,
    input_ids: Tensor, needs: Sequence[tuple[bool, bool]], weights: Sequence[tuple[float, float]] | Weigh,
    dtype: torch.dtype | None, norms: bool,
) -> tuple[Tensor, Tensor, Tensor, list[list[float]], Sequence[tuple[float, float]]]:
    """The loss [], its gradients in hidden and weight, the losses [2][m] and the weights [m]."""
    narrow = hidden.dtype if dtype is None else dtype
    parts, small = len(needs), weight.to(narrow)
    flat, targets = (x.unflatten(0, (parts, -1)).flatten(1, 2) for x in (hidden, next_tokens(input_ids)))
    scored = targets != IGNORED
    share = scored / scored.sum(1, keepdim=True).clamp(min=1)  # a mean over targets is a sum of these shares
    taught = [i for i, (_, kd) in enumerate(needs) if kd]
    known = None if states is None else states.unflatten(0, (len(taught), -1)).flatten(1, 2)
    by_hidden, by_weight = torch.zeros_like(flat), torch.zeros_like(weight)
    wide = torch.promote_types(narrow, torch.float32)
    sums, squares = (torch.zeros(2, parts, dtype=wide, device=hidden.device) for _ in range(2))
    each = max(ROWS, (CHUNK if hidden.device.type == "cpu" else 128 * CHUNK) // len(weight))
    places = [slice(start, start + each) for start in range(0, flat.shape[1], each)]

    def chunk(part: int, rows: slice) -> _Chunk:
        teacher = None
        if needs[part][1] and known is not None and head is not None:
            kept = known[taught.index(part), rows]
            teacher = kept @ head.to(known.dtype).T if isinstance(head, Tensor) else head(kept)
        logits = flat[part, rows].to(narrow) @ small.T
        return _chunk(logits, teacher, targets[part, rows].clamp(min=0), objective)

    def measure(part: int, rows: slice, piece: _Chunk) -> None:
        for side, losses in enumerate((piece.ce, piece.kd)):
            if needs[part][side]:
                # A position without target may hold an infinite distance: 0 · ∞ must not enter the sum.
                sums[side, part] += torch.where(scored[part, rows], losses, 0) @ share[part, rows].to(wide)
                if norms:
                    lengths = piece.slope(1.0 - side, float(side)).square_().sum(-1)
                    squares[side, part] += torch.where(scored[part, rows], lengths * share[part, rows] ** 2, 0).sum()

    def learn(part: int, rows: slice, piece: _Chunk, weigh: tuple[float, float]) -> None:
        alpha, beta = (value / parts if need else 0.0 for value, need in zip(weigh, needs[part], strict=True))
        if alpha == beta == 0:
            return
        # The weights of a position multiply vectors as wide as the model, not as the vocabulary.
        scale = (alpha + beta) * share[part, rows].unsqueeze(-1)
        slope = piece.slope(alpha / (alpha + beta), beta / (alpha + beta)).to(narrow)
        by_hidden[part, rows] = torch.where(scale > 0, (slope @ small) * scale, 0)
        by_weight.add_(slope.T @ (flat[part, rows] * scale).to(narrow))

    every = [(part, rows) for part in range(parts) for rows in places if any(needs[part])]
    keep = callable(weights) and flat.shape[0] * flat.shape[1] * len(weight) <= KEPT
    waiting = {}
    for part, rows in every:
        piece = chunk(part, rows)
        measure(part, rows, piece)
        if keep:
            waiting[part, rows.start] = piece
        elif not callable(weights):
            learn(part, rows, piece, weights[part])
    values: list[list[float]] = torch.cat([sums, squares.sqrt()]).tolist()  # the one read of the device
    found = weights(values[0], values[1], list(zip(*values[2:], strict=True))) if callable(weights) else weights
    if callable(weights):
        for part, rows in every:
            piece = waiting.pop((part, rows.start)) if keep else chunk(part, rows)
            learn(part, rows, piece, found[part])
    loss = math.fsum(a * c + b * k for (a, b), c, k in zip(found, *values[:2], strict=True)) / parts
    return sums.new_tensor(loss), by_hidden.view_as(hidden), by_weight, values[:2], found


def _losses(
    objective: Objective | None, hidden: Tensor, weight: Tensor, states: Tensor | None, head: Head | None,
    input_ids: Tensor, needs: Sequence[tuple[bool, bool]], weights: Sequence[tuple[float, float]] | Weigh,
    dtype: torch.dtype | None, norms: bool,
) -> FusedLosses:
    """What both public functions do; arguments as in :func:`fused_losses`."""
    loss, by_hidden, by_weight, values, chosen = _gradients(
        objective, hidden, weight, states, head, input_ids, needs, weights, dtype, norms
    )
    return FusedLosses(
        _Known.apply(hidden, weight, loss, by_hidden, by_weight), tuple(values[0]), tuple(values[1]), tuple(chosen)
    )
