"""Rules for α that look at the step alone, and what every rule is: :class:`AlphaStrategy` over :class:`Signals`.

The table of all rules and how to add one: :mod:`mome_utils.alpha`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mome_utils.config import MomeError

__all__ = [
    "AlphaStrategy", "AlternatingAlpha", "CosineAlpha", "FixedAlpha", "LinearAlpha", "PublishedAlternatingAlpha",
    "ScheduleAlpha", "Signals", "TwoPhaseAlpha", "finite",
]


@dataclass(frozen=True)
class Signals:
    """What a rule may look at when it weighs one micro-batch.

    Attributes:
        step: optimizer step, from 0.
        total_steps: optimizer steps of the whole run.
        micro: micro-batch within the step, from 0.
        micro_batches: micro-batches of each step (gradient accumulation).
        ce: cross-entropy of the micro-batch in nats; nan where ``needs`` did not ask for it.
        kd: divergence from the teacher in nats; nan where ``needs`` did not ask for it.
        ce_norm: Euclidean norm of the gradient of ``ce`` in the logits; nan unless the rule ``needs_norms``.
        kd_norm: the same of ``kd``.
    """

    step: int
    total_steps: int
    micro: int = 0
    micro_batches: int = 1
    ce: float = math.nan
    kd: float = math.nan
    ce_norm: float = math.nan
    kd_norm: float = math.nan


class AlphaStrategy(ABC):
    """A rule that gives the weights (α, β) of cross-entropy and divergence for each micro-batch.

    For every step the trainer calls ``needs`` for all its micro-batches, computes what was asked for, and
    then calls ``weights`` once per micro-batch in order. Attributes hold JSON values only and are all set in
    ``__init__``; then the state methods need not be written.
    """

    #: Whether ``weights`` looks at ``ce_norm`` and ``kd_norm``.
    needs_norms: ClassVar[bool] = False
    #: Whether ``weights`` looks at ``ce`` and ``kd``; one that does not may be asked before they are known.
    needs_losses: ClassVar[bool] = True

    def needs(self, step: int, micro: int = 0) -> tuple[bool, bool]:
        """Which losses (CE, KD) micro-batch ``micro`` of step ``step`` computes; both unless a rule says less.

        A loss that is not computed has weight 0 and is nan in :class:`Signals`.
        """
        return True, True

    @abstractmethod
    def weights(self, now: Signals) -> tuple[float, float]:
        """(α, β) of this micro-batch, each between 0 and 1 and together 1."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on, as JSON values: a deep copy of the attributes."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another instance of the same rule.

        Raises:
            MomeError: where the state has other entries than this rule.
        """
        if set(state) != set(vars(self)):
            raise MomeError(
                f"This state does not belong to the rule {type(self).__name__} (it holds "
                f"{', '.join(sorted(state)) or 'nothing'}): resume with the rule that wrote it, or start anew."
            )
        vars(self).update(copy.deepcopy(dict(state)))


def finite(now: Signals, names: Sequence[str]) -> list[float]:
    """The named signals, refused with a sentence where one is not finite: a rule would keep the nan for good."""
    values = [float(getattr(now, name)) for name in names]
    for name, value in zip(names, values, strict=True):
        if not math.isfinite(value):
            what = "A gradient norm" if name.endswith("_norm") else "A loss"
            raise MomeError(
                f"{what} is not finite at step {now.step} ({name} = {value}): lower the learning rate or check "
                "the teacher."
            )
    return values


class ScheduleAlpha(AlphaStrategy):
    """A rule that is a function of the optimizer step; a loss of weight 0 is not computed at all."""

    needs_losses = False

    @abstractmethod
    def alpha(self, step: int) -> float:
        """α of an optimizer step (from 0), between 0 and 1."""

    def needs(self, step: int, micro: int = 0) -> tuple[bool, bool]:
        alpha = self.alpha(step)
        return alpha > 0, alpha < 1

    def weights(self, now: Signals) -> tuple[float, float]:
        alpha = self.alpha(now.step)
        return alpha, 1 - alpha


class FixedAlpha(ScheduleAlpha):
    """α = value at every step (MoME uses 0.5; Hinton et al., arXiv 1503.02531, section 2).

    The baseline of every other rule. 1 trains on the data alone, 0 on the teacher alone.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def alpha(self, step: int) -> float:
        return self.value


class LinearAlpha(ScheduleAlpha):
    """α = t (up) or 1 − t (down), with t = step / (steps − 1).

    Up is the teacher annealing of Clark et al. (BAM!, arXiv 1907.04829): the student imitates first and may
    surpass the teacher later. Down is its mirror image, the control that shows whether the order matters.

    Args:
        total_steps: optimizer steps of the run; a run of one step stays at t = 0.
        up: the direction.
    """

    def __init__(self, total_steps: int, up: bool) -> None:
        self.total_steps = total_steps
        self.up = up

    def progress(self, step: int) -> float:
        """t of the rising rule and 1 − t of the falling one, held at its end after the last step."""
        t = min(1.0, step / max(1, self.total_steps - 1))
        return t if self.up else 1 - t

    def alpha(self, step: int) -> float:
        return self.progress(step)


class CosineAlpha(LinearAlpha):
    """α = (1 − cos πt) / 2 (up) or (1 + cos πt) / 2 (down): half a period of a cosine.

    The shape of the usual learning-rate schedule (Loshchilov & Hutter, arXiv 1608.03983, eq. 5). It stays
    longer near both ends than the line and has the same mean, so it tells the shape from the amount.
    """

    def alpha(self, step: int) -> float:
        return (1 - math.cos(math.pi * self.progress(step))) / 2


class AlternatingAlpha(ScheduleAlpha):
    """α = 1 at even optimizer steps and 0 at odd ones.

    MoME's "alternating" as its text means it: each update follows one loss. The release does something else,
    see :class:`PublishedAlternatingAlpha`.
    """

    def alpha(self, step: int) -> float:
        return float(step % 2 == 0)


class TwoPhaseAlpha(ScheduleAlpha):
    """One loss alone in the first half of the run, the other in the second: KD then CE, or CE then KD.

    The coarsest curriculum. KD first is close to distillation that stops early (Cho & Hariharan, arXiv
    1910.01348, whose first phase has both losses); CE first is the control. With an odd number of steps the
    first phase is one step longer.

    Args:
        total_steps: optimizer steps of the run.
        kd_first: the order.
    """

    def __init__(self, total_steps: int, kd_first: bool) -> None:
        self.total_steps = total_steps
        self.kd_first = kd_first

    def alpha(self, step: int) -> float:
        first = 2 * step < self.total_steps
        return float(first != self.kd_first)


class PublishedAlternatingAlpha(AlphaStrategy):
    """α = 1 at even micro-batches and 0 at odd ones, counted through the whole run, as MoME's release does.

    With an even number of micro-batches every update averages as many CE as KD batches: the combined loss
    with α = 0.5 under another name. With an odd number the order carries over from step to step.
    """

    needs_losses = False

    def __init__(self) -> None:
        self.step = -1  # the step of the latest micro-batch
        self.before = 0  # micro-batches before that step
        self.seen = 0  # micro-batches so far

    def _on_ce(self, step: int, micro: int) -> bool:
        before = self.before if step == self.step else self.seen
        return (before + micro) % 2 == 0

    def needs(self, step: int, micro: int = 0) -> tuple[bool, bool]:
        on_ce = self._on_ce(step, micro)
        return on_ce, not on_ce

    def weights(self, now: Signals) -> tuple[float, float]:
        on_ce = self._on_ce(now.step, now.micro)
        if now.step != self.step:
            self.step, self.before = now.step, self.seen
        self.seen = self.before + now.micro + 1
        return float(on_ce), float(not on_ce)
