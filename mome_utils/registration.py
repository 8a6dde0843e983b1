"""The mixture tells transformers' Auto classes that it exists, without loading transformers itself.

``import mome_utils`` must stay light (the command line answers ``--help`` at once), and yet after it
``AutoModelForCausalLM.from_pretrained`` must know the mixture. transformers has no public way to register a class
that is not loaded. So a finder waits for transformers' registry of configurations: as soon as it has been imported,
by whomever, the mixture's configuration is imported too, which registers itself there and needs little more than the
registry. Whoever loads a model makes its configuration first, and that imports the model, which registers itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_model", "register_when_needed"]

_REGISTRY = "transformers.models.auto.configuration_auto"
_CONFIG, _MODEL = "mome_utils.moe_config", "mome_utils.moe"


class _Then(Loader):
    """Loads a module as its own loader does, and then imports one module more."""

    def __init__(self, own: Loader, follower: str) -> None:
        self.own = own
        self.follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own  # who asks later (for the source, say) gets the loader that knows
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        importlib.import_module(self.follower)


class _Registry(MetaPathFinder):
    """Finds transformers' registry where it is, and has the mixture's configuration registered after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, _CONFIG)
        return spec


def register_when_needed() -> None:
    """Register the mixture's configuration with transformers, now or as soon as its registry is loaded.

    Calling it again changes nothing.
    """
    if _REGISTRY in sys.modules:
        importlib.import_module(_CONFIG)
    elif not any(isinstance(finder, _Registry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registry())


def register_model() -> None:
    """Register the mixture's model with transformers (the configuration does it when one is made)."""
    importlib.import_module(_MODEL)
