"""The router as it runs: which language a sequence of token ids is in, decided from a bag of those ids.

The published router (MoME, arXiv 2407.19610) writes token ids as words, takes TF-IDF features of them and
applies a linear classifier. :class:`TokenRouter` is that pipeline, once fitted, as a tensor module: same logits,
same decisions, batched, one decision per sequence, and saved as safetensors and JSON, so that loading a router
can never run code. :mod:`mome_utils.router_fit` fits it, :mod:`mome_utils.router_calibration` makes its probabilities
honest, and :mod:`mome_utils.router_growth` extends it.

Shapes: ``B`` sequences of ``T`` positions, ``V`` token ids, ``L`` languages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mome_utils.artifacts import DamagedArtifact, write_atomic
from mome_utils.config import MomeError

__all__ = ["ABSTAIN", "TokenRouter"]

#: The route of a sequence on which the router abstains.
ABSTAIN = -1

_FORMAT, _VERSION = "mome-token-router", 2
#: Numbers of working memory per step: 2 MB in float64, so that a step's passes find them in a core's cache.
_WORKSPACE = 2**18
#: From this many ids per pair of positions it is cheaper to compare all pairs than to count in a table of V numbers.
_PAIRS = 16
#: Up to this many ids per position it is cheaper to count all ids than to look up each position.
_DENSE = 8
#: Groups of ids in each of which a norm is bounded by a sum.
_GROUPS = 8
#: One temperature for 1, 2, 4, … 4,096 known tokens.
_TEMPERATURES = 13


class TokenRouter(nn.Module):
    """TF-IDF and a linear classifier over token ids, as tensors.

    With counts ``c`` of a sequence, ``logits = weight · (c ∘ idf) / ‖c ∘ idf‖ + bias``. The norm is over
    *distinct* ids, so it is not a sum over tokens and the counts have to be made first. Ids that the
    vectorizer dropped or never saw have ``idf = 0`` and change nothing. A sequence without any known id
    (empty, all padding) has no direction: its logits are ``bias``, which is also what scikit-learn answers.

    All numbers are float64 buffers: they travel in the state dict of a model that owns a router, and they
    stay float64 when that model is cast to a smaller type (a router in bfloat16 would decide differently).
    On Apple's MPS, which has no float64, they become float32.

    Args:
        vocab_size: number of token ids, ``V``.
        languages: names of the rows, at least two different ones.

    Attributes:
        languages: the names, in the order of the logits.
        idf: [V], not negative. weight: [L, V]. bias: [L].
        temperature: [13], what the logits are divided by before the softmax, for 1, 2, 4, … 4,096 known tokens;
            all 1 until calibrated.
        threshold: [], see :attr:`abstain_below`.
        statistics: [L, V], how often each id occurs in the text of each language that the router was fitted on;
            0 where unknown. Adding a language needs them instead of that text.
        concentration: [L], how alike the sequences of a language are, as the concentration of a
            Dirichlet-multinomial distribution with mean ``statistics``; 0 where unknown.

    Example:
        >>> router = TokenRouter(8, ("en", "fr"))
        >>> router(torch.tensor([[3, 3, 5]])).shape
        torch.Size([1, 2])
    """

    idf: Tensor
    weight: Tensor
    bias: Tensor
    temperature: Tensor
    threshold: Tensor
    statistics: Tensor
    concentration: Tensor

    def __init__(self, vocab_size: int, languages: Sequence[str]) -> None:
        super().__init__()
        if len(set(languages)) != len(languages) or len(languages) < 2:
            raise MomeError(f"A router needs two or more different languages, not {list(languages)}.")
        if vocab_size < 1:
            raise MomeError(f"A router needs a vocabulary of one id or more, not {vocab_size}.")
        self.languages = tuple(languages)
        self.vocab_size = vocab_size
        for name, shape in _shapes(len(self.languages), vocab_size).items():
            start = torch.ones if name == "temperature" else torch.zeros
            self.register_buffer(name, start(shape, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Follow moves between devices, ignore changes of number type (see the class)."""
        device = fn(torch.empty(0, device=self.idf.device)).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = (
                    torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(dtype).to(device)
                )
        return self

    # ------------------------------------------------------------------------------------------ decisions

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of each sequence.

        Args:
            input_ids: whole numbers [B, T], ids in 0 … V-1; B and T may be 0.
            attention_mask: [B, T], 0 where a position does not count (padding, whatever id it holds); ``None``
                counts all.

        Returns:
            [B, L] float64: scikit-learn's ``decision_function``. Calibration does not change them.

        Raises:
            MomeError: an id that counts lies outside the vocabulary, or the shapes do not fit.
        """
        return self._logits(*self._checked(input_ids, attention_mask))

    @torch.no_grad()
    def probabilities(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Calibrated probability of each language, [B, L] float64; each row adds up to 1.

        Softmax of the logits over a temperature that depends on how many known tokens a sequence has (those
        with ``idf > 0``): :attr:`temperature`, linear in between in log2 of that number. Arguments and errors
        are those of :meth:`forward`.
        """
        ids, counted = self._checked(input_ids, attention_mask)
        known = self.idf[ids] > 0
        if counted is not None:
            known &= counted
        place = known.sum(1).clamp(1, 2 ** (_TEMPERATURES - 1)).to(self.bias.dtype).log2()
        below = place.long().clamp(max=_TEMPERATURES - 2)
        scale = torch.lerp(self.temperature[below], self.temperature[below + 1], place - below)
        return (self(input_ids, attention_mask) / scale[:, None]).softmax(1)

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Index into ``languages`` for each sequence, int64 [B]; the first wins a tie, as in scikit-learn.

        :data:`ABSTAIN` (-1) where the largest probability is less than :attr:`abstain_below`. Arguments, errors
        and decisions are those of :meth:`forward`, but most decisions need less than its logits.
        """
        ids, counted = self._checked(input_ids, attention_mask)
        chosen, left = self._decide(ids, counted)
        if len(left):
            rest = None if counted is None else counted[left]
            chosen[left] = self._logits(ids[left], rest).argmax(dim=1)
        if self.abstain_below is None:
            return chosen
        sure = self.probabilities(input_ids, attention_mask).amax(1) >= self.threshold
        return torch.where(sure, chosen, ABSTAIN)

    @property
    def abstain_below(self) -> float | None:
        """The probability that a route needs, more than 0 and at most 1; ``None`` never abstains.

        It is kept in the buffer ``threshold`` (0 for ``None``), so a model that owns the router keeps it too.

        Raises:
            MomeError: set to a number outside this range.
        """
        return float(self.threshold) or None

    @abstain_below.setter
    def abstain_below(self, value: float | None) -> None:
        if value is not None and not 0 < value <= 1:
            raise MomeError(f"abstain_below is a probability, more than 0 and at most 1, or None, not {value!r}.")
        self.threshold.fill_(value or 0.0)

    @torch.no_grad()
    def contributions(self, input_ids: Tensor) -> Tensor:
        """The exact share of each token in the logits of one sequence.

        Args:
            input_ids: whole numbers [T].

        Returns:
            [T, L] float64; the rows add up to ``logits - bias``.

        Raises:
            MomeError: as :meth:`forward`, or more than one sequence.
        """
        if input_ids.dim() != 1:
            raise MomeError(f"Contributions are those of one sequence [T], not of {tuple(input_ids.shape)}.")
        ids, _ = self._checked(input_ids[None], None)
        _, norm = self._bags(ids, None)
        return (self.weight[:, ids[0]] * self.idf[ids[0]]).T / norm

    # -------------------------------------------------------------------------------------------- counting

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids as int64 and the mask as bool, both [B, T]; masked positions hold id 0, and no mask is none."""
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.is_complex():
            raise MomeError(
                f"A router reads whole numbers [sequences, positions], not {input_ids.dtype} of shape "
                f"{tuple(input_ids.shape)}."
            )
        ids, counted = input_ids.long(), None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise MomeError(
                    f"The attention mask has the shape {tuple(attention_mask.shape)}, but the ids have "
                    f"{tuple(input_ids.shape)}: give it one number per position."
                )
            counted = attention_mask.bool()
            if counted.all():
                counted = None
            else:
                ids = ids.masked_fill(~counted, 0)
        if ids.numel():
            low, high = ids.aminmax()
            if low < 0 or high >= self.vocab_size:
                raise MomeError(
                    f"A token id lies outside the router's vocabulary of {self.vocab_size} ids: "
                    "use the tokenizer that the router was fitted with."
                )
        return ids, counted

    def _logits(self, ids: Tensor, counted: Tensor | None) -> Tensor:
        """:meth:`forward` after the check."""
        bag, norm = self._bags(ids, counted)
        return bag / norm + self.bias

    def _bags(self, ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """``weight · (c ∘ idf)`` [B, L] and ``‖c ∘ idf‖`` [B, 1] (1 for 0).

        There are two exact ways to them, over all V ids and over the T positions, and the cheaper one is taken. By
        positions, the squared norm is the sum of c idf², since an id comes c times: together (c idf)².
        """
        length, size = ids.shape[1], self.vocab_size
        dense, pairs = size <= _DENSE * length, _PAIRS * length**2 <= size
        # What one sequence needs: its counts or its comparisons, and where it looks up positions, their weights.
        need = size if dense else max(length**2 if pairs else size, length * len(self.languages), 1)
        rows = max(1, min(_WORKSPACE // need, len(ids)))
        table, ones = self.idf.new_zeros(rows, size if dense or not pairs else 0), self.idf.new_ones(rows, length)
        weight, squared = ((self.weight * self.idf).T, self.idf.square()) if dense else (self.weight, self.idf)
        bags, squares = [], []
        for start in range(0, max(len(ids), 1), rows):
            some = ids[start : start + rows]
            present = ones[: len(some)] if counted is None else counted[start : start + rows].to(ones.dtype)
            if dense:
                counts = table[: len(some)].zero_().scatter_add_(1, some, present)
                bags.append(counts @ weight)
                squares.append(counts.square_() @ squared)
            else:
                counts = _count_pairs(some, present) if pairs else _count_in(table[: len(some)], some, present)
                idf = self.idf.index_select(0, some.reshape(-1)).view_as(present).mul_(present)
                own = weight.gather(1, some.reshape(1, -1).expand(len(weight), -1)).view(len(weight), *some.shape)
                bags.append(own.mul_(idf).sum(-1).T)
                squares.append(counts.mul_(idf.square_()).sum(1))
        norm = torch.cat(squares)[:, None].sqrt_()
        return torch.cat(bags), torch.where(norm > 0, norm, 1.0)

    def _decide(self, ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """What can be decided without the logits: the largest of each sequence, int64 [B], and which are left open.

        Dividing by the norm leaves the order alone: the largest logit is the largest ``bag + norm · bias``. That is
        linear in the norm, so what is the largest at two norms is the largest at every norm between them. Two such
        bounds are sums over positions: the root of ``Σ idf²`` from below, since (c idf)² ≥ c idf²; from above, the
        Euclidean norm of ``Σ idf`` in each of a few groups of ids, since a² + b² ≤ (a + b)². So one float32
        ``embedding_bag`` gives all that is needed, and no id has to be counted.

        A float32 sum of T terms is off by at most T u times the sum of their sizes, u = 2⁻²⁴, and a few more
        roundings (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition, section 4.2). The sizes are at
        most ``|idf| (max |weight| + max |bias|)``; twice what that can amount to on both sides has to lie between.
        """
        # Too few ids for the table to be worth its making; and Metal has no embedding_bag to count on.
        if ids.numel() < self.vocab_size or ids.device.type == "mps":
            return self._logits(ids, counted).argmax(dim=1), ids.new_empty(0)
        number = len(self.languages)
        columns = torch.zeros(self.vocab_size, number + 1 + _GROUPS, dtype=torch.float32, device=ids.device)
        columns[:, :number] = (self.weight * self.idf).T
        columns[:, number] = self.idf.square()
        group = torch.arange(self.vocab_size, device=ids.device) % _GROUPS
        columns.scatter_(1, group[:, None] + number + 1, self.idf.float()[:, None])
        share = None if counted is None else counted.float()
        sums = nn.functional.embedding_bag(ids, columns, mode="sum", per_sample_weights=share).to(self.bias.dtype)
        bag, square, parts = sums.split((number, 1, _GROUPS), dim=1)
        norms = torch.stack((square.sqrt(), parts.norm(dim=1, keepdim=True)))
        best, chosen = (bag + norms * self.bias).topk(2, dim=2)
        size = parts.sum(dim=1) * (self.weight.abs().max() + self.bias.abs().max())
        error = 2 * (ids.shape[1] + 16) * 2.0**-24 * size + 1e-30
        sure = (best[..., 0] - best[..., 1] > 2 * error).all(dim=0) & (chosen[0, :, 0] == chosen[1, :, 0])
        sure &= norms.isfinite().all(dim=0).squeeze(1)  # sums that float32 cannot hold settle nothing
        return chosen[0, :, 0], (~sure).nonzero().squeeze(1)

    # --------------------------------------------------------------------------------------------- keeping

    def save(self, folder: Path | str) -> None:
        """Write ``router.safetensors`` (the buffers) and ``router.json`` (names, sizes, its hash)."""
        folder = Path(folder)
        data = safetensors.torch.save({
            name: buffer.detach().to("cpu", torch.float64).contiguous() for name, buffer in self.state_dict().items()
        })
        write_atomic(folder / "router.safetensors", data)
        description = {
            "format": _FORMAT, "version": _VERSION, "languages": list(self.languages),
            "vocab_size": self.vocab_size, "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_atomic(folder / "router.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> TokenRouter:
        """Read what :meth:`save` wrote. Nothing in the files is ever executed.

        Raises:
            DamagedArtifact: a file is missing, cut short, changed, of another format, or the two do not fit.
        """
        described, weights = Path(folder) / "router.json", Path(folder) / "router.safetensors"
        for file in (described, weights):
            if not file.is_file():
                raise _unreadable(file, "it is missing")
        try:
            facts = json.loads(described.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise _unreadable(described, "it is not JSON") from None
        if not isinstance(facts, dict) or (facts.get("format"), facts.get("version")) != (_FORMAT, _VERSION):
            raise _unreadable(described, f"it does not describe a '{_FORMAT}' of version {_VERSION}")
        languages, vocab_size = facts.get("languages"), facts.get("vocab_size")
        if not isinstance(languages, list) or not all(isinstance(name, str) for name in languages):
            raise _unreadable(described, "its languages are not a list of names")
        if len(set(languages)) != len(languages) or len(languages) < 2:
            raise _unreadable(described, "its languages are not two or more different names")
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise _unreadable(described, "its vocab_size is not a whole number of 1 or more")
        data = weights.read_bytes()
        if hashlib.sha256(data).hexdigest() != facts.get("sha256"):
            raise _unreadable(weights, "it is damaged or not the one that router.json names")
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, KeyError):  # KeyError: a number type that torch does not have
            raise _unreadable(weights, "it is not a safetensors file") from None
        shapes = _shapes(len(languages), vocab_size)
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise _unreadable(weights, f"it does not fit {len(languages)} languages and {vocab_size} ids")
        if not all(tensor.dtype == torch.float64 and tensor.isfinite().all() for tensor in tensors.values()):
            raise _unreadable(weights, "its tensors are not finite numbers in float64")
        never_negative = (tensors[name] for name in ("idf", "threshold", "statistics", "concentration"))
        if tensors["threshold"] > 1 or tensors["temperature"].min() <= 0 or any((t < 0).any() for t in never_negative):
            raise _unreadable(weights, "its tensors hold numbers that a router cannot have")
        router = cls(vocab_size, languages)
        router.load_state_dict(tensors)
        return router


def _shapes(languages: int, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every buffer of a router."""
    return {
        "idf": (vocab_size,), "weight": (languages, vocab_size), "bias": (languages,),
        "temperature": (_TEMPERATURES,), "threshold": (),
        "statistics": (languages, vocab_size), "concentration": (languages,),
    }


def _count_pairs(ids: Tensor, present: Tensor) -> Tensor:
    """How often the id of each position is present in its sequence: [n, T] from ids and present [n, T]."""
    return ((ids[:, :, None] == ids[:, None, :]).to(present.dtype) @ present[:, :, None]).squeeze(2)


def _count_in(table: Tensor, ids: Tensor, present: Tensor) -> Tensor:
    """:func:`_count_pairs` with a table [n, V] of zeros, which are zeros again afterwards."""
    counts = table.scatter_add_(1, ids, present).gather(1, ids)
    table.scatter_(1, ids, torch.zeros_like(counts))  # several times as fast as with one number
    return counts


def _unreadable(file: Path, why: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"The router file {file.parent.name}/{file.name} cannot be used, {why}: "
        "fit the router again with notebook 04."
    )
