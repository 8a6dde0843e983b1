"""What the C library does with memory that tensors give back, and how much a process holds."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

__all__ = ["keep_freed_memory", "peak_resident_bytes", "release_freed_memory", "reset_peak", "resident_bytes"]

#: ``mallopt`` parameters and the largest number it takes (glibc's malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 2**31 - 1
_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def keep_freed_memory() -> bool:
    """Let this process reuse what its large tensors free, instead of returning it to the system each time.

    The GNU C library asks the system for every block above 32 MiB and returns it when it is freed. The system hands
    out such a block page by page, emptied: a batch whose logits pass that size pays for this in every step, and one
    of half its size does not. Memory that is kept counts as resident until the process ends.

    Returns:
        Whether it took effect; False with another C library, which decides for itself.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, _LARGEST) for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)]
    return taken == [1, 1]


def release_freed_memory() -> None:
    """Return to the system what the GNU C library keeps of freed memory; with another C library nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Memory of this process that is resident now; 0 where the system does not say (it is read from Linux's /proc)."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most memory that was resident at once since :func:`reset_peak`; 0 where the system does not say."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin anew to look for the peak (Linux; elsewhere nothing happens)."""
    if _PEAK.exists():
        _PEAK.write_text("5", encoding="ascii")


def _status(name: str) -> int:
    """An entry of the process's status, in bytes (proc(5))."""
    if not _STATUS.exists():
        return 0
    values = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(values.get(name, "0").split()[0])
