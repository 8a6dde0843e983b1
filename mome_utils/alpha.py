"""Rules for α, the weight of the data's cross-entropy against the teacher: L = α · CE + β · KD, β = 1 − α.

A rule sees plain floats (:class:`Signals`), one micro-batch at a time, and answers (α, β). No tensor enters
here, so a rule costs nothing beside a training step, and its state is a few JSON values.

====================  =========================================================  ===========================
name                  α                                                          decided
====================  =========================================================  ===========================
fixed, ce, kd         value, 1, 0                                                once
published_adaptive    w_CE / (w_CE + w_KD) as released                           per micro-batch
adaptive              the same formula as meant                                  per optimizer step
linear_up, _down      t, 1 − t                                                   per optimizer step
cosine_up, _down      (1 − cos πt) / 2, (1 + cos πt) / 2                         per optimizer step
uncertainty           exp(−s_CE) / (exp(−s_CE) + exp(−s_KD)), s learned          per optimizer step
gradient_norm         ‖g_KD‖ / (‖g_CE‖ + ‖g_KD‖), running means                  per optimizer step
alternating           1 at even steps, 0 at odd ones                             per optimizer step
published_alternating the same by micro-batch, as released                       per micro-batch
kd_then_ce            0 in the first half of the run, 1 in the second            per optimizer step
ce_then_kd            1 in the first half of the run, 0 in the second            per optimizer step
plateau               0 until the KD loss stops falling, then 1                  per optimizer step
====================  =========================================================  ===========================

t runs from 0 at the first step to 1 at the last. Names that begin with ``published_`` follow the release of
MoME (arXiv 2407.19610) as its code computes it. Every rule gives α + β = 1, so that two rules differ in the
balance of the two losses and never in the size of their sum: they can be compared at one learning rate.

A new rule is a subclass of :class:`AlphaStrategy` with ``weights`` and an entry in :data:`STRATEGIES`: about
ten lines. A rule that looks at a loss refuses one that is not finite with one sentence that names the step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import ClassVar

from mome_utils.alpha_schedules import (
    AlphaStrategy,
    AlternatingAlpha,
    CosineAlpha,
    FixedAlpha,
    LinearAlpha,
    PublishedAlternatingAlpha,
    Signals,
    TwoPhaseAlpha,
    finite,
)
from mome_utils.config import MomeError

__all__ = [
    "STRATEGIES", "AlphaStrategy", "Signals", "adaptive_alpha", "adaptive_window", "make_alpha", "relative_change",
]


class StepAlpha(AlphaStrategy):
    """A rule that holds one α for all micro-batches of a step and decides anew at the end of each step.

    ``decide`` gets the means, over the step's micro-batches, of the signals named in ``looks_at``. Its answer
    is α of the next step. With one micro-batch per step the step's own signals are known before its weights
    are asked for, so a rule with ``same_step`` already applies the answer to this step.

    Args:
        start: α before the first decision.
    """

    looks_at: ClassVar[tuple[str, ...]] = ("ce", "kd")
    same_step: ClassVar[bool] = False

    def __init__(self, start: float) -> None:
        self.alpha = start
        self.open: list[list[float]] = []  # signals of the step under way, one entry per micro-batch

    @abstractmethod
    def decide(self, means: Sequence[float]) -> float:
        """The next α, from the finished step's means in the order of ``looks_at``."""

    def weights(self, now: Signals) -> tuple[float, float]:
        """(α, β).

        Raises:
            MomeError: where a signal that the rule looks at is not finite.
        """
        alpha = self.alpha
        self.open = [*self.open, finite(now, self.looks_at)] if now.micro else [finite(now, self.looks_at)]
        if now.micro == now.micro_batches - 1:
            self.alpha = self.decide([fmean(values) for values in zip(*self.open, strict=True)])
            self.open = []
            if self.same_step and now.micro_batches == 1:
                alpha = self.alpha
        return alpha, 1 - alpha


def relative_change(losses: Sequence[float]) -> float:
    """d = (last − first) / mean of a window of losses, positive after a rise; 0 where the mean is 0."""
    mean = sum(losses) / len(losses)
    return (losses[-1] - losses[0]) / mean if mean != 0 else 0.0


def adaptive_alpha(ce: Sequence[float], kd: Sequence[float]) -> float:
    """α = w_CE / (w_CE + w_KD) of two windows of losses, with w = 1 − clip(d, 0, 1); 0.5 where both w are 0.

    A loss that falls has w = 1, so α is 0.5 unless one of the two rises; it moves away from the one that
    does. Both w being 0 is undefined in the release of MoME (0 / 0).
    """
    w_ce, w_kd = (1 - min(max(relative_change(losses), 0.0), 1.0) for losses in (ce, kd))
    return w_ce / (w_ce + w_kd) if w_ce + w_kd > 0 else 0.5


def adaptive_window(total_steps: int) -> int:
    """k = max(20, steps // 100), the number of losses in the window of MoME's adaptive rule."""
    return max(20, total_steps // 100)


class PublishedAdaptiveAlpha(AlphaStrategy):
    """MoME's adaptive rule as released: :func:`adaptive_alpha` of the last k micro-batches, this one included.

    The release fills the history by micro-batch while k counts optimizer steps. At 16-fold accumulation the
    window of 20 is little more than one step, d is the difference between two single batches, and α hardly
    leaves 0.5. See :class:`AdaptiveAlpha` for the rule as meant.

    Args:
        window: k, at least 2.
        start: α of the first k − 1 micro-batches.
    """

    def __init__(self, window: int, start: float = 0.5) -> None:
        self.window = window
        self.start = start
        self.ce: list[float] = []
        self.kd: list[float] = []

    def weights(self, now: Signals) -> tuple[float, float]:
        """(α, β).

        Raises:
            MomeError: where a loss is not finite.
        """
        ce, kd = finite(now, ("ce", "kd"))
        self.ce, self.kd = [*self.ce, ce][-self.window :], [*self.kd, kd][-self.window :]
        alpha = adaptive_alpha(self.ce, self.kd) if len(self.ce) == self.window else self.start
        return alpha, 1 - alpha


class AdaptiveAlpha(StepAlpha):
    """MoME's adaptive rule as meant: :func:`adaptive_alpha` of the last k optimizer steps, decided per step.

    An entry of the history is the mean of a step's micro-batches. With one micro-batch per step the window
    ends with the current step, exactly as in :class:`PublishedAdaptiveAlpha`; with several it ends with the
    step before, since the current step's mean is not known when its first micro-batch is weighed.

    Args:
        window: k, at least 2.
        start: α until k steps are known.
    """

    same_step = True

    def __init__(self, window: int, start: float = 0.5) -> None:
        super().__init__(start)
        self.window = window
        self.ce: list[float] = []
        self.kd: list[float] = []

    def decide(self, means: Sequence[float]) -> float:
        ce, kd = means
        self.ce, self.kd = [*self.ce, ce][-self.window :], [*self.kd, kd][-self.window :]
        return adaptive_alpha(self.ce, self.kd) if len(self.ce) == self.window else self.alpha


class UncertaintyAlpha(StepAlpha):
    """Homoscedastic uncertainty: α = exp(−s_CE) / (exp(−s_CE) + exp(−s_KD)) with learned s = ln σ².

    Kendall et al. (arXiv 1705.07115, eqs. 7 to 10) minimise Σ_i exp(−s_i) · L_i + s_i / 2 in the weights and
    in s. Both losses here are cross-entropies up to a constant, so both take the form for classification. The
    gradient in s_i is 1/2 − exp(−s_i) · L_i; Adam (arXiv 1412.6980) follows it on the two numbers, once per
    optimizer step, with the step's mean losses and after its weights are taken, as in joint training. On
    constant losses exp(s_i) = 2 L_i, so α · L_CE = β · L_KD: the weights are inversely proportional to the
    losses. Small losses weigh more, which is what makes the rule depend on a divergence's units and floor.

    The weights are divided by their sum. Otherwise the rule would also change the effective learning rate,
    by 1 / L over a run, and could not be compared with the others. s keeps learning from the undivided
    objective, so its fixed point is the paper's.

    Args:
        total_steps: optimizer steps of the run. Adam's rate is 30 / steps, within 0.001 and 0.1, so that on a
            constant loss between 0.02 and 6 nats s is within 0.15 of its fixed point after a quarter of a run of 300
            to 3000 steps. A loss of a thousand nats (``published_forward_kl``) is not caught up with in a run.
    """

    #: s is kept within ± this, so losses between 2.3e-5 and 1.1e4 nats have their own weight.
    BOUND: ClassVar[float] = 10.0

    def __init__(self, total_steps: int) -> None:
        super().__init__(0.5)
        self.rate = min(max(30 / total_steps, 0.001), 0.1)
        self.updates = 0
        self.s = [0.0, 0.0]
        self.first = [0.0, 0.0]  # Adam's running means of the gradient and of its square
        self.second = [0.0, 0.0]

    def decide(self, means: Sequence[float]) -> float:
        self.updates += 1
        correction = [1 - decay**self.updates for decay in (0.9, 0.999)]
        for i, loss in enumerate(means):
            # The limit only keeps the square below finite: Adam does not depend on the gradient's scale.
            gradient = max(0.5 - math.exp(-self.s[i]) * loss, -1e100)
            self.first[i] = 0.9 * self.first[i] + 0.1 * gradient
            self.second[i] = 0.999 * self.second[i] + 0.001 * gradient**2
            change = self.first[i] / correction[0] / (math.sqrt(self.second[i] / correction[1]) + 1e-8)
            self.s[i] = min(max(self.s[i] - self.rate * change, -self.BOUND), self.BOUND)
        return 1 / (1 + math.exp(self.s[0] - self.s[1]))


class GradientNormAlpha(StepAlpha):
    """α = ‖g_KD‖ / (‖g_CE‖ + ‖g_KD‖), so that α · ‖g_CE‖ = β · ‖g_KD‖: both losses pull equally hard.

    After GradNorm (Chen et al., arXiv 1711.02257): with its asymmetry parameter at 0 the target is equal
    gradient norms. GradNorm learns the weights towards it on the norms in the last shared layer; here the
    norms are taken in the logits, where they cost no second backward pass, and the equation is solved. The
    norms are exponential means over steps (decay 0.9, started at the first step's norms), the mean over
    micro-batches within a step. α stays within [1e-4, 1 − 1e-4]; where both norms are 0 it stays as it was.

    Args:
        start: α of the first step where that has several micro-batches.
    """

    needs_norms = True
    looks_at = ("ce_norm", "kd_norm")
    same_step = True
    DECAY: ClassVar[float] = 0.9
    BOUND: ClassVar[float] = 1e-4

    def __init__(self, start: float = 0.5) -> None:
        super().__init__(start)
        self.norms: list[float] = []  # running norms of the two gradients

    def decide(self, means: Sequence[float]) -> float:
        old = self.norms or means
        self.norms = [self.DECAY * a + (1 - self.DECAY) * b for a, b in zip(old, means, strict=True)]
        ce, kd = self.norms
        if ce == kd == 0:
            return self.alpha
        return min(max(kd / (ce + kd), self.BOUND), 1 - self.BOUND)


class PlateauAlpha(StepAlpha):
    """α = 0 until the KD loss stops falling, then 1 for good: the teacher first, for as long as it helps.

    The loss has stopped falling when its mean over the last k steps is more than (1 − fall) times its mean
    over the k steps before. The switch takes effect with the next step, never before step 2k, and a run
    shorter than that never switches. Distillation that stops early (Cho & Hariharan, arXiv 1910.01348), with
    the criterion of a learning rate reduced on a plateau in place of an epoch chosen by hand.
    The fall is relative to the loss itself: soft cross-entropy, which has the teacher's entropy as its
    floor, reaches the plateau earlier than KL does.

    Args:
        window: k, at least 1.
        fall: the relative fall over k steps that still counts as progress.
    """

    looks_at = ("kd",)

    def __init__(self, window: int, fall: float = 0.01) -> None:
        super().__init__(0.0)
        self.window = window
        self.fall = fall
        self.kd: list[float] = []

    def needs(self, step: int, micro: int = 0) -> tuple[bool, bool]:
        return self.alpha == 1, self.alpha == 0

    def weights(self, now: Signals) -> tuple[float, float]:
        return (1.0, 0.0) if self.alpha == 1 else super().weights(now)

    def decide(self, means: Sequence[float]) -> float:
        self.kd = [*self.kd, *means][-2 * self.window :]
        if len(self.kd) < 2 * self.window:
            return 0.0
        before, after = fmean(self.kd[: self.window]), fmean(self.kd[self.window :])
        return float(after > (1 - self.fall) * before)


# ------------------------------------------------------------------------------------------------ the catalogue

#: Name → make(value, total optimizer steps). ``value`` is α of "fixed" and the start value of the adaptive rules and
#: of "gradient_norm"; the others do not look at it.
STRATEGIES: Mapping[str, Callable[[float, int], AlphaStrategy]] = MappingProxyType(
    {
        "fixed": lambda value, steps: FixedAlpha(value),
        "ce": lambda value, steps: FixedAlpha(1.0),
        "kd": lambda value, steps: FixedAlpha(0.0),
        "published_adaptive": lambda value, steps: PublishedAdaptiveAlpha(adaptive_window(steps), value),
        "adaptive": lambda value, steps: AdaptiveAlpha(adaptive_window(steps), value),
        "linear_up": lambda value, steps: LinearAlpha(steps, up=True),
        "linear_down": lambda value, steps: LinearAlpha(steps, up=False),
        "cosine_up": lambda value, steps: CosineAlpha(steps, up=True),
        "cosine_down": lambda value, steps: CosineAlpha(steps, up=False),
        "uncertainty": lambda value, steps: UncertaintyAlpha(steps),
        "gradient_norm": lambda value, steps: GradientNormAlpha(value),
        "alternating": lambda value, steps: AlternatingAlpha(),
        "published_alternating": lambda value, steps: PublishedAlternatingAlpha(),
        "kd_then_ce": lambda value, steps: TwoPhaseAlpha(steps, kd_first=True),
        "ce_then_kd": lambda value, steps: TwoPhaseAlpha(steps, kd_first=False),
        "plateau": lambda value, steps: PlateauAlpha(max(20, steps // 10)),
    }
)


def make_alpha(name: str, value: float, total_steps: int) -> AlphaStrategy:
    """The rule of a name, at its start.

    Args:
        name: a key of :data:`STRATEGIES`.
        value: α, or its start value; between 0 and 1.
        total_steps: optimizer steps of the run, at least 1.
    Raises:
        MomeError: for an unknown name, or a value or number of steps out of range.
    """
    if name not in STRATEGIES:
        raise MomeError(f"Unknown rule for alpha {name!r}: choose one of {', '.join(STRATEGIES)}.")
    if not 0 <= value <= 1:
        raise MomeError(f"The weight alpha must lie between 0 and 1, not {value}: choose it so.")
    if total_steps < 1:
        raise MomeError(f"A run needs at least one optimizer step, not {total_steps}: give their number.")
    return STRATEGIES[name](value, total_steps)
