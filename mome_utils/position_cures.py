"""Two cures for position bias (Ben Amor, Granitzer & Mitrović 2023, arXiv 2304.13567) as collators, and their controls.

A collator turns a list of examples, ``{"input_ids": [...], "labels": [...]}``, into a padded batch, so each of these
goes into any ``transformers.Trainer`` as its ``data_collator``:

- :class:`PlainCollator`: as the data have it;
- :class:`RandomPositionShift` (RPS): the position ids of each sequence begin at a random offset;
- :class:`ContextPerturbation` (CP): the sequences of the batch are packed, in several random orders;
- :class:`LeftPadding`: a random number of padding tokens before each sequence, the control that needs no position ids.

The release takes the usual step and then a second one on the same batch, changed. So a cure also doubles the updates;
the control is the same batch twice. :class:`TwoSteps` and :class:`BatchesTwice` do this for any pair of collators.

Collators draw from a generator of their own: the same seed and the same calls give the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from mome_utils.config import MomeError
from mome_utils.models import IGNORED

__all__ = [
    "CURES", "BatchesTwice", "Collator", "ContextPerturbation", "LeftPadding", "PlainCollator", "RandomPositionShift",
    "TwoSteps", "make_collator", "pad_batch", "shifted_positions",
]

Example = Mapping[str, Sequence[int]]
Collator = Callable[[Sequence[Example]], dict[str, Tensor]]


def pad_batch(examples: Sequence[Example], pad: int, *, before: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Examples of different lengths as one batch, with padding behind them (and ``before[i]`` tokens before each).

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids`` (0, 1, …, padding counted), each ``[B, T]``.

    Raises:
        MomeError: no example, or one whose labels do not match its tokens.
    """
    if not examples:
        raise MomeError("A batch needs at least one example.")
    for example in examples:
        if len(example["input_ids"]) != len(example["labels"]):
            raise MomeError("An example has another number of labels than of tokens: give one label for each token.")
    starts = list(before) if before is not None else [0] * len(examples)
    length = max(start + len(e["input_ids"]) for start, e in zip(starts, examples, strict=True))
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, (start, example) in enumerate(zip(starts, examples, strict=True)):
        end = start + len(example["input_ids"])
        ids[row, start:end] = torch.tensor(example["input_ids"])
        labels[row, start:end] = torch.tensor(example["labels"])
        mask[row, start:end] = 1
    places = torch.arange(length).expand(len(examples), length).clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": places}


def shifted_positions(position_ids: Tensor, offsets: Tensor, anchors: int) -> Tensor:
    """Position ids ``[B, T]`` moved by an offset per row ``[B]``; the first ``anchors`` of each row stay in place."""
    moved = position_ids + offsets[:, None]
    moved[:, :anchors] = position_ids[:, :anchors]
    return moved


class PlainCollator:
    """Padding behind, positions from 0.

    Args:
        pad: id of the padding token.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return pad_batch(examples, self.pad)


class RandomPositionShift(PlainCollator):
    """Each sequence's positions begin at an offset drawn uniformly from all that keep it inside the model's.

    Args:
        pad: id of the padding token.
        max_positions: positions of the model.
        seed: of the offsets.
        anchors: special tokens at the begin of each sequence that keep their positions (one, as published).
    """

    def __init__(self, pad: int, max_positions: int, seed: int, anchors: int = 1) -> None:
        super().__init__(pad)
        self.max_positions = max_positions
        self.anchors = anchors
        self.draw = np.random.default_rng(seed)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A padded batch.

        Raises:
            MomeError: a sequence is longer than the model has positions.
        """
        batch = pad_batch(examples, self.pad)
        lengths = batch["attention_mask"].sum(1).numpy()
        _check_length(int(lengths.max()), self.max_positions)
        offsets = torch.from_numpy(self.draw.integers(0, self.max_positions - lengths + 1))
        places = shifted_positions(batch["position_ids"], offsets, self.anchors)
        # Padding is seen by nothing, but its positions must exist too.
        batch["position_ids"] = places.clamp(max=self.max_positions - 1)
        return batch


class ContextPerturbation(PlainCollator):
    """The sequences of the batch in random order, packed up to a maximum length; that several times over.

    In each permutation every token occurs once, with its label. A packed row begins with the special tokens of the
    first of its sequences; those of the others are left out, as inside one text.

    Args:
        pad: id of the padding token.
        max_length: tokens of a packed row at most.
        seed: of the orders.
        permutations: how many times the batch is packed.
        anchors: special tokens at the begin of each sequence.
    """

    def __init__(self, pad: int, max_length: int, seed: int, permutations: int = 2, anchors: int = 1) -> None:
        super().__init__(pad)
        if permutations < 1:
            raise MomeError(f"Context perturbation needs at least one permutation, not {permutations}.")
        self.max_length = max_length
        self.permutations = permutations
        self.anchors = anchors
        self.draw = np.random.default_rng(seed)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A padded batch of packed rows.

        Raises:
            MomeError: a sequence is longer than a row.
        """
        _check_length(max(len(e["input_ids"]) for e in examples), self.max_length)
        rows: list[dict[str, list[int]]] = []
        for _ in range(self.permutations):
            for first, index in enumerate(self.draw.permutation(len(examples))):
                own = {name: list(examples[index][name]) for name in ("input_ids", "labels")}
                added = len(own["input_ids"]) - self.anchors
                if first and len(rows[-1]["input_ids"]) + added <= self.max_length:
                    for name, values in own.items():
                        rows[-1][name] += values[self.anchors :]
                else:
                    rows.append(own)
        return pad_batch(rows, self.pad)


class LeftPadding(PlainCollator):
    """A random number of padding tokens before each sequence; position ids count them, attention does not see them.

    What position shifting does to absolute positions, at the price of longer batches, for models that take no position
    ids. The special tokens move along.

    Args:
        pad: id of the padding token.
        max_positions: positions of the model.
        seed: of the numbers of padding tokens.
    """

    def __init__(self, pad: int, max_positions: int, seed: int) -> None:
        super().__init__(pad)
        self.max_positions = max_positions
        self.draw = np.random.default_rng(seed)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A padded batch.

        Raises:
            MomeError: a sequence is longer than the model has positions.
        """
        lengths = np.array([len(e["input_ids"]) for e in examples])
        _check_length(int(lengths.max()), self.max_positions)
        before = self.draw.integers(0, self.max_positions - lengths + 1)
        return pad_batch(examples, self.pad, before=before.tolist())


class TwoSteps:
    """One collator for the first, third, … batch, another for the second, fourth, …; with :class:`BatchesTwice`."""

    def __init__(self, first: Collator, second: Collator) -> None:
        self.both = (first, second)
        self.calls = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        made = self.both[self.calls % 2](examples)
        self.calls += 1
        return made


class BatchesTwice(Sampler[int]):
    """Random order of the examples in which every batch comes ``times`` times in a row.

    Args:
        size: number of examples.
        batch_size: of the Trainer; an incomplete last batch of a pass is left out.
        passes: how many times the examples are gone through, each time in another order.
        seed: of the orders.
        times: how often a batch comes.
    """

    def __init__(self, size: int, batch_size: int, passes: int, seed: int, times: int = 2) -> None:
        if size < batch_size:
            raise MomeError(f"A batch of {batch_size} needs as many examples, and there are {size}.")
        self.size, self.batch_size, self.passes, self.seed, self.times = size, batch_size, passes, seed, times

    def __len__(self) -> int:
        return self.size // self.batch_size * self.batch_size * self.passes * self.times

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng(self.seed)
        for _ in range(self.passes):
            order = draw.permutation(self.size)
            for start in range(0, self.size - self.batch_size + 1, self.batch_size):
                yield from order[start : start + self.batch_size].tolist() * self.times


def _check_length(longest: int, limit: int) -> None:
    if longest > limit:
        raise MomeError(f"A sequence of {longest} tokens does not fit into {limit} positions: cut it first.")


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "plain": lambda pad, room, seed: PlainCollator(pad),
    "rps": RandomPositionShift,
    "cp": ContextPerturbation,
    "left": LeftPadding,
}
#: What a step can be.
CURES = tuple(_MAKERS)


def make_collator(name: str, *, pad: int, max_positions: int, seed: int) -> Collator:
    """A collator by its name in :data:`CURES`.

    Raises:
        MomeError: an unknown name.
    """
    if name not in _MAKERS:
        raise MomeError(f"There is no cure '{name}': choose one of {', '.join(CURES)}.")
    made: Collator = _MAKERS[name](pad, max_positions, seed)
    return made
