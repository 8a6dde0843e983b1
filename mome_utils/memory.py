"""What the C library does with memory that tensors give back."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

#: ``mallopt`` parameters and the largest number it takes (glibc's malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 2**31 - 1


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
