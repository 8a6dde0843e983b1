"""Probabilities of the router that mean what they say: temperature scaling for each length of a prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from mome_utils.config import MomeError
from mome_utils.routing import TokenRouter

__all__ = ["calibrate"]

#: Temperatures are looked for between one hundredth and one hundred.
_LARGEST_TEMPERATURE = 100.0


def calibrate(
    router: TokenRouter, sequences: Mapping[str, Sequence[Any]], *, per_sequence: int = 4, seed: int = 0
) -> TokenRouter:
    """Temperatures that make the router's probabilities mean what they say, for each length of a sequence.

    Temperature scaling (Guo et al., arXiv 1706.04599), once for each length of 1, 2, 4, … tokens up to the longest
    sequence: on random crops of that length the temperature that makes the true languages most likely. Languages
    weigh the same. All crops together count as if one more, of no known language, had been seen, so that a
    length without a single error does not end in certainty. Longer lengths take the last temperature.

    Args:
        router: fitted; it is not changed, and its logits and the order of its languages stay as they are.
        sequences: text of each of its languages that it was *not* fitted on.
        per_sequence: crops of each sequence and length.
        seed: of the crops.

    Returns:
        A copy with its ``temperature`` set.

    Raises:
        MomeError: other languages than the router's, or one without a sequence.
    """
    if set(sequences) != set(router.languages) or not all(map(len, sequences.values())):
        raise MomeError(
            f"Calibration needs held-out sequences of each of {', '.join(router.languages)}, and of no other language."
        )
    calibrated = copy.deepcopy(router)
    generator = np.random.default_rng(seed)
    rows = [[np.asarray(sequence) for sequence in sequences[language]] for language in router.languages]
    longest = min(max(map(len, part)) for part in rows)
    temperature = 1.0
    for knot in range(len(router.temperature)):
        length = 2**knot
        if length <= longest:
            pieces = [_crops_of(part, length, per_sequence, generator) for part in rows]
            logits = [router(torch.from_numpy(piece)).numpy() for piece in pieces]
            temperature = _best_temperature(logits)
        calibrated.temperature[knot] = temperature
    return calibrated


def _crops_of(sequences: Sequence[np.ndarray], length: int, number: int, generator: np.random.Generator) -> np.ndarray:
    """Random crops [m, length], ``number`` of each sequence that is long enough."""
    long = [sequence for sequence in sequences if len(sequence) >= length]
    starts = (generator.random((len(long), number)) * [[len(s) - length + 1] for s in long]).astype(np.int64)
    return np.stack([s[start : start + length] for s, row in zip(long, starts, strict=True) for start in row])


def _best_temperature(logits: Sequence[np.ndarray]) -> float:
    """The temperature of least mean negative log-likelihood; ``logits[i]`` [m_i, L] are those of class i."""
    doubt = 1 / (1 + sum(map(len, logits)))

    def loss(log_temperature: float) -> float:
        total = 0.0
        for label, rows in enumerate(logits):
            scores = rows / np.exp(log_temperature)
            scores = scores - logsumexp(scores, axis=1, keepdims=True)
            total -= (1 - doubt) * scores[:, label].mean() + doubt * scores.mean()
        return total

    limit = float(np.log(_LARGEST_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))
