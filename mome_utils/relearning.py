"""Relearning: how fast a forgotten language comes back, against how fast it was learned."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mome_utils.config import MomeError

__all__ = ["savings", "steps_to"]


def steps_to(curve: pd.DataFrame, target: float, start: float | None = None) -> float:
    """First step at which a curve reaches a score, on straight lines between its points; inf where it never does.

    Args:
        curve: ``step`` (above 0) and ``value`` (lower is better), one run.
        start: the score at step 0; without it the curve begins at its first point.
    """
    points = curve.sort_values("step")
    steps, values = points["step"].to_numpy(dtype=float), points["value"].to_numpy(dtype=float)
    if start is not None:
        steps, values = np.append(0.0, steps), np.append(start, values)
    reached = np.flatnonzero(values <= target)
    if len(reached) == 0:
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(steps[0])
    part = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))


def savings(learning_steps: float, relearning_steps: float) -> float:
    """Share of the steps that relearning saves, 1 - relearning / learning (Ebbinghaus 1885); 1: nothing was lost."""
    if not np.isfinite(learning_steps) or learning_steps <= 0:
        raise MomeError("Savings compare with learning that reached the target: choose one that it reached.")
    return 1 - relearning_steps / learning_steps
