"""How a model may learn a language without losing the ones before: replay, pulls to old weights, and distillation.

Each method says what a later stage adds to plain training. All of it is a function of the data order and of the
weights at the ends of the earlier stages, so that a resumed run can make it again and nothing has to be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mome_utils.config import MomeError

__all__ = ["METHODS", "Pull", "StageMethod", "fisher_diagonal", "flat_like", "replayed", "summed", "with_replay"]


@dataclass(frozen=True)
class StageMethod:
    """A method's name for readers, what its strength means, and where it is from."""

    name: str
    strength: str
    source: str


#: Methods by the key that a :class:`~mome_utils.continual.ContinualSpec` names.
METHODS: Mapping[str, StageMethod] = {
    "plain": StageMethod("Sequential", "none", "as published"),
    "replay": StageMethod(
        "Replay", "share of a stage's sequences that are of earlier languages", "Rolnick et al. 2019, arXiv 1811.11682"
    ),
    "l2": StageMethod(
        "L2 pull", "λ, as for EWC, with the mean of the Fisher diagonal for every weight",
        "Kirkpatrick et al. 2017, arXiv 1612.00796 (their control)",
    ),
    "ewc": StageMethod(
        "EWC", "λ; at 1 each token of an earlier stage counts as much as a new one",
        "Kirkpatrick et al. 2017, arXiv 1612.00796, with one anchor as in Huszár 2018, arXiv 1712.03847",
    ),
    "lwf": StageMethod(
        "LwF", "weight of the distance from the previous model", "Li & Hoiem 2016, arXiv 1606.09282"
    ),
    "rate": StageMethod(
        "Lower rate", "factor of the learning rate after the first stage", "common practice; see arXiv 2006.06958"
    ),
}


def with_replay(order: NDArray[np.int64], stages: int, share: float, seed: int) -> NDArray[np.int64]:
    """A data order in which a share of each later stage's sequences is replaced by sequences of earlier stages.

    Of the ``n`` sequences of a stage exactly ``round(share · n)`` are replaced (halves to the even number), at
    places spread evenly over the stage. The replayed sequences are drawn from those that the earlier stages
    showed, as many of each earlier stage (but for a remainder of one), none twice before all were drawn.

    Args:
        order: ``[steps, batch, 2]`` as of :func:`mome_utils.schedules.schedule` ("sequential").
        stages: equal stages, in order; must divide the steps.
        share: at least 0 and below 1.
        seed: of the draws.
    Returns:
        A new array of the same shape; the first stage is unchanged.
    """
    if not 0 <= share < 1:
        raise MomeError(f"The share of replayed sequences must be at least 0 and below 1, not {share}.")
    if len(order) % stages:
        raise MomeError(f"{len(order)} steps cannot be cut into {stages} equal stages: choose a multiple.")
    parts = order.reshape(stages, -1, 2)  # sequences of each stage, in the order they are seen
    mixed = parts.copy()
    for stage in range(1, stages):
        size = parts.shape[1]
        count = round(share * size)
        places = (np.arange(count) * size) // max(count, 1)
        rng = np.random.default_rng([seed, stage])
        for earlier in range(stage):
            own = places[earlier::stage]
            pool = np.unique(parts[earlier], axis=0)
            rounds = [rng.permutation(len(pool)) for _ in range(-(-len(own) // len(pool)))]
            drawn = np.concatenate([*rounds, np.empty(0, dtype=np.int64)])[: len(own)].astype(np.int64)
            mixed[stage, own] = pool[drawn]
    return mixed.reshape(order.shape)


def replayed(order: NDArray[np.int64], stages: int) -> NDArray[np.int64]:
    """How many sequences of each stage are not of the stage's own language: ``[stages]``."""
    languages = order[..., 0].reshape(stages, -1)
    return np.asarray((languages != np.arange(stages)[:, None]).sum(1))


def fisher_diagonal(model: torch.nn.Module, sequences: Tensor, seed: int) -> dict[str, Tensor]:
    """Diagonal of the Fisher information per token, by parameter name.

    For each position the next token is drawn from the *model*, as the definition asks (with the text's own tokens
    it would be the "empirical" Fisher: Kunstner et al. 2019, arXiv 1905.12558). Given its prefix, each draw's score
    has mean zero and draws are independent, so the squared gradient of a sequence's summed log-likelihood has the
    sum of the positions' Fisher diagonals as its mean; divided by the T − 1 targets, and averaged over sequences:

        F_i = mean_s (∂/∂θ_i Σ_t log q(y_t | x_<t))² / (T − 1),  y_t ~ q.

    Args:
        model: a causal language model on one device; its gradients are cleared. Parameters that need no gradient
            are left out, and so are those that no sequence reaches.
        sequences: ids ``[n, T]``.
        seed: of the draws.
    Returns:
        Per parameter a float32 tensor of its shape, on its device.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    for ids in sequences:
        loss = _drawn_loss(model, ids[None].to(next(model.parameters()).device), generator)
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            if gradient is not None:
                total.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32)).addcmul_(gradient, gradient)
    scale = len(sequences) * (sequences.shape[1] - 1)
    return {name: value / scale for name, value in total.items()}


def _drawn_loss(model: torch.nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Minus the summed log-likelihood of tokens drawn from the model at each position of ``ids`` [1, T]."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    with torch.no_grad():
        drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


def summed(fishers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of several diagonals, parameter by parameter."""
    total: dict[str, Tensor] = {}
    for fisher in fishers:
        for name, value in fisher.items():
            total[name] = total[name] + value if name in total else value.clone()
    return total


def flat_like(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diagonal of the same trace with one value everywhere: as strong in all, but blind to which weights matter."""
    size = sum(value.numel() for value in fisher.values())
    mean = sum(float(value.double().sum()) for value in fisher.values()) / size
    return {name: torch.full_like(value, mean) for name, value in fisher.items()}


@dataclass(frozen=True)
class Pull:
    """A quadratic penalty that holds weights near where they were: ½ λ Σ_i F_i (θ_i − a_i)².

    Attributes:
        anchor: the weights ``a`` at the end of the previous stage, by parameter name.
        precision: ``F``, of the same names and shapes.
        strength: λ.
    """

    anchor: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]
    strength: float

    def penalty(self, model: torch.nn.Module) -> Tensor:
        """The penalty at the model's weights, [] in nats per token."""
        return self.strength / 2 * torch.stack(list(self._terms(model))).sum()

    def _terms(self, model: torch.nn.Module) -> Iterator[Tensor]:
        for name, parameter in model.named_parameters():
            if name in self.precision:
                yield (self.precision[name] * (parameter - self.anchor[name]).square()).sum()
