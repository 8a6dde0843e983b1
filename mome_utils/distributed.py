"""One run by several processes (data parallel training): who takes which part of a batch, and what all must agree on.

``accelerate launch`` starts the processes. Each holds the whole model and takes an equal share of every batch, in the
batch's own order: process r of P the sequences r·B/P … (r+1)·B/P − 1. torch averages the gradients, so the step is
that of the whole batch (Li et al., arXiv 2006.15704). What is read off a batch, its losses, is averaged here: the
history is that of one process up to rounding, and a rule for α decides the same everywhere.

In one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from mome_utils.config import MomeError

__all__ = ["Share", "averaged", "is_main", "join", "main_first", "processes", "wait"]


def join() -> None:
    """Meet the other processes of ``accelerate launch`` (gloo on processors, NCCL on GPUs); alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return not _together() or dist.get_rank() == 0


def wait() -> None:
    """Go on when every process has got here."""
    if _together():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """A block that the main process ends before the others begin it: what it wrote they find."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def averaged(value: Tensor) -> Tensor:
    """The mean over processes of a number of each, without gradient; in one process the number itself."""
    if not _together():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a step one process sees: some whole ones, or a part of one.

    Attributes:
        parts: micro-batches of the whole batch, m.
        processes: P. One of P and m divides the other.
        rank: of this process, from 0.
    """

    parts: int
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.parts % self.processes and self.processes % self.parts:
            raise MomeError(
                f"{self.parts} micro-batches cannot be shared by {self.processes} processes: choose a number of "
                "processes that divides the micro-batches, or is a multiple of them."
            )

    @property
    def mine(self) -> slice:
        """The micro-batches of which this process holds sequences."""
        count = max(1, self.parts // self.processes)
        first = self.rank * self.parts // self.processes
        return slice(first, first + count)

    @property
    def holders(self) -> int:
        """Processes that hold a part of the same micro-batch."""
        return max(1, self.processes // self.parts)

    def whole(self, rows: Sequence[Sequence[float]], device: torch.device) -> list[list[float]]:
        """Numbers of this process's micro-batches [n][m'] as those of all [n][m]; means over a micro-batch's holders.

        Every process calls it, and all get the same. In one process the numbers are returned as they are.
        """
        if self.processes == 1:
            return [list(row) for row in rows]
        own = torch.tensor(rows, dtype=torch.float64, device=device)
        found = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(found, own)
        means: list[list[float]] = torch.cat(found, 1).unflatten(1, (self.parts, -1)).mean(-1).tolist()
        return means
