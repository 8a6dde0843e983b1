"""A teacher kept as k tokens of each position: for teachers whose hidden states are not at hand.

The study keeps a teacher's last hidden states, from which its whole distribution comes back
(:func:`mome_utils.runs.cache_teacher`). An API, or a model of another library, gives logits or log-probabilities at
best. Then k tokens of each position are kept, in one of three ways (:data:`KINDS`):

* ``smoothed``: the k most likely tokens and their log-probabilities; what is left of the probability, 1 − Σ p_k, is
  spread evenly over the V − k others. Every token keeps a probability, so every divergence is finite.
* ``truncated``: the same tokens, with the others at 0 and the k scaled up to sum to 1. A student of it learns to
  be too sure of the head of the distribution (Anshumann et al., arXiv 2503.16870, who prove top-k caches biased).
* ``sampled``: k draws from the teacher's distribution, with replacement, each worth 1/k: the paper's random sampling
  with proposals at temperature 1. Its mean over draws is the distribution itself, so a loss that is linear in p, and
  its gradient, are unbiased; a single row is noisy.

A student is fed *packed* rows, one int16 tensor [.., w] for both parts of a cache, cut and moved as hidden states are,
and :class:`SparseHead` makes logits of them, in the place of the product with the teacher's output matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mome_utils.config import MomeError
from mome_utils.distillation import Objective

__all__ = ["KINDS", "SparseCache", "SparseHead", "checked", "encode", "index_dtype", "pack", "row_chunks"]

#: Ways of keeping k tokens of a distribution.
KINDS: tuple[str, ...] = ("smoothed", "truncated", "sampled")
#: Largest vocabulary whose indices fit two bytes.
NARROW = 2**16
#: Logits that are looked at together: 64 MB in float32.
CHUNK = 2**24
#: Rounding error of a float16 number: relative, and that of the smallest.
ROUNDING, SMALLEST = torch.finfo(torch.float16).eps / 2, torch.finfo(torch.float16).smallest_normal * 2**-11
#: What a sum of probabilities may exceed 1 by: an API rounds, too.
EXCESS = 0.01


@dataclass(frozen=True)
class SparseCache:
    """How a teacher is kept: ``k`` tokens of each position, as one of KINDS.

    Raises:
        MomeError: for k < 1 or an unknown kind.
    """

    k: int
    kind: str = "smoothed"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise MomeError(f"A cache keeps one token of each position or more, not {self.k}: choose k so.")
        if self.kind not in KINDS:
            raise MomeError(f"Unknown kind of cache {self.kind!r}: choose one of {', '.join(KINDS)}.")

    @property
    def stored(self) -> str:
        """What is stored, ``top_k`` or ``sampled``: the two top-k kinds read the same files."""
        return "sampled" if self.kind == "sampled" else "top_k"

    def refusal(self, objective: Objective, vocabulary: int) -> str:
        """Why an objective cannot be computed from this cache; empty where it can.

        ``k`` distinct tokens need a vocabulary as large, and an objective may need what the cache does not hold.
        """
        if self.kind != "sampled" and self.k > vocabulary:
            return f"The {self.k} most likely of {vocabulary} tokens cannot be kept: choose k up to {vocabulary}."
        if self.kind == "truncated" and self.k < vocabulary and objective.divergence == "reverse_kl":
            return (
                "reverse_kl is infinite against a truncated teacher, which gives most tokens no probability: "
                "choose the smoothed cache."
            )
        linear = objective.divergence in ("soft_ce", "forward_kl") and objective.temperature == 1
        if self.kind == "sampled" and not linear:
            return (
                "A sampled teacher is unbiased only for losses that are linear in its probabilities: choose soft_ce "
                "or forward_kl at temperature 1, or the smoothed cache."
            )
        return ""

    def check(self, objective: Objective, vocabulary: int) -> None:
        """Refuse before any work starts.

        Raises:
            MomeError: the :meth:`refusal`.
        """
        if refusal := self.refusal(objective, vocabulary):
            raise MomeError(refusal)

    def bytes_per_token(self, vocabulary: int) -> int:
        """Bytes that one position takes on disk."""
        index = index_dtype(vocabulary).itemsize
        return self.k * (index if self.kind == "sampled" else index + torch.float16.itemsize)


def index_dtype(vocabulary: int) -> torch.dtype:
    """The smallest type of an index into ``vocabulary`` tokens: uint16, or int32 above 65,536."""
    return torch.uint16 if vocabulary <= NARROW else torch.int32


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Rows in pieces of at most CHUNK logits."""
    each = max(1, CHUNK // vocabulary)
    return (slice(start, min(start + each, rows)) for start in range(0, rows, each))


@torch.no_grad()
def encode(logits: Tensor, cache: SparseCache, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """What is kept of distributions.

    Args:
        logits: [..., V], or log-probabilities, any floating type.
        generator: of the draws of a ``sampled`` cache, on the device of ``logits``; else unused.
    Returns:
        ``indices`` [..., k], uint16 or int32 (:func:`index_dtype`), and but for ``sampled`` caches ``log_probs``
        [..., k] in float16, the most likely token first. float16 rounds a log-probability by at most 1 / 2,048 of
        itself, an eighth of what bfloat16 does, and none is beyond its range.
    Raises:
        MomeError: for a top-k cache with k > V.
    """
    vocabulary = logits.shape[-1]
    cache.check(Objective(), vocabulary)
    flat = logits.reshape(-1, vocabulary)
    indices = torch.empty((len(flat), cache.k), dtype=torch.int64, device=flat.device)
    log_probs = torch.empty((len(flat), cache.k), dtype=torch.float16, device=flat.device)
    for rows in row_chunks(len(flat), vocabulary):
        piece = flat[rows].to(torch.promote_types(flat.dtype, torch.float32))
        if cache.kind == "sampled":
            indices[rows] = torch.multinomial(piece.softmax(-1), cache.k, replacement=True, generator=generator)
        else:
            most, indices[rows] = piece.topk(cache.k, -1)
            log_probs[rows] = (most - piece.logsumexp(-1, keepdim=True)).clamp_(max=0).half()
    shape = (*logits.shape[:-1], cache.k)
    found = {"indices": indices.to(index_dtype(vocabulary)).view(shape)}
    return found if cache.kind == "sampled" else {**found, "log_probs": log_probs.view(shape)}


def checked(parts: Mapping[str, Tensor], cache: SparseCache, vocabulary: int) -> dict[str, Tensor]:
    """The parts of a cache in the types that are stored, for instance from the lists of log-probabilities of an API.

    Args:
        parts: ``indices`` [..., k] integers and, but for ``sampled`` caches, ``log_probs`` [..., k] in nats.
    Raises:
        MomeError: for other names or shapes, indices outside the vocabulary or twice in a row of a top-k cache, and
            log-probabilities that are none.
    """
    names = {"indices"} if cache.kind == "sampled" else {"indices", "log_probs"}
    if set(parts) != names or any(part.shape != parts["indices"].shape for part in parts.values()):
        raise MomeError(f"A {cache.kind} cache consists of {' and '.join(sorted(names))} of one shape: give these.")
    indices = parts["indices"].long()
    if indices.shape[-1] != cache.k:
        raise MomeError(f"Each position of this cache needs {cache.k} tokens, not {indices.shape[-1]}: give as many.")
    if indices.numel() and not (indices.min() >= 0 and indices.max() < vocabulary):
        raise MomeError(
            f"A token of the teacher lies outside the student's vocabulary of {vocabulary}: use a teacher with the "
            "same tokenizer."
        )
    found = {"indices": indices.to(index_dtype(vocabulary))}
    if cache.kind == "sampled":
        return found
    ordered = indices.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise MomeError("A position of the teacher names a token twice: give k different ones.")
    log_probs = parts["log_probs"]
    if not bool(torch.isfinite(log_probs).all()):
        raise MomeError("A kept token of the teacher has no finite log-probability: store fewer tokens per position.")
    if not bool((log_probs.float().exp().sum(-1) <= 1 + EXCESS).all()):
        raise MomeError("The log-probabilities of a position sum to more than 1: give natural logarithms.")
    return {**found, "log_probs": log_probs.clamp(max=0).half()}


def pack(parts: Mapping[str, Tensor]) -> Tensor:
    """Both parts of a cache as one int16 tensor [..., w], for :class:`SparseHead`: log-probabilities, then indices."""
    halves = [parts[name].contiguous().view(torch.int16) for name in ("log_probs", "indices") if name in parts]
    return halves[0] if len(halves) == 1 else torch.cat(halves, -1)


@dataclass(frozen=True)
class SparseHead:
    """Makes logits of packed rows, as an output matrix does of hidden states."""

    cache: SparseCache
    vocabulary: int

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """Log-probabilities [..., V] in float32, up to a constant per row, of packed rows [..., w]."""
        k, kind = self.cache.k, self.cache.kind
        indices = self._indices(rows if kind == "sampled" else rows[..., k:])
        if kind == "sampled":
            one = torch.ones(indices.shape, device=rows.device)
            logits = one.new_zeros((*rows.shape[:-1], self.vocabulary)).scatter_add_(-1, indices, one)
            drawn = logits.gather(-1, indices)  # how often: its logarithm is taken of k numbers, not of V
            return logits.fill_(-math.inf).scatter_(-1, indices, drawn.div_(k).log_())
        log_probs = rows[..., :k].contiguous().view(torch.float16).float()
        others = self._others(log_probs) if kind == "smoothed" else log_probs.new_full((), -math.inf)
        logits = others.expand((*rows.shape[:-1], self.vocabulary)).contiguous()
        return logits.scatter_(-1, indices, log_probs)

    def _indices(self, rows: Tensor) -> Tensor:
        """Indices [..., k] as int64."""
        if index_dtype(self.vocabulary) == torch.uint16:
            return rows.long().bitwise_and_(NARROW - 1)
        return rows.contiguous().view(torch.int32).long()

    def _others(self, log_probs: Tensor) -> Tensor:
        """Log-probability [..., 1] of each token that is not kept.

        Their mass is what the kept ones leave of 1. A sum of rounded numbers is known only up to its terms' rounding:
        p = exp(l) moves by p · (|l| · ROUNDING + SMALLEST), so a mass below the sum of these is taken to be that sum.
        And none of them is more likely than the least likely token kept.
        """
        if self.cache.k == self.vocabulary:
            return log_probs.new_zeros((*log_probs.shape[:-1], 1))  # each is overwritten
        kept = log_probs.exp()
        unsure = torch.where(kept > 0, kept * (SMALLEST - ROUNDING * log_probs), 0).sum(-1, keepdim=True)
        mass = torch.maximum(1 - kept.sum(-1, keepdim=True), unsure)
        return torch.minimum((mass / (self.vocabulary - self.cache.k)).log(), log_probs.amin(-1, keepdim=True))
