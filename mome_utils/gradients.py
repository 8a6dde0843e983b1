"""The gradients of the two losses: how far they conflict, how noisy they are, and what alternating makes of them.

For micro-batch i let c_i be the gradient of the cross-entropy and k_i that of the distance from the teacher, in all
P parameters; C and K are their means. Vectors of length P are summed and forgotten: what is kept are inner products,
which add up over groups of parameters, so that the conflict of a layer and of the whole model come from one pass.

One optimizer step over M micro-batches is, with Σ the covariance between micro-batches and tr its trace,

====================  =====================================  ================================================
schedule              mean of the step                       variance of the step (trace)
====================  =====================================  ================================================
combined              α C + β K                              (α² trΣ_c + β² trΣ_k + 2αβ trΣ_ck) / M
alternating by        (C + K) / 2 for even M                 (trΣ_c + trΣ_k) / 2M: each loss sees half of
micro-batch                                                  the data, so nothing of Σ_ck is shared
alternating by step   C or K, (C + K) / 2 over two steps     (trΣ_c + trΣ_k) / 2M, and the swing ‖C − K‖² / 4
====================  =====================================  ================================================

So alternating by micro-batch, as MoME's release does under gradient accumulation, follows the combined loss with
α = ½, with more noise; only alternating by step has an expectation of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mome_utils.config import MomeError
from mome_utils.distillation import Objective, micro_losses

__all__ = [
    "GradientStatistics", "Moments", "by_kind", "by_layer", "conflict", "gradient_statistics", "logits_of",
    "loss_gradients", "step_gradient", "step_noise",
]

WHOLE = "all"
SCHEDULES = ("combined", "alternating_micro", "alternating")

LogitsFn = Callable[[Tensor], Tensor]
"""Token ids [b, T] → logits [b, T, V]."""


def by_layer(name: str) -> str:
    """The layer of a GPT-2 parameter: embedding (tied to the output), positions, block 1 …, final norm."""
    found = re.search(r"\bh\.(\d+)\.", name)
    if found:
        return f"block {int(found[1]) + 1}"
    for part, group in (("wpe", "positions"), ("wte", "embedding"), ("ln_f", "final norm"), ("lm_head", "output")):
        if part in name:
            return group
    return name.split(".")[0]


def by_kind(name: str) -> str:
    """What a GPT-2 parameter belongs to: ``embedding``, ``positions``, ``attention``, ``MLP`` or ``norm``."""
    for part, group in ((".attn.", "attention"), (".mlp.", "MLP"), ("ln_", "norm")):
        if part in name:
            return group
    return by_layer(name)


def logits_of(model: PreTrainedModel) -> LogitsFn:
    """A teacher as a function of token ids, without gradients."""

    def teach(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return teach


# ---------------------------------------------------------------------------------------- gradients and their sums


def _losses(
    model: PreTrainedModel, ids: Tensor, teacher: LogitsFn, objective: Objective, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The two losses [] of one micro-batch [b, T], as training computes them; 0 where not needed."""
    alone = replace(objective, micro_batches=1)
    logits = model(input_ids=ids, use_cache=False).logits
    target = teacher(ids) if needs[1] else None
    ce, kd = micro_losses(alone, logits, target, ids, [needs], pad=int(model.config.eos_token_id))
    return ce[0], kd[0]


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _micro_batches(blocks: Tensor, micro_batch: int) -> Sequence[Tensor]:
    if micro_batch < 1 or len(blocks) < 2 * micro_batch or len(blocks) % micro_batch:
        raise MomeError(
            f"{len(blocks)} blocks cannot be cut into at least two micro-batches of {micro_batch}: give a multiple."
        )
    return blocks.split(micro_batch)


def loss_gradients(
    model: PreTrainedModel, blocks: Tensor, teacher: LogitsFn, objective: Objective, micro_batch: int
) -> Iterator[tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Gradients of both losses for one micro-batch after the other; the model's own ``.grad`` is not touched.

    Args:
        model: the student; its mode (training or evaluation) is left as it is.
        blocks: token ids [m · micro_batch, T].
        teacher: ids → logits.
        objective: says which distance from the teacher; its rule for α plays no part.
        micro_batch: sequences per micro-batch; the losses are means over each.

    Yields:
        The two losses [2] and, for CE and for KD, a gradient per parameter that is learned (tied ones once), in
        the order of ``model.named_parameters()``.

    Raises:
        MomeError: the blocks make fewer than two micro-batches, or unequal ones.
    """
    parameters = list(_learned(model).values())
    for ids in _micro_batches(blocks, micro_batch):
        ce, kd = _losses(model, ids, teacher, objective, (True, True))
        with_ce = torch.autograd.grad(ce, parameters, retain_graph=True, materialize_grads=True)
        with_kd = torch.autograd.grad(kd, parameters, materialize_grads=True)
        yield torch.stack([ce.detach(), kd.detach()]), with_ce, with_kd


def step_gradient(
    model: PreTrainedModel, blocks: Tensor, teacher: LogitsFn, objective: Objective,
    weights: Sequence[tuple[float, float]],
) -> Tensor:
    """The gradient of one optimizer step, accumulated as a trainer does: (1/m) Σ_i ∇(α_i · CE_i + β_i · KD_i).

    Args:
        blocks: token ids [B, T] of the step.
        weights: (α_i, β_i) of each of m equal micro-batches, in order. A loss of weight 0 is not computed.

    Returns:
        [P], flat, in the order of ``model.named_parameters()``.

    Example (the released alternation over 16 micro-batches):
        ``step_gradient(model, blocks, teacher, objective, [(1, 0), (0, 1)] * 8)``
    """
    if not weights or len(blocks) % len(weights):
        raise MomeError(
            f"{len(blocks)} blocks cannot be cut into {len(weights)} equal micro-batches: give a weight for each."
        )
    parameters = list(_learned(model).values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for ids, (alpha, beta) in zip(blocks.split(len(blocks) // len(weights)), weights, strict=True):
        ce, kd = _losses(model, ids, teacher, objective, (alpha != 0, beta != 0))
        loss = (alpha * ce + beta * kd) / len(weights)
        for held, part in zip(total, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True):
            held += part
    return torch.cat([part.flatten() for part in total])


@dataclass(frozen=True)
class Moments:
    """What is known of the two gradients in a group of parameters, as inner products (squares of nats).

    ce, kd, dot: ‖C‖², ‖K‖² and ⟨C, K⟩ of the means over all micro-batches. ce_variance, kd_variance, covariance: the
    traces of Σ_c, Σ_k and Σ_ck between micro-batches (unbiased). micro_batches: m; sequences: of each micro-batch.
    """

    ce: float
    kd: float
    dot: float
    ce_variance: float
    kd_variance: float
    covariance: float
    micro_batches: int
    sequences: int

    def unbiased(self) -> tuple[float, float, float]:
        """‖C‖², ‖K‖² and ⟨C, K⟩ without the noise in them: less the variance of a mean over m micro-batches."""
        pairs = ((self.ce, self.ce_variance), (self.kd, self.kd_variance), (self.dot, self.covariance))
        first, second, third = (value - variance / self.micro_batches for value, variance in pairs)
        return first, second, third

    def variance(self, alpha: float, beta: float) -> float:
        """The trace of the covariance of α · CE + β · KD between micro-batches."""
        return alpha**2 * self.ce_variance + beta**2 * self.kd_variance + 2 * alpha * beta * self.covariance

    def noise_scale(self, alpha: float, beta: float) -> float:
        """The simple noise scale B = tr(Σ) / ‖G‖² of α · CE + β · KD, in sequences.

        Σ is the covariance of single sequences' gradients, G their expectation (McCandlish et al., arXiv
        1812.06162, equation 2.9; unbiased estimates of both as in their appendix A.1): the batch size at which a
        step holds as much noise as signal. nan where the estimate of ‖G‖² is not positive: too few micro-batches.
        """
        ce, kd, dot = self.unbiased()
        signal = alpha**2 * ce + beta**2 * kd + 2 * alpha * beta * dot
        return self.sequences * self.variance(alpha, beta) / signal if signal > 0 else math.nan


@dataclass(frozen=True)
class GradientStatistics:
    """All that a pass over micro-batches leaves behind; arrays are float64.

    Attributes:
        groups: names of the G groups of parameters.
        parameters: [G] how many each has.
        losses: [m, 2] CE and KD of each micro-batch, nats.
        micro: [m, G, 3] ‖c_i‖², ‖k_i‖² and ⟨c_i, k_i⟩.
        sums: [G, 3] ‖Σc_i‖², ‖Σk_i‖² and ⟨Σc_i, Σk_i⟩.
        sequences: in each micro-batch.
    """

    groups: tuple[str, ...]
    parameters: np.ndarray
    losses: np.ndarray
    micro: np.ndarray
    sums: np.ndarray
    sequences: int

    def places(self, group: str) -> list[int]:
        """Which entries of ``groups`` make up a group: one, or all of them for ``all``."""
        return [i for i, name in enumerate(self.groups) if group in (name, WHOLE)]

    def moments(self, group: str = WHOLE) -> Moments:
        """The moments in one group of parameters, or in all of them."""
        count, chosen = len(self.micro), self.places(group)
        means = self.sums[chosen].sum(0) / count**2
        spread = (self.micro[:, chosen].sum(1).mean(0) - means) * count / (count - 1)
        (ce, kd, dot), (ce_variance, kd_variance, covariance) = means.tolist(), spread.tolist()
        return Moments(ce, kd, dot, ce_variance, kd_variance, covariance, count, self.sequences)

    def cosines(self, group: str = WHOLE) -> np.ndarray:
        """The cosine between the two gradients of each micro-batch, [m]; nan where one of them is zero."""
        chosen = self.places(group)
        ce, kd, dot = self.micro[:, chosen].sum(1).T
        return np.asarray(np.divide(dot, np.sqrt(ce * kd), out=np.full_like(dot, np.nan), where=ce * kd > 0))


def gradient_statistics(
    model: PreTrainedModel, blocks: Tensor, teacher: LogitsFn, objective: Objective, micro_batch: int,
    *, group: Callable[[str], str] = by_layer,
) -> GradientStatistics:
    """Sums and inner products of :func:`loss_gradients`, which are streamed: memory for four gradients at a time.

    Args:
        group: name of a parameter → its group (:func:`by_layer`, :func:`by_kind` or another).
    """
    parameters = _learned(model)
    groups = tuple(dict.fromkeys(group(name) for name in parameters))
    place = [groups.index(group(name)) for name in parameters]
    losses, micro = [], []
    total = [[torch.zeros_like(parameter) for parameter in parameters.values()] for _ in range(2)]
    for values, *pair in loss_gradients(model, blocks, teacher, objective, micro_batch):
        losses.append(values.double().tolist())
        micro.append(_products(pair[0], pair[1], place, len(groups)))
        for held, parts in zip(total, pair, strict=True):
            torch._foreach_add_(held, list(parts))
    sizes = np.zeros(len(groups), dtype=np.int64)
    np.add.at(sizes, place, [parameter.numel() for parameter in parameters.values()])
    sums = _products(total[0], total[1], place, len(groups))
    return GradientStatistics(groups, sizes, np.array(losses), np.stack(micro), sums, micro_batch)


def _products(a: Sequence[Tensor], b: Sequence[Tensor], place: Sequence[int], groups: int) -> np.ndarray:
    """‖a‖², ‖b‖² and ⟨a, b⟩ by group, summed in float64: [groups, 3]."""
    pairs = [pair for u, v in zip(a, b, strict=True) for pair in ((u, u), (v, v), (u, v))]
    each = torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pairs]).reshape(-1, 3)
    found = np.zeros((groups, 3))
    np.add.at(found, list(place), each.cpu().numpy())
    return found


# ------------------------------------------------------------------------------------------------------- readings


def conflict(statistics: GradientStatistics) -> pd.DataFrame:
    """How far the two gradients agree, in the whole model (``all``) and in every group of parameters.

    Returns:
        group, parameters, ce_norm and kd_norm (of the means), cosine (between the means: what a step over these
        blocks sees), cosine_expected (the same without the noise in the means, held within ±1; nan where the noise
        exceeds the signal),
        cosine_low, cosine_median and cosine_high (10th, 50th and 90th percentile over micro-batches), opposed (the
        share of micro-batches with a negative cosine), and the fields of :class:`Moments` below ``moment_``.
    """
    rows = []
    for group in (WHOLE, *statistics.groups):
        moments, cosines = statistics.moments(group), statistics.cosines(group)
        known = cosines[np.isfinite(cosines)]
        low, median, high = np.quantile(known, [0.1, 0.5, 0.9]) if len(known) else (math.nan,) * 3
        rows.append({
            "group": group, "parameters": int(statistics.parameters[statistics.places(group)].sum()),
            "ce_norm": math.sqrt(moments.ce), "kd_norm": math.sqrt(moments.kd),
            "cosine": _cosine(moments.ce, moments.kd, moments.dot), "cosine_expected": _cosine(*moments.unbiased()),
            "cosine_low": low, "cosine_median": median, "cosine_high": high,
            "opposed": float((known < 0).mean()) if len(known) else math.nan,
        } | {f"moment_{name}": value for name, value in asdict(moments).items()})
    return pd.DataFrame(rows)


def _cosine(first: float, second: float, dot: float) -> float:
    return max(-1.0, min(1.0, dot / math.sqrt(first * second))) if first > 0 and second > 0 else math.nan


def step_noise(moments: Moments, micro_batches: int, alpha: float = 0.5) -> pd.DataFrame:
    """How noisy one optimizer step of M micro-batches is under each schedule; the module's table has the formulas.

    Args:
        moments: of the whole model, or of a group.
        micro_batches: M. With an odd number, alternating by micro-batch carries its order over to the next step and
            swings a little; with M = 1 it is alternating by step.
        alpha: of the combined loss; the alternating schedules always give each loss one half.

    Returns:
        schedule, variance (of the step around its schedule's mean, trace), swing (squared distance of that mean from
        the mean over two steps), noise ((variance + swing) / ‖G‖², G the mean over two steps; nan where the
        estimate of ‖G‖² is not positive), ratio ((variance + swing) over that of the combined loss).
    """
    if micro_batches < 1 or not 0 <= alpha <= 1:
        raise MomeError(f"A step needs a micro-batch or more and an alpha from 0 to 1, not {micro_batches}, {alpha}.")
    ce, kd, dot = moments.unbiased()
    apart = max(ce + kd - 2 * dot, 0.0)  # ‖C − K‖²
    halves = (moments.ce_variance + moments.kd_variance) / (2 * micro_batches)
    combined = moments.variance(alpha, 1 - alpha)
    odd = micro_batches % 2 / (2 * micro_batches)  # how far the share of CE in a step is from one half
    table = pd.DataFrame({
        "schedule": SCHEDULES, "variance": [combined / micro_batches, halves, halves],
        "swing": [0.0, odd**2 * apart, apart / 4],
    })
    alphas = np.array([alpha, 0.5, 0.5])
    signal = alphas**2 * ce + (1 - alphas) ** 2 * kd + 2 * alphas * (1 - alphas) * dot
    whole = table["variance"] + table["swing"]
    return table.assign(noise=whole / np.where(signal > 0, signal, np.nan), ratio=whole / whole[0])
