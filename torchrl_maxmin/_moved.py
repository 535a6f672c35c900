"""Import paths of release 0.1, which warn and lead to where things are now; they go with the next release."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MODULES", "install"]

#: module or room within ``torchrl_maxmin``, before and now
MODULES: dict[str, str] = {
    "modules": "models",
}


def _new_name(name: str) -> str | None:
    """Return where a module is now, by the longest of the paths that lead to it."""
    package, _, path = name.partition(".")
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        new = MODULES.get(".".join(parts[:length]))
        if new is not None:
            return ".".join([package, new, *parts[length:]])
    return None


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        new = _new_name(name) if name.startswith("torchrl_maxmin.") else None
        if new is None:
            return None
        warnings.warn(f"{name} is now {new}; this path goes with the next release", DeprecationWarning, 2)
        return ModuleSpec(name, self, origin=new)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(str(spec.origin))
        self._own = module.__spec__  # the import system writes its own over it
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


def install() -> None:
    """Let the old paths be imported; before all other finders, which would load a module twice."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
