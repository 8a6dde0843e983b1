"""How a fitted router learns one language more, without the text of those it has.

A router keeps how often each id occurs in each of its languages, and how alike their sequences are
(:func:`mome_utils.router_fit.token_statistics`). :func:`add_language` lets sequences with these statistics stand in
for the text.

Shapes: ``n`` sequences, ``V`` token ids, ``L`` languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from sklearn.preprocessing import normalize

from mome_utils.config import MomeError
from mome_utils.router_fit import INDEPENDENT, Crops, count_tokens, random_crops, token_statistics
from mome_utils.routing import TokenRouter

__all__ = ["add_language", "pseudo_sequences"]


def pseudo_sequences(totals: np.ndarray, concentration: float, lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """Sequences with the statistics of a language, in place of its text.

    Each is a Pólya urn: its t-th token is, with probability α / (α + t), a new draw from the language's
    distribution, else a copy of one of the t tokens before it. The order of tokens means nothing to the router.

    Args:
        totals: [V], not all 0. concentration: α; 0 (not known) draws independently.
        lengths: of the sequences. seed: of the draws.

    Returns:
        int64 arrays of these lengths.
    """
    generator = np.random.default_rng(seed)
    sizes = np.asarray(lengths, dtype=np.int64)
    shape = (len(sizes), int(sizes.max(initial=0)))
    edges = np.cumsum(totals)
    tokens = np.searchsorted(edges, generator.random(shape) * edges[-1], side="right")
    alpha = concentration or INDEPENDENT
    steps = np.arange(shape[1])
    copied = generator.random(shape) * (alpha + steps) >= alpha
    source = (generator.random(shape) * steps).astype(np.int64)
    every = np.arange(shape[0])
    for step in range(1, shape[1]):
        tokens[:, step] = np.where(copied[:, step], tokens[every, source[:, step]], tokens[:, step])
    return [row[:size] for row, size in zip(tokens, sizes, strict=True)]


def add_language(
    router: TokenRouter,
    name: str,
    sequences: Sequence[Any],
    *,
    crops: Crops | Sequence[Crops] | None = None,
    strength: float = 1.0,
    seed: int = 0,
) -> TokenRouter:
    """A router with one language more, fitted without the text of the languages it has.

    The new row is a logistic regression of "the new language or not", whose score is offset by ``-logsumexp`` of
    the old logits: so its sigmoid is the softmax's probability of the new language. The new language's text stands
    against :func:`pseudo_sequences` of each old language, of the same number and lengths. All that was there
    (old rows, ``idf``, biases, temperatures) stays bit by bit; old logits are the same up to the rounding of a sum,
    so the old rows keep their order on every input (ties aside). The price: ids that the old languages never used
    keep ``idf = 0`` and say nothing.

    Args:
        router: fitted with :func:`fit_router`; it is not changed.
        name: of the new language. sequences: its text.
        crops: as the router was fitted with.
        strength: ``C`` of the logistic regression: the larger, the less the row is held small.
        seed: of crops and pseudo-sequences.

    Returns:
        The new router; ``name`` comes last. Calibrate it again.

    Raises:
        MomeError: a language that it has, no sequences, or a router without statistics.
    """
    if name in router.languages:
        raise MomeError(f"The router already knows '{name}': choose another name, or fit it again.")
    if not len(sequences):
        raise MomeError(f"A router cannot be fitted without text for {name}: give it longer documents.")
    totals = router.statistics.numpy()
    if not totals.sum(axis=1).all():
        raise MomeError("This router keeps no statistics of its languages: fit it with fit_router.")
    own = [*sequences, *random_crops(sequences, crops, seed)]
    lengths = [len(sequence) for sequence in own]
    seeds = np.random.SeedSequence(seed).generate_state(len(totals)).tolist()
    others = [
        pseudo_sequences(row, alpha, lengths, s)
        for row, alpha, s in zip(totals, router.concentration.tolist(), seeds, strict=True)
    ]
    counts = count_tokens([*own, *(sequence for part in others for sequence in part)], router.vocab_size)
    features = normalize(counts.multiply(router.idf.numpy()).tocsr(), norm="l2", copy=False)
    offset = logsumexp(features @ router.weight.numpy().T + router.bias.numpy(), axis=1)
    weight, bias = _fit_row(features, np.arange(len(offset)) < len(own), offset, strength)
    larger = TokenRouter(router.vocab_size, (*router.languages, name))
    statistics, concentration = token_statistics(count_tokens(sequences, router.vocab_size))
    new = {"weight": weight, "bias": bias, "statistics": statistics, "concentration": concentration}
    for key, buffer in router.state_dict().items():
        row = [torch.as_tensor(new[key], dtype=torch.float64)[None]] if key in new else []
        larger.get_buffer(key).copy_(torch.cat([buffer, *row]) if row else buffer)
    return larger


def _fit_row(
    features: sp.csr_matrix, truth: np.ndarray, offset: np.ndarray, strength: float
) -> tuple[np.ndarray, float]:
    """Weights [V] and bias of ``P(true) = sigmoid(w · x + b - offset)``, ½‖w‖² plus ``strength`` times the loss."""
    signs = np.where(truth, 1.0, -1.0)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (features @ values[:-1] + values[-1] - offset)
        slope = -strength * signs * expit(-margin)
        gradient = np.append(features.T @ slope + values[:-1], slope.sum())
        return strength * float(np.logaddexp(0, -margin).sum()) + float(values[:-1] @ values[:-1]) / 2, gradient

    found = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return found.x[:-1], float(found.x[-1])
