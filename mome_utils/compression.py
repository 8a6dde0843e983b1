"""A general-purpose compressor as an opponent: what a byte costs without any model of language."""

from __future__ import annotations

import lzma
from collections.abc import Iterable

__all__ = ["lzma_bits_per_byte"]


def lzma_bits_per_byte(train: Iterable[str], test: Iterable[str]) -> float:
    """Bits per byte of LZMA (preset 9) for the test texts, with the training texts as its dictionary.

    The training texts are compressed alone and followed by the test texts; the difference is what the test texts
    cost an encoder that has seen the training texts. A raw stream: no file header is counted.
    """
    seen, new = "".join(train).encode(), "".join(test).encode()
    if not new:
        raise ValueError("there is no test text to compress")
    return 8 * (_size(seen + new) - _size(seen)) / len(new)


def _size(payload: bytes) -> int:
    return len(lzma.compress(payload, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]))
