"""The mixture tells transformers' Auto classes that it exists, without loading transformers itself.

``import mome_utils`` must stay light (the command line answers ``--help`` at once), and yet after it
``AutoModelForCausalLM.from_pretrained`` must know the mixture. transformers has no public way to register a class
that is not loaded. So a finder waits for transformers' registries: as soon as one has been imported, by whomever,
the module that registers the mixture there is imported too. A registry that is there already is served at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import MappingProxyType, ModuleType

__all__ = ["REGISTRIES", "register_when_needed"]

#: transformers' registries, and the module of ours that registers the mixture in each.
REGISTRIES = MappingProxyType({
    "transformers.models.auto.configuration_auto": "mome_utils.moe_config",
    "transformers.models.auto.modeling_auto": "mome_utils.moe",
})


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


class _Registries(MetaPathFinder):
    """Finds transformers' registries where they are, and has the mixture registered after their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, REGISTRIES[fullname])
        return spec


def register_when_needed() -> None:
    """Register the mixture with those of transformers' registries that are loaded, and with the others once they are.

    Calling it again changes nothing.
    """
    if not any(isinstance(finder, _Registries) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registries())
    for registry, follower in REGISTRIES.items():
        if registry in sys.modules:
            importlib.import_module(follower)
