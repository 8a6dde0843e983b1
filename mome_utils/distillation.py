"""The objective of a student: cross-entropy of the data and a distance from the teacher, weighted by α and β.

A student minimises  L = α · L_LM + β · L_KD,  where L_LM is the cross-entropy of the data and L_KD one of
:data:`~mome_utils.divergences.DIVERGENCES` or of the release's own losses (Hinton et al., arXiv 1503.02531;
MoME, arXiv 2407.19610). The weights come from one of the rules in :mod:`mome_utils.alpha`.

An optimizer step may consist of several *micro-batches* (gradient accumulation). Since all of them see the same
weights, one pass over the whole batch gives the same gradient: a micro-batch here is a group of sequences whose
losses are averaged, and weighed, apart. Names that begin with ``published_`` follow the release's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mome_utils.alpha import STRATEGIES
from mome_utils.config import MomeError
from mome_utils.divergences import (
    DIVERGENCES,
    check_settings,
    divergence,
    log_probabilities,
    published_ce,
    published_forward_kl,
    published_inverse_kl,
    published_l1_product,
)
from mome_utils.models import IGNORED, next_tokens, shifted_ce

__all__ = ["OBJECTIVES", "Objective", "micro_losses", "shifted_ce", "shifted_divergence"]

#: The release's losses as function(student logits, teacher logits, input ids, pad), all [B, T, ·], to one number.
_PUBLISHED: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = MappingProxyType({
    "published_inverse_kl": published_inverse_kl,
    "published_forward_kl": lambda student, teacher, ids, pad: published_forward_kl(student, teacher),
    "published_l1_product": lambda student, teacher, ids, pad: published_l1_product(student, teacher, ids),
})
#: Everything that L_KD can be.
OBJECTIVES: tuple[str, ...] = (*DIVERGENCES, *_PUBLISHED)


@dataclass(frozen=True)
class Objective:
    """What a student is trained on.

    Attributes:
        divergence: L_KD, one of OBJECTIVES. With one of the release's, L_LM is the release's too.
        alpha: the rule for α, a key of :data:`mome_utils.alpha.STRATEGIES`.
        value: α where the rule holds it fixed, and where an adaptive rule starts; between 0 and 1.
        temperature: T of the divergence; the release's losses have their own.
        parameter: β of ``jensen_shannon``, λ of the skewed divergences; ``None`` for the default.
        micro_batches: equal parts of a batch that are averaged and weighed apart.
    """

    divergence: str = "soft_ce"
    alpha: str = "fixed"
    value: float = 0.5
    temperature: float = 1.0
    parameter: float | None = None
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.divergence in _PUBLISHED:
            if self.temperature != 1 or self.parameter is not None:
                raise MomeError(f"{self.divergence} is as released: it takes neither a temperature nor a parameter.")
        elif self.divergence in DIVERGENCES:
            check_settings(self.divergence, self.temperature, self.parameter)
        else:
            raise MomeError(f"Unknown divergence {self.divergence!r}: choose one of {', '.join(OBJECTIVES)}.")
        if self.alpha not in STRATEGIES:
            raise MomeError(f"Unknown rule for alpha {self.alpha!r}: choose one of {', '.join(STRATEGIES)}.")
        if not (math.isfinite(self.value) and 0 <= self.value <= 1):
            raise MomeError(f"The weight alpha must lie between 0 and 1, not {self.value}: choose it so.")
        if self.micro_batches < 1:
            raise MomeError(f"A batch has one micro-batch or more, not {self.micro_batches}: choose it so.")


def shifted_divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0,
    parameter: float | None = None,
) -> Tensor:
    """A divergence averaged over the positions that :func:`~mome_utils.models.shifted_ce` scores.

    Args:
        name: a key of DIVERGENCES.
        student_logits: [B, T, V].
        teacher_logits: [B, T, V], a constant.
        labels: [B, T]; only their −100 matter here.
        temperature: T > 0.
        parameter: of the divergence, if it has one.
    Returns:
        [] nats per target; 0 where nothing is a target. Ignored positions get no gradient.
    """
    kept = next_tokens(labels) != IGNORED
    per_position = divergence(name, student_logits, teacher_logits, temperature, parameter)
    return torch.where(kept, per_position, 0).sum() / kept.sum().clamp(min=1)


def micro_losses(
    objective: Objective, student_logits: Tensor, teacher_logits: Tensor | None, input_ids: Tensor,
    needs: Sequence[tuple[bool, bool]], *, pad: int,
) -> tuple[Tensor, Tensor]:
    """L_LM and L_KD of every micro-batch of a batch.

    Args:
        objective: what is computed; ``m`` micro-batches of ``B / m`` sequences each.
        student_logits: [B, T, V].
        teacher_logits: [K, T, V], a constant: of the sequences whose micro-batches need L_KD, in order;
            ``None`` where none does.
        input_ids: [B, T].
        needs: (L_LM, L_KD) for each micro-batch: whether it is computed.
        pad: the padding token's id; only the release's losses look at it.
    Returns:
        L_LM [m] and L_KD [m] in nats per target (the release's in their own units); 0 where not needed.
    """
    parts = objective.micro_batches
    student, ids = (x.unflatten(0, (parts, -1)) for x in (student_logits, input_ids))
    with_ce, with_kd = ([i for i, need in enumerate(needs) if need[which]] for which in (0, 1))
    teacher = None if teacher_logits is None else teacher_logits.unflatten(0, (len(with_kd), -1))
    if objective.divergence in _PUBLISHED:
        return _published(objective, student, teacher, ids, with_ce, with_kd, pad)
    targets = next_tokens(input_ids).unflatten(0, (parts, -1))
    kept = targets != IGNORED
    share = kept / kept.sum((1, 2), keepdim=True).clamp(min=1)  # a mean over targets is a sum of these shares
    log_q = log_probabilities(student) if with_ce or objective.temperature == 1 else None
    ce = kd = share.new_zeros(parts)
    if with_ce and log_q is not None:
        chosen = _of(log_q, with_ce).gather(-1, _of(targets, with_ce).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ce = _placed(-(chosen * _of(share, with_ce)).sum((1, 2)), with_ce, parts)
    if with_kd and teacher is not None:
        if objective.temperature != 1 or log_q is None:
            log_q = log_probabilities(student, objective.temperature)
        log_p = log_probabilities(teacher.detach(), objective.temperature)
        found = DIVERGENCES[objective.divergence]
        value = found.default if objective.parameter is None else objective.parameter
        distance = found.compute(log_p, _of(log_q, with_kd), value) * objective.temperature**found.scale
        # A position without target may hold an infinite distance: 0 · ∞ must not enter the sum.
        distance = torch.where(_of(kept, with_kd), distance, 0)
        kd = _placed((distance * _of(share, with_kd)).sum((1, 2)), with_kd, parts)
    return ce, kd


def _published(
    objective: Objective, student: Tensor, teacher: Tensor | None, ids: Tensor, with_ce: Sequence[int],
    with_kd: Sequence[int], pad: int,
) -> tuple[Tensor, Tensor]:
    """The release's losses, one micro-batch after the other, as it computes them. Shapes [m, B / m, T, ·]."""
    parts = len(ids)
    ce = kd = student.new_zeros(parts, dtype=torch.float32)
    if with_ce:
        ce = _placed(torch.stack([published_ce(student[i], ids[i], pad) for i in with_ce]), with_ce, parts)
    if with_kd and teacher is not None:
        loss = _PUBLISHED[objective.divergence]
        values = [loss(student[i], teacher[k], ids[i], pad) for k, i in enumerate(with_kd)]
        kd = _placed(torch.stack(values), with_kd, parts)
    return ce, kd


def _of(tensor: Tensor, parts: Sequence[int]) -> Tensor:
    """The chosen micro-batches of [m, …], without a copy where all are chosen."""
    return tensor if len(parts) == len(tensor) else tensor[list(parts)]


def _placed(values: Tensor, parts: Sequence[int], count: int) -> Tensor:
    """Values of the chosen micro-batches among ``count``, 0 elsewhere: [len(parts)] → [count]."""
    if len(parts) == count:
        return values
    return values.new_zeros(count).index_put((torch.tensor(list(parts), device=values.device),), values)
