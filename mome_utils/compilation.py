"""Whether ``torch.compile`` can be used on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

__all__ = ["compiler", "resolve_compile"]


def compiler() -> bool:
    """Whether ``torch.compile`` finds what it needs: a C++ compiler, and on a GPU Triton."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return False
    return any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl"))))


def resolve_compile(wanted: bool) -> bool:
    """What a profile's ``compile`` means here: part of a run's spec, since compiled sums round elsewhere."""
    return wanted and compiler()
