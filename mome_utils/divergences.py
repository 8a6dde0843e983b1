"""Divergences between a teacher's and a student's next-token distributions, as meant and as released.

With p the teacher's distribution, q the student's and v over the vocabulary, in nats per position; each entry of
:data:`DIVERGENCES` says what it is. The teacher is a constant. Each rule below returns the value and the *pull* on
log q, its negative derivative, written out, so that the backward pass is one product. All stays in log space.

*Temperature.* T softens both sides, softmax(logits / T); the value is then multiplied by T**scale, which keeps the
size of the gradient in the logits (Hinton et al., arXiv 1503.02531, section 2). For T → ∞ the values tend to
c · Var_v(student − teacher logits), c = ½ for both KL, ½ · β · (1 − β) for Jensen-Shannon, ½ · (1 − λ)² for the
skewed ones; total variation to half the mean absolute deviation; ``soft_ce`` to forward KL's plus T² · entropy of p.

*Tokens that a side rules out* (a logit of −inf). 0 · log 0 is 0. Where both sides rule a token out, it adds 0 to the
value and to the gradient. Where only the student does, ``soft_ce`` and ``forward_kl`` are +inf (their gradient in
the logits stays finite); where only the teacher does, ``reverse_kl`` is +inf and its gradient not finite, unless
the gradient from above is 0: a position that is masked afterwards gets a gradient of 0. The others stay finite.

*Accuracy.* Relative 1e-10 in float64 and 1e-5 in float32. Where both sides nearly agree the value is a small
difference of rounded log-probabilities: then absolute 1e-14 and 1e-6 nats, times T**scale.

Names that begin with ``published_`` follow the code of the MoME release (ModMaamari/mixture-modular-experts), with
its masking, reduction and label alignment. They take whole batches and return one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mome_utils.config import MomeError
from mome_utils.models import IGNORED, next_tokens

Rule = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(log p [..., V], log q [..., V], parameter) → value [...] and pull = −∂ value / ∂ log q [..., V]."""

TEMPERATURES = (1e-6, 1e6)
"""The smallest and the largest temperature: beyond them float32 has no digits left for the result."""


def _probabilities(log_p: Tensor) -> Tensor:
    """exp(log p), also of a log p that is not normalised. By softmax, whose kernel is twice as fast as exp's."""
    return log_p.softmax(-1)


def _weighted(log_w: Tensor, w: Tensor, values: Tensor, minus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Terms w · (values − minus) [..., V] and their sum [...]; a term of weight 0 is 0, whatever its value.

    The guard costs passes over [..., V], so it runs only where the plain sums are not finite. There, ``log_w`` tells
    a weight that is 0 from one too small for the dtype, whose product with ∞ is ∞.
    """
    terms = w * values if minus is None else (values - minus).mul_(w)
    total = terms.sum(-1)
    if not bool(torch.isfinite(total).all()):
        values = values if minus is None else values - minus
        terms = (w.clamp(min=torch.finfo(w.dtype).tiny) * values).masked_fill_(log_w == -math.inf, 0)
        total = terms.sum(-1)
    return terms, total


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 − share) · q), for a share strictly between 0 and 1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _soft_ce(log_p: Tensor, log_q: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p = _probabilities(log_p)
    return _weighted(log_p, p, log_q)[1].neg_(), p


def _forward_kl(log_p: Tensor, log_q: Tensor, _: float) -> tuple[Tensor, Tensor]:
    p = _probabilities(log_p)
    return _weighted(log_p, p, log_p, log_q)[1].clamp_(min=0), p


def _reverse_kl(log_p: Tensor, log_q: Tensor, _: float) -> tuple[Tensor, Tensor]:
    q = _probabilities(log_q)
    terms, total = _weighted(log_q, q, log_p, log_q)
    return total.neg_().clamp_(min=0), terms.sub_(q)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, beta)
    _, from_p = _weighted(log_p, _probabilities(log_p), log_m, log_p)
    terms, from_q = _weighted(log_q, _probabilities(log_q), log_m, log_q)
    # What m adds to the derivative cancels between the two sums.
    return (beta * from_p + (1 - beta) * from_q).neg_().clamp_(min=0), terms.mul_(1 - beta)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, skew)
    p = _probabilities(log_p)
    _, value = _weighted(log_p, p, log_p, log_m)
    share = (log_q - log_m).add_(math.log1p(-skew)).exp_()  # (1 − λ) · q / m
    return value.clamp_(min=0), _weighted(log_p, p, share)[0]


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_q, log_p, skew)
    q = _probabilities(log_q)
    terms, total = _weighted(log_q, q, log_m, log_q)
    share = (log_q - log_m).add_(math.log(skew)).exp_()  # λ · q / m
    return total.neg_().clamp_(min=0), terms.sub_(q).add_(_weighted(log_q, q, share)[0])


def _total_variation(log_p: Tensor, log_q: Tensor, _: float) -> tuple[Tensor, Tensor]:
    q = _probabilities(log_q)
    gap = _probabilities(log_p).sub_(q)
    pull = gap.sign().mul_(q).mul_(0.5)
    return gap.abs_().sum(-1).mul_(0.5), pull


class _WithPull(torch.autograd.Function):
    """A rule's value, whose backward pass multiplies the pull that the rule has already computed."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, log_p: Tensor, log_q: Tensor, parameter: float) -> Tensor:
        value, pull = rule(log_p, log_q, parameter)
        ctx.save_for_backward(pull)
        ctx.finite = bool(torch.isfinite(value).all())
        return value

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[None, None, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph: the pull's own derivative would be missing, silently
            raise MomeError("A divergence can be differentiated once only: call backward without create_graph.")
        (pull,) = ctx.saved_tensors
        above = above.neg().unsqueeze(-1)
        gradient = above * pull
        return None, None, gradient if ctx.finite else torch.where(above == 0, 0, gradient), None


# ----------------------------------------------------------------------------------------- the divergences


@dataclass(frozen=True)
class Divergence:
    """What a student can be drawn to its teacher by.

    Attributes:
        name: its key in DIVERGENCES.
        compute: function(log p of the teacher [..., V], log q of the student [..., V], parameter) → [...] nats, of
            normalised log-probabilities, both float32 or both float64. It can be differentiated once, in log q.
        rule: the same with its pull, without autograd.
        formula: per position, at temperature 1.
        gradient: which direction of which divergence the student's gradient follows.
        range: of the value at temperature 1, in nats.
        source: paper, arXiv id, section.
        scale: the value is multiplied by T**scale.
        parameter: the symbol of its parameter, or ``None``.
        default: of the parameter.
        bounds: of the parameter, which lies strictly between them: at a bound the loss is 0 or another one.
        normalised: whether ``compute`` needs log p normalised; where not, :func:`teacher_side` saves a pass.
    """

    name: str
    compute: Callable[[Tensor, Tensor, float], Tensor]
    rule: Rule
    formula: str
    gradient: str
    range: str
    source: str
    scale: int = 2
    parameter: str | None = None
    default: float = 0.0
    bounds: tuple[float, float] = (0.0, 1.0)
    normalised: bool = True


def _divergence(rule: Rule, name: str, **about: Any) -> Divergence:
    return Divergence(name, partial(_WithPull.apply, rule), rule, **about)


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({d.name: d for d in (
    _divergence(
        _soft_ce, "soft_ce", normalised=False,
        formula="−Σ_v p_v · log q_v",
        gradient="forward KL's, q − p: the teacher's entropy is a constant",
        range="the teacher's entropy … ∞",
        source="Hinton, Vinyals, Dean, arXiv 1503.02531, section 2"),
    _divergence(
        _forward_kl, "forward_kl",
        formula="KL(p ‖ q) = Σ_v p_v · log(p_v / q_v)",
        gradient="forward KL's, q − p: covers every mode of the teacher",
        range="0 … ∞",
        source="Kullback, Leibler 1951; for distillation Hinton, Vinyals, Dean, arXiv 1503.02531, section 2"),
    _divergence(
        _reverse_kl, "reverse_kl",
        formula="KL(q ‖ p) = Σ_v q_v · log(q_v / p_v)",
        gradient="reverse KL's, q · (log(q / p) − KL(q ‖ p)): seeks a mode of the teacher",
        range="0 … ∞",
        source="Gu, Dong, Wei, Huang (MiniLLM), arXiv 2306.08543, section 2"),
    _divergence(
        _jensen_shannon, "jensen_shannon", parameter="β", default=0.5,
        formula="β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = β · p + (1 − β) · q",
        gradient="between both: towards β = 0 it nears β times forward KL's, towards β = 1 (1 − β) times reverse KL's",
        range="0 … −β · ln β − (1 − β) · ln(1 − β), which is ln 2 at β = ½",
        source="Agarwal et al. (GKD), arXiv 2306.13649, section 2; Lin 1991"),
    _divergence(
        _skew_forward_kl, "skew_forward_kl", parameter="λ", default=0.1,
        formula="KL(p ‖ λ · p + (1 − λ) · q)",
        gradient="forward KL's pull at each token times (1 − λ) · q / m: weaker where the student has given up",
        range="0 … −ln λ",
        source="Ko, Kim, Chen, Yun (DistiLLM), arXiv 2402.03898, section 3.1; Lee 2001"),
    _divergence(
        _skew_reverse_kl, "skew_reverse_kl", parameter="λ", default=0.1,
        formula="KL(q ‖ (1 − λ) · p + λ · q)",
        gradient="reverse KL's against a teacher mixed with the student: seeks a mode, but is bounded",
        range="0 … −ln λ",
        source="Ko, Kim, Chen, Yun (DistiLLM), arXiv 2402.03898, section 3.1; Lee 2001"),
    _divergence(
        _total_variation, "total_variation", scale=1,
        formula="½ · Σ_v |p_v − q_v|",
        gradient="neither KL's: the sign of q − p, weighted by q; 0 at a token where both are equal",
        range="0 … 1",
        source="Wen, Li, Du, Mou (f-distill), arXiv 2307.15190"),
)})
"""Name → divergence."""


def check_settings(name: str, temperature: float = 1.0, parameter: float | None = None) -> float:
    """Check a choice of divergence before any work starts; arguments as in :func:`divergence`.

    Returns:
        The parameter to compute with.
    Raises:
        MomeError: for a name, temperature or parameter that cannot be.
    """
    if name not in DIVERGENCES:
        raise MomeError(f"Unknown divergence {name!r}: choose one of {', '.join(DIVERGENCES)}.")
    _check_temperature(temperature)
    chosen = DIVERGENCES[name]
    if parameter is None:
        return chosen.default
    if chosen.parameter is None:
        raise MomeError(f"{name} has no parameter: leave {parameter} out.")
    low, high = chosen.bounds
    if not low < parameter < high:
        raise MomeError(
            f"The parameter {chosen.parameter} of {name} must lie strictly between {low:g} and {high:g}, "
            f"not {parameter}: choose it so."
        )
    return parameter


def _check_temperature(temperature: float) -> None:
    low, high = TEMPERATURES
    if not low <= temperature <= high:  # also refuses nan
        raise MomeError(
            f"The temperature must be a positive number from {low:g} to {high:g}, not {temperature}: choose it so."
        )


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / T up to a constant per row, in float64 where they are, else in float32."""
    _check_temperature(temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 1:
        return logits
    if math.frexp(temperature)[0] == 0.5:  # a power of two divides without rounding
        return logits / temperature
    # First the shift, then the division: rounding a quotient such as 1e4 / 3 would cost the small digits.
    return (logits - logits.detach().amax(-1, keepdim=True)).div_(temperature)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) over the last dimension, widened before anything is computed.

    Args:
        logits: [..., V], any floating type; every row has a finite value, none is +inf.
        temperature: T, within TEMPERATURES.
    Returns:
        [..., V] nats, float64 for float64, else float32.
    Raises:
        MomeError: for a temperature out of its range.
    """
    return functional.log_softmax(_tempered(logits, temperature), -1)


def teacher_side(name: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`log_probabilities` of the teacher, without gradient, and not normalised where the divergence needs not."""
    make = log_probabilities if DIVERGENCES[name].normalised else _tempered
    return make(logits.detach(), temperature)


def divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, parameter: float | None = None
) -> Tensor:
    """A divergence of :data:`DIVERGENCES` at every position, times T**scale.

    Args:
        name: a key of DIVERGENCES.
        student_logits: [..., V], any floating type.
        teacher_logits: [..., V], any floating type, taken as a constant.
        temperature: T, within TEMPERATURES, of both sides.
        parameter: β or λ, strictly within the divergence's bounds; ``None`` for its default.
    Returns:
        [...] nats (times T**scale), float32, or float64 if either side is.
    Raises:
        MomeError: for unequal shapes, or settings that :func:`check_settings` refuses.
    """
    value = check_settings(name, temperature, parameter)
    if student_logits.shape != teacher_logits.shape:
        raise MomeError(
            f"Logits of student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} must have the "
            "same shape: give both the same positions and vocabulary."
        )
    if torch.float64 in (student_logits.dtype, teacher_logits.dtype):
        student_logits, teacher_logits = student_logits.double(), teacher_logits.double()
    chosen = DIVERGENCES[name]
    log_p = teacher_side(name, teacher_logits, temperature)
    distance = chosen.compute(log_p, log_probabilities(student_logits, temperature), value)
    return distance if temperature == 1 else temperature**chosen.scale * distance


def l1_product(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """The one-student script's loss as meant: ‖p − onehot(y)‖₁ · ‖q − p‖₁ per position, y the *next* token.

    The student learns most where the teacher is wrong. The first factor is computed as 2 · (1 − p_y): the same number.

    Args:
        log_p, log_q: [..., V], log-probabilities of the teacher, a constant, and of the student.
        targets: [...] ids of the next tokens, or −100, which gives 0.
    Returns:
        [...] between 0 and 4.
    """
    at_target = log_p.detach().gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    error = torch.where(targets != IGNORED, -2 * torch.expm1(at_target), 0)
    return error * 2 * DIVERGENCES["total_variation"].compute(log_p, log_q, 0.0)


# ------------- the release's own losses: logits [B, T, V], the teacher's a constant, input ids or labels [B, T]


def published_inverse_kl(student_logits: Tensor, teacher_logits: Tensor, input_ids: Tensor, pad: int) -> Tensor:
    """The release's "inverse KL": the mean of −Σ_v p_v · log q_v, whose gradient is forward KL's.

    All arithmetic is bfloat16 (three digits, in the mean too) at temperature 1 whatever the setting. The mean is
    over the positions whose *input* is not pad: it counts a sequence's last position, which has no target in the
    batch, and leaves out what follows a real </s>, as pad = eos. Tokens that the student rules out count 0, also
    where the teacher does not.

    Returns:
        [] nats per position, a bfloat16 number held in float32; nan where all is padding.
    """
    p = functional.softmax(teacher_logits.detach(), -1, dtype=torch.bfloat16)
    log_q = functional.log_softmax(student_logits, -1, dtype=torch.bfloat16)
    per_position = (p * log_q).masked_fill(torch.isinf(student_logits), 0).sum(-1)
    kept = input_ids != pad
    return (-(per_position * kept).sum() / kept.sum()).float()


def published_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The release's other branch: forward KL at T = 2, times T², summed over time, averaged over sequences.

    ``batchmean`` on [B, T, V] divides by B alone, so the value grows with the context length while the
    cross-entropy it is added to is a mean over positions. The release masks nothing, and neither does this.

    Returns:
        [] nats per sequence (times T²).
    """
    return divergence("forward_kl", student_logits, teacher_logits, 2.0).sum() / student_logits.shape[0]


def published_l1_product(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The one-student script's own loss: Σ_t ‖p_t − onehot(y_t)‖₁ · ‖q_t − p_t‖₁ over the whole batch.

    The labels are *not* shifted: position t is compared with its own input token, not with the next one, as
    released; :func:`l1_product` is what was meant. Labels of −100, which the release cannot take, are left out.

    Returns:
        [] a sum, between 0 and 4 · B · T.
    """
    return l1_product(log_probabilities(teacher_logits.detach()), log_probabilities(student_logits), labels).sum()


def published_ce(student_logits: Tensor, labels: Tensor, pad: int) -> Tensor:
    """The release's language-modelling loss: next-token cross-entropy in which pad is no target.

    As pad = eos, real </s> targets are dropped too, so the student never learns to end a document.

    Returns:
        [] nats per remaining target; nan where none remains.
    """
    targets = next_tokens(labels.masked_fill(labels == pad, IGNORED)).flatten()
    logits = student_logits.flatten(0, 1).to(torch.promote_types(student_logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED)


PUBLISHED: Mapping[str, str] = MappingProxyType({
    "published_inverse_kl": "forward cross-entropy to the teacher in bfloat16, T = 1, mean over inputs other than pad",
    "published_forward_kl": "forward KL at T = 2, times T², summed over time, averaged over sequences, nothing masked",
    "published_l1_product": "the teacher's L1 error times the L1 distance to it, labels not shifted, a plain sum",
    "published_ce": "next-token cross-entropy that ignores pad = eos, so real ends of documents are never learned",
})
"""Name → what the release's code does."""
