"""The kernels that notebooks run in, one after another: a new one each, got ready while the one before it works.

Starting an interpreter, importing torch and transformers and ending it again takes some eight seconds, in which
nothing is computed: nine notebooks would wait for more than a minute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import zmq
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

__all__ = ["KEEP_MEMORY", "STATIC", "Kernels"]

#: Set in kernels without a reader, where :func:`mome_utils.widgets.explore` leaves its static figure alone.
STATIC = "MOME_STATIC"
#: Lets the C library keep the memory of freed tensors: a training step frees and takes the same few megabytes again
#: and again, and having them mapped and cleared anew costs up to a third of it. Kernels hand this on to workers.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
#: Imports what takes long and nearly every notebook needs, and leaves no name among the notebook's.
WARM = "for _name in ('models', 'figures', 'study'): __import__('mome_utils.' + _name)\ndel _name"


class _RunningInterpreter(KernelSpecManager):
    """Knows one kernel: the interpreter this process runs in, whatever else is installed under its name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())
        # Nobody is there to drag a slider; and a value of the reader's own goes before ours.
        spec.env = {**spec.env, STATIC: "1", **{k: v for k, v in KEEP_MEMORY.items() if k not in os.environ}}
        return spec


class Kernels:
    """A new kernel for each notebook; leaving the context ends what still runs.

    Example:
        >>> with Kernels(Path.cwd()) as kernels, kernels.lend() as kernel:
        ...     kernel.has_kernel
        True

    Args:
        root: working directory of the kernels.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._ready: AsyncKernelManager | None = None
        self._ending: list[tuple[AsyncKernelManager, AsyncKernelClient]] = []

    def __enter__(self) -> Kernels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        ready, self._ready = self._ready, None
        if ready is not None:  # it has nothing to lose
            run_sync(ready.shutdown_kernel)(now=True)
        self._wait_for_ends()

    def prepare(self) -> None:
        """Start the next kernel and let it import what it will need; returns at once."""
        if self._ready is None:
            self._ready = self._start(f"--IPKernelApp.exec_lines={WARM}")

    @contextmanager
    def lend(self) -> Iterator[AsyncKernelManager]:
        """A kernel for one notebook: the one that was prepared, or else a new one. It is not used again."""
        kernel, self._ready = self._ready, None
        if kernel is not None and not run_sync(kernel.is_alive)():  # memory was short, perhaps
            run_sync(kernel.cleanup_resources)()
            kernel = None
        kernel = kernel or self._start()
        try:
            yield kernel
        except BaseException:
            # It may still be at work on the cell that was interrupted: this waits until it is not.
            run_sync(kernel.shutdown_kernel)()
            raise
        self._wait_for_ends()
        # An exit like any other program's: what it shared with worker processes is put away. A request to shut down
        # would first kill these and their tracker, and leave files behind.
        client = kernel.client()
        client.start_channels(iopub=False, stdin=False, hb=False, control=False)
        client.execute("get_ipython().ask_exit()", silent=True)
        self._ending.append((kernel, client))

    def _start(self, *arguments: str) -> AsyncKernelManager:
        kernel = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=_RunningInterpreter(),
            transport_encryption="auto" if zmq.has("curve") else "disabled",
        )
        run_sync(kernel.start_kernel)(cwd=self._root, extra_arguments=list(arguments))
        return kernel

    def _wait_for_ends(self) -> None:
        """Wait for the kernels that were told to exit, and kill one that does not."""
        while self._ending:
            kernel, client = self._ending.pop()
            run_sync(kernel.finish_shutdown)()
            client.stop_channels()
            run_sync(kernel.cleanup_resources)()
