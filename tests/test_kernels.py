"""Kernels one after another: the next is ready and has imported, each is a process of its own, and none stays."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from mome_utils.kernels import Kernels

STATE = ("import os, sys; names = sorted(n for n in globals() if n.startswith('_name') or n == 'mome_utils');"
         "print(os.getpid(), 'transformers.models.gpt2.modeling_gpt2' in sys.modules, names, os.getcwd())")


def asked(kernel: AsyncKernelManager, code: str) -> str:
    """What a kernel prints."""
    client = kernel.client()
    client.start_channels()
    printed: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        printed.append(message["content"].get("text", ""))

    try:
        run_sync(client.wait_for_ready)(timeout=120)
        run_sync(client.execute_interactive)(code, output_hook=hear, timeout=120)
    finally:
        client.stop_channels()
    return "".join(printed).strip()


def process_of(kernel: AsyncKernelManager | None) -> int:
    """A local kernel's process number."""
    assert kernel is not None
    return int(kernel.provisioner.pid)  # type: ignore[union-attr]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_next_kernel_has_imported_what_notebooks_need_and_left_no_names(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        with kernels.lend() as kernel:
            first, imported, names, folder = asked(kernel, STATE).split(" ")
            assert (imported, names, folder) == ("False", "[]", str(tmp_path))
            kernels.prepare()
            kernels.prepare()
        with kernels.lend() as kernel:
            second, imported, names, folder = asked(kernel, STATE).split(" ")
            assert (imported, names, folder) == ("True", "[]", str(tmp_path))
        assert first != second
        kernels.prepare()
    assert not is_running(int(first)) and not is_running(int(second))


def test_a_prepared_kernel_that_died_is_replaced(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        kernels.prepare()
        process = process_of(kernels._ready)
        os.kill(process, signal.SIGKILL)
        ended = time.monotonic() + 30
        while run_sync(kernels._ready.is_alive)() and time.monotonic() < ended:  # type: ignore[union-attr]
            time.sleep(0.05)
        with kernels.lend() as kernel:
            assert asked(kernel, "print(6 * 7)") == "42"


def test_a_kernel_whose_notebook_failed_is_ended_at_once(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        with pytest.raises(ZeroDivisionError), kernels.lend() as kernel:
            process = int(asked(kernel, "import os; print(os.getpid())"))
            raise ZeroDivisionError
        assert not is_running(process)


def test_a_kernel_with_workers_ends_by_itself_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = ("import os, time; from joblib import Parallel, delayed\n"
            "def work(): time.sleep(1); return os.getpid()\n"
            "print(*Parallel(2)([delayed(work)()] * 2))")
    with Kernels(tmp_path) as kernels:
        with kernels.lend() as kernel:
            workers = {int(number) for number in asked(kernel, code).split(" ")}
        assert len(workers) == 2
        limit = time.monotonic() + 30
        while (run_sync(kernel.is_alive)() or any(map(is_running, workers))) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not run_sync(kernel.is_alive)() and not any(map(is_running, workers))
    assert capfd.readouterr().err == ""


def test_a_kernel_that_nobody_borrowed_is_ended(tmp_path: Path) -> None:
    with Kernels(tmp_path) as kernels:
        kernels.prepare()
        process = process_of(kernels._ready)
        assert is_running(process)
    assert not is_running(process)
