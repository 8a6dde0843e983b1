"""Distillation in the small: one position, a few outcomes, and gradient descent in float64.

Two settings. A *two-mode teacher* over a line of outcomes, and a student that is fitted to it under each divergence:
either a bell curve, which cannot have two modes and so has to choose what to give up, or free logits, which can be
anything and show in which order a divergence gets there. And *one position of text*, where a few candidate tokens
follow, with the target that a choice of α, temperature and divergence draws the student to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mome_utils.config import MomeError
from mome_utils.divergences import check_settings, divergence

__all__ = ["POSITION", "STEPS", "Position", "PositionView", "look_at", "toy_path", "toy_paths", "two_modes"]

Student = Literal["bell", "free"]
STEPS = (0, 10, 40, 120, 400)
#: Of the natural gradient of a bell, and of the gradient of free logits (times the number of outcomes).
BELL_RATE, FREE_RATE = 0.05, 0.25


def two_modes(outcomes: int = 60) -> Tensor:
    """Logits [outcomes] of a teacher with a mode at a quarter of the line and a lower one at three quarters."""
    place = torch.arange(outcomes, dtype=torch.float64)
    width = outcomes / 14
    first, second = (-((place - share * outcomes) ** 2) / (2 * width**2) for share in (0.27, 0.75))
    return torch.logaddexp(first, second - 0.35)


def toy_path(
    name: str, teacher: Tensor, *, steps: Sequence[int] = STEPS, student: Student = "bell", temperature: float = 1.0,
    parameter: float | None = None,
) -> pd.DataFrame:
    """A student on its way to the teacher under one divergence, by gradient descent; float64, the same at each call.

    The bell has a place μ and a width σ = exp(s), and its logits are −(v − μ)² / 2σ². It starts between the modes,
    nearer to the first. μ and s have different units, so it follows the natural gradient (Amari 1998): the
    gradient over a Gaussian's Fisher information, 1/σ² for μ and 2 for s. The free student starts as a bell on the
    first mode and follows the plain gradient in its logits.

    Args:
        name: a key of DIVERGENCES.
        teacher: logits [outcomes].
        steps: after which steps the student is kept.
        temperature, parameter: of the divergence.

    Returns:
        A row per kept step and outcome: divergence, step, outcome, teacher and student (probabilities at temperature
        1), gradient (of the divergence in the student's logits), loss (of the step).

    Raises:
        MomeError: settings that cannot be, or steps that are not in rising order from 0.
    """
    check_settings(name, temperature, parameter)
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 0:
        raise MomeError(f"The steps of a path must rise from 0 or more, not {list(steps)}: give them in order.")
    target = teacher.double()
    place = torch.arange(len(target), dtype=torch.float64)
    kept = []
    learned = _start(student, len(target))
    for step in range(steps[-1] + 1):
        weights = learned.detach().requires_grad_()
        logits = _logits(student, weights, place)
        loss = divergence(name, logits, target, temperature, parameter)
        slope, gradient = torch.autograd.grad(loss, (logits, weights))
        if step in steps:
            kept.append(pd.DataFrame({
                "divergence": name, "step": step, "outcome": place.numpy(), "teacher": target.softmax(-1).numpy(),
                "student": logits.detach().softmax(-1).numpy(), "gradient": slope.numpy(), "loss": loss.item(),
            }))
        if student == "free":
            learned = learned - FREE_RATE * len(target) * gradient
        else:
            learned = learned - BELL_RATE * gradient * torch.stack([(2 * learned[1]).exp(), torch.tensor(0.5)])
    return pd.concat(kept, ignore_index=True)


def toy_paths(names: Sequence[str], teacher: Tensor | None = None, **settings: object) -> pd.DataFrame:
    """:func:`toy_path` for several divergences, with the same teacher (by default :func:`two_modes`) and settings."""
    target = two_modes() if teacher is None else teacher
    return pd.concat([toy_path(name, target, **settings) for name in names], ignore_index=True)  # type: ignore[arg-type]


def _start(student: Student, outcomes: int) -> Tensor:
    """The student's parameters before the first step: (μ, s), or a logit for each outcome."""
    if student == "bell":
        return torch.tensor([0.4 * outcomes, math.log(outcomes / 9)], dtype=torch.float64)
    if student == "free":
        place = torch.arange(outcomes, dtype=torch.float64)
        return -((place - 0.27 * outcomes) ** 2) / (2 * (outcomes / 14) ** 2)
    raise MomeError(f"There is no toy student {student!r}: choose 'bell' or 'free'.")


def _logits(student: Student, weights: Tensor, place: Tensor) -> Tensor:
    if student == "free":
        return 1 * weights
    distance = (place - weights[0]) / weights[1].exp()
    return -(distance**2) / 2


# -------------------------------------------------------------------------------------------- one position of text


@dataclass(frozen=True)
class Position:
    """One position: candidate tokens [V], logits of teacher and student, and the token that follows in the text."""

    context: str
    tokens: tuple[str, ...]
    teacher: tuple[float, ...]
    student: tuple[float, ...]
    label: int


#: A teacher with two favourites, a student with one of its own, and a text that goes on with neither.
POSITION = Position(
    context="She opened the",
    tokens=("door", "window", "letter", "book", "box", "fridge", "sea", "of"),
    teacher=(2.6, 2.3, 1.2, 0.9, 0.3, -0.2, -2.5, -4.0),
    student=(0.4, -0.2, 0.3, 1.9, 0.6, -0.3, 0.2, -0.4),
    label=2,
)


@dataclass(frozen=True)
class PositionView:
    """What one choice of α, temperature and divergence does at a position; arrays [V].

    Attributes:
        setting: what was chosen, in words.
        teacher, student: probabilities at temperature 1.
        softened: the teacher at the chosen temperature.
        target: the distribution that minimises α · CE + β · divergence at this position: where the student is drawn.
        ce, kd: the two weighed parts of the gradient in the student's logits, α · ∂CE and β · ∂divergence.
        loss, ce_loss, kd_loss: in nats; kd_loss as in training, times the power of T.
    """

    setting: Mapping[str, object]
    teacher: np.ndarray
    softened: np.ndarray
    student: np.ndarray
    target: np.ndarray
    ce: np.ndarray
    kd: np.ndarray
    loss: float
    ce_loss: float
    kd_loss: float


def look_at(
    alpha: float = 0.5, temperature: float = 1.0, divergence: str = "forward_kl", parameter: float | None = None,
    *, position: Position = POSITION,
) -> PositionView:
    """Teacher, student, target and gradient at one position, in float64.

    The target is found by L-BFGS from the mixture of text and teacher, which it is for forward KL at temperature 1; at
    α = 1 it is the text's own token. Total variation has many targets between its extremes: this is one of them.

    Raises:
        MomeError: an α outside 0 to 1, or settings that the divergence refuses.
    """
    check_settings(divergence, temperature, parameter)
    if not 0 <= alpha <= 1:
        raise MomeError(f"The weight alpha must lie between 0 and 1, not {alpha}: choose it so.")
    teacher = torch.tensor(position.teacher, dtype=torch.float64)
    start = torch.tensor(position.student, dtype=torch.float64)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        distance = _distance(divergence, logits, teacher, temperature, parameter)
        return -alpha * logits.log_softmax(-1)[position.label], (1 - alpha) * distance

    logits = start.clone().requires_grad_()
    ce, kd = parts(logits)
    slopes = [torch.autograd.grad(part, logits, retain_graph=True)[0].numpy() for part in (ce, kd)]
    setting = MappingProxyType(dict(alpha=alpha, temperature=temperature, divergence=divergence, parameter=parameter))
    return PositionView(
        setting, teacher.softmax(-1).numpy(), (teacher / temperature).softmax(-1).numpy(), start.softmax(-1).numpy(),
        _target(parts, teacher.softmax(-1), alpha, position.label), slopes[0], slopes[1], (ce + kd).item(),
        -start.log_softmax(-1)[position.label].item(),
        _distance(divergence, start, teacher, temperature, parameter).item(),
    )


_distance = divergence  # look_at has an argument of that name


def _target(
    parts: Callable[[Tensor], tuple[Tensor, Tensor]], teacher: Tensor, alpha: float, label: int
) -> np.ndarray:
    """The minimiser [V] of the two parts' sum, found from the mixture α · onehot(label) + (1 − α) · teacher."""
    text = torch.eye(len(teacher), dtype=teacher.dtype)[label]
    if alpha == 1:
        return np.asarray(text.numpy())
    logits = torch.log(alpha * text + (1 - alpha) * teacher).requires_grad_()
    search = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = torch.stack(parts(logits)).sum()
        value.backward()
        return value

    search.step(loss)
    return np.asarray(logits.detach().softmax(-1).numpy())
