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
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mome_utils.config import MomeError

__all__ = [
    "Share", "averaged", "check_processes", "check_shards", "check_share", "is_main", "join", "main_first", "processes",
    "wait",
]


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


def check_processes(wanted: int, present: int) -> None:
    """Refuse a run that another number of processes than the present one has to train."""
    if present == wanted:
        return
    how = "alone, without accelerate launch" if wanted == 1 else (
        f"under accelerate launch --num_processes {wanted} (mome_utils/configs/README.md says how)"
    )
    raise MomeError(
        f"This run belongs to {wanted} process{'es' if wanted > 1 else ''}, and {present} would train it: sums, and so "
        f"results, depend on it. Train it {how}."
    )


def check_share(batch: int, parts: int, count: int, *, whole: bool, compiled: bool) -> None:
    """Refuse a batch that cannot be shared.

    Args:
        batch: sequences of a batch. parts: its micro-batches. count: processes.
        whole: the loss is not a mean over sequences, so no micro-batch may be divided.
        compiled: the run is to be compiled.
    """
    if count < 1 or batch % count:
        raise MomeError(
            f"A batch of {batch} sequences cannot be shared equally by {count} processes: choose a number that "
            "divides it."
        )
    if Share(parts, count).holders > 1 and whole:
        raise MomeError(
            f"A loss of the release looks at whole micro-batches, {parts} in a batch: train it with at most as many "
            f"processes, not {count}."
        )
    if compiled and count > 1:
        raise MomeError("A run of several processes is not compiled: set 'compiled' to false, or train it alone.")


def check_shards(kind: str, plugin: Any) -> None:
    """Refuse what does not work in shards: a model of this ``kind``, or other settings of accelerate's FSDP plugin."""
    if kind != "gpt2":
        raise MomeError("A mixture is not trained in shards (FSDP): its experts are small, so launch it without.")
    if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
        raise MomeError(
            "Training in shards needs 'fsdp_version: 2' and 'fsdp_state_dict_type: FULL_STATE_DICT' in the launch "
            "configuration: start with mome_utils/configs/accelerate_fsdp.yaml."
        )


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
