"""Distillation: divergences between student and teacher, and rules for the weight α between the two losses.

The objective of a student is  L = α · L_LM + β · L_KD  with β = 1 − α, where L_LM is the cross-entropy of the
data and L_KD a divergence from the teacher's next-token distribution (Hinton et al., arXiv 1503.02531; MoME,
arXiv 2407.19610). With p the teacher's distribution and q the student's, all in nats per position:

=====================  ==============================  =====================================================
name                   formula                         its gradient in the student follows
=====================  ==============================  =====================================================
forward_kl             T² · Σ_v p_v · log(p_v / q_v)   forward KL: covers every mode of the teacher
reverse_kl             T² · Σ_v q_v · log(q_v / p_v)   reverse KL: seeks a mode of the teacher
published_inverse_kl   −Σ_v p_v · log q_v, T = 1       forward KL (the teacher's entropy is a constant)
=====================  ==============================  =====================================================

Names that begin with ``published_`` follow the release of MoME as its code computes it; the others are what
was meant. Everything is a pure function of tensors, except the α rules, whose only state is their loss
history. No gradient ever flows to the teacher.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mome_utils.config import MomeError

IGNORED = -100
"""Label of a position that takes part in no loss (the value used throughout transformers)."""


# ---------------------------------------------------------------------------------------------- divergences


def _dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    """float64 where either side is, else float32: half-precision logits (a teacher's cache) are widened."""
    wide = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    return torch.float64 if wide else torch.float32


def _log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(logits / T) over the last dimension, widened before anything is computed."""
    if temperature != 1:
        logits = logits.to(dtype) / temperature
    return functional.log_softmax(logits, -1, dtype=dtype)


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    """Σ_v weights · values over the last dimension; a term of weight 0 is 0 even if its value is not finite.

    The guard costs two passes over [N, V], so it runs only where a plain product did not give finite sums.
    """
    total = (weights * values).sum(-1)
    if bool(torch.isfinite(total).all()):
        return total
    return (weights * values.masked_fill(weights == 0, 0)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward Kullback-Leibler divergence T² · KL(teacher ‖ student) at every position.

    Both distributions are softmax(logits / T); the factor T² keeps the size of the gradient independent of T
    (Hinton et al., arXiv 1503.02531, section 2). 0 · log 0 is 0; where the teacher is positive and the
    student is zero: +inf.

    Args:
        student_logits: [N, V], any floating type.
        teacher_logits: [N, V], any floating type, taken as a constant.
        temperature: T > 0.
    Returns:
        [N] nats (times T²), float32, or float64 if either side is.
    """
    dtype = _dtype(student_logits, teacher_logits)
    log_p = _log_softmax(teacher_logits.detach(), temperature, dtype)
    log_q = _log_softmax(student_logits, temperature, dtype)
    return temperature**2 * _expectation(log_p.exp(), log_p - log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse Kullback-Leibler divergence T² · KL(student ‖ teacher) at every position.

    What the text of MoME names, and what MiniLLM (Gu et al., arXiv 2306.08543) argues for. Arguments, shapes
    and units as in :func:`forward_kl`; where the student is positive and the teacher is zero: +inf.
    """
    dtype = _dtype(student_logits, teacher_logits)
    log_p = _log_softmax(teacher_logits.detach(), temperature, dtype)
    log_q = _log_softmax(student_logits, temperature, dtype)
    return temperature**2 * _expectation(log_q.exp(), log_q - log_p)


def published_inverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The release's "inverse KL": −Σ_v p_v · log q_v, the cross-entropy of the student under the teacher.

    It differs from forward KL by the teacher's entropy only, so both have the same gradient, q − p. The
    release takes it at temperature 1 whatever the setting, in bfloat16; here the arithmetic is float32.
    Shapes as in :func:`forward_kl`.

    Raises:
        MomeError: for a temperature other than 1.
    """
    if temperature != 1:
        raise MomeError(
            "published_inverse_kl is defined at temperature 1 only: use forward_kl at another temperature."
        )
    dtype = _dtype(student_logits, teacher_logits)
    target = functional.softmax(teacher_logits.detach(), -1, dtype=dtype)
    loss = functional.cross_entropy(student_logits.to(dtype), target, reduction="none")
    if bool(torch.isfinite(loss).all()):
        return loss
    # The fused kernel gives 0 · (−inf) = nan where both sides rule a token out.
    return -_expectation(target, _log_softmax(student_logits, 1.0, dtype))


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = MappingProxyType(
    {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "published_inverse_kl": published_inverse_kl}
)
"""Name → function(student_logits [N, V], teacher_logits [N, V], temperature) → divergence [N]."""


def published_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The release's other branch: forward KL at T = 2, times T², summed over time, averaged over sequences.

    ``batchmean`` on [B, T, V] divides by B alone, so the value grows with the context length while the
    cross-entropy it is added to is a mean over positions. The release masks nothing, and neither does this.

    Args:
        student_logits: [B, T, V].
        teacher_logits: [B, T, V], a constant.
    Returns:
        [] nats per sequence (times T²).
    """
    per_position = forward_kl(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), 2.0)
    return per_position.sum() / student_logits.shape[0]


def published_l1_product(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The one-student script's own loss: Σ_t ‖p_t − onehot(y_t)‖₁ · ‖q_t − p_t‖₁ over the whole batch.

    The labels are *not* shifted: position t is compared with its own input token, not with the next one, as
    released. ‖p − onehot(y)‖₁ is computed as 2 · (1 − p_y), which is the same number. Positions labelled −100
    are left out (the release cannot take them).

    Args:
        student_logits: [B, T, V].
        teacher_logits: [B, T, V], a constant.
        labels: [B, T] token ids, or −100.
    Returns:
        [] a sum, between 0 and 4 · B · T.
    """
    dtype = _dtype(student_logits, teacher_logits)
    p = functional.softmax(teacher_logits.detach(), -1, dtype=dtype)
    q = functional.softmax(student_logits, -1, dtype=dtype)
    kept = labels != IGNORED
    p_label = p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    products = 2 * (1 - p_label) * (q - p).abs().sum(-1)
    return torch.where(kept, products, 0).sum()


# ------------------------------------------------------------------------------- means over a batch of blocks


def _targets(labels: Tensor) -> Tensor:
    """Labels moved one place left, the last position ignored: [B, T] → [B·T].

    Moving the labels and not the logits saves a copy of [B, T, V].
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)


def shifted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, the mean over the positions that have a target.

    Args:
        logits: [B, T, V]; position t predicts label t + 1.
        labels: [B, T] token ids; −100 marks a position that is no target.
    Returns:
        [] nats per target; 0 (with zero gradient) where nothing is a target.
    """
    flat, targets = logits.flatten(0, 1), _targets(labels)
    flat = flat.to(_dtype(flat, flat))
    total = functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def shifted_divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """A divergence of :data:`DIVERGENCES`, averaged over the positions that :func:`shifted_ce` scores.

    Args:
        name: a key of DIVERGENCES.
        student_logits: [B, T, V].
        teacher_logits: [B, T, V], a constant.
        labels: [B, T]; only their −100 matter here.
        temperature: T > 0.
    Returns:
        [] nats per target; 0 where nothing is a target. Ignored positions get no gradient.
    """
    kept = _targets(labels) != IGNORED
    per_position = DIVERGENCES[name](student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), temperature)
    return torch.where(kept, per_position, 0).sum() / kept.sum().clamp(min=1)


# -------------------------------------------------------------------------------------------------- α rules


@dataclass(frozen=True)
class Objective:
    """What a student is trained on: a divergence and a rule for α, the weight of the data's cross-entropy.

    Attributes:
        divergence: a key of DIVERGENCES.
        alpha: a key of STRATEGIES: "fixed", "published_adaptive", "alternating" or "ce".
        value: α when fixed, and the start value when adaptive; between 0 and 1.
        temperature: T of the divergence.
    """

    divergence: str = "published_inverse_kl"
    alpha: str = "fixed"
    value: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise MomeError(
                f"Unknown divergence {self.divergence!r}: choose one of {', '.join(DIVERGENCES)}."
            )
        if self.alpha not in STRATEGIES:
            raise MomeError(f"Unknown rule for alpha {self.alpha!r}: choose one of {', '.join(STRATEGIES)}.")
        if not 0 <= self.value <= 1:
            raise MomeError(f"The weight alpha must lie between 0 and 1, not {self.value}: choose it so.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise MomeError(
                f"The temperature must be a positive number, not {self.temperature}: choose it so."
            )
        if self.divergence == "published_inverse_kl" and self.temperature != 1:
            raise MomeError(
                "published_inverse_kl is defined at temperature 1 only: use forward_kl at another one."
            )


class AlphaStrategy(ABC):
    """A rule that gives the weights (α, β) of cross-entropy and divergence for each optimizer step.

    A new rule is a subclass with ``weights`` and an entry in STRATEGIES; one with memory also has the state
    methods.
    """

    @abstractmethod
    def weights(self, step: int, ce: float, kd: float) -> tuple[float, float]:
        """(α, β) of optimizer step ``step`` (from 0), given the two losses of that step in nats.

        A loss that :func:`needs` does not ask for may be nan.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (nothing to take up by default)
        """Take up the state of another instance of the same rule."""


class FixedAlpha(AlphaStrategy):
    """The same α at every step."""

    def __init__(self, value: float) -> None:
        self.value = value

    def weights(self, step: int, ce: float, kd: float) -> tuple[float, float]:
        return self.value, 1 - self.value


class AlternatingAlpha(AlphaStrategy):
    """Cross-entropy at even optimizer steps, divergence at odd ones: "alternating", truly by step.

    The release switches by micro-batch, so that gradient accumulation mixes both losses in every step.
    """

    def weights(self, step: int, ce: float, kd: float) -> tuple[float, float]:
        return (1.0, 0.0) if step % 2 == 0 else (0.0, 1.0)


def relative_change(losses: Sequence[float]) -> float:
    """d = (last − first) / mean of a window of losses, positive after a rise; 0 where the mean is 0."""
    mean = sum(losses) / len(losses)
    return (losses[-1] - losses[0]) / mean if mean != 0 else 0.0


class PublishedAdaptiveAlpha(AlphaStrategy):
    """The adaptive rule of the MoME release.

    With d the relative change of each loss over the last k entries, w = 1 − clip(d, 0, 1) and α = w_LM /
    (w_LM + w_KD). A loss that falls has w = 1, so α is 0.5 unless one of the two rises; it moves away from
    the loss that rises. Before k entries are known α is its start value; where both w are 0 (undefined in the
    release) it is 0.5. The release fills the history by micro-batch; here an entry is an optimizer step, as k
    is counted.

    Args:
        window: k, at least 2.
        start: α of the first k − 1 steps.
    """

    def __init__(self, window: int, start: float = 0.5) -> None:
        self.window = window
        self.start = start
        self.ce: deque[float] = deque(maxlen=window)
        self.kd: deque[float] = deque(maxlen=window)

    def weights(self, step: int, ce: float, kd: float) -> tuple[float, float]:
        """(α, β), the losses of this step included in the window.

        Raises:
            MomeError: where a loss is not finite: the rule would answer nan from then on.
        """
        if not (math.isfinite(ce) and math.isfinite(kd)):
            raise MomeError(
                f"A loss is not finite at step {step}: lower the learning rate or check the teacher."
            )
        self.ce.append(ce)
        self.kd.append(kd)
        if len(self.ce) < self.window:
            return self.start, 1 - self.start
        w_ce, w_kd = (1 - min(max(relative_change(list(losses)), 0.0), 1.0) for losses in (self.ce, self.kd))
        alpha = w_ce / (w_ce + w_kd) if w_ce + w_kd > 0 else 0.5
        return alpha, 1 - alpha

    def state_dict(self) -> dict[str, Any]:
        return {"ce": list(self.ce), "kd": list(self.kd)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ce = deque(state["ce"], maxlen=self.window)
        self.kd = deque(state["kd"], maxlen=self.window)


STRATEGIES: Mapping[str, Callable[[Objective, int], AlphaStrategy]] = MappingProxyType(
    {
        "fixed": lambda objective, total_steps: FixedAlpha(objective.value),
        "published_adaptive": lambda objective, total_steps: PublishedAdaptiveAlpha(
            max(20, total_steps // 100), objective.value
        ),
        "alternating": lambda objective, total_steps: AlternatingAlpha(),
        "ce": lambda objective, total_steps: FixedAlpha(1.0),
    }
)
"""Name → function(objective, total optimizer steps) → rule; the published window is max(20, steps // 100)."""


def make_alpha(objective: Objective, total_steps: int) -> AlphaStrategy:
    """The α rule of an objective, at its start, for a run of ``total_steps`` optimizer steps."""
    return STRATEGIES[objective.alpha](objective, total_steps)


def needs(objective: Objective, step: int) -> tuple[bool, bool]:
    """Which losses step ``step`` (from 0) computes: (cross-entropy, divergence); others have weight 0."""
    if objective.alpha == "ce":
        return True, False
    if objective.alpha == "alternating":
        return step % 2 == 0, step % 2 == 1
    if objective.alpha == "fixed":
        return objective.value > 0, objective.value < 1
    return True, True
