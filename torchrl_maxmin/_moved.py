"""Import paths of release 0.1, which warn and lead to where things are now (``moved.yaml``)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install", "moved_names"]

_PACKAGE = "torchrl_maxmin."


@cache
def _table() -> dict[str, str]:
    """Return new places by old ones: ``module`` or ``module:name``."""
    import yaml  # not before an old path is asked for

    return yaml.safe_load(Path(__file__).with_name("moved.yaml").read_text())


def moved_names(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module that names have moved out of."""
    old = module.removeprefix(_PACKAGE)

    def find(name: str) -> Any:
        table = _table()
        place = table.get(f"{old}:{name}") or (f"{table[old]}:{name}" if old in table else None)
        if place is None or name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new, _, attribute = place.partition(":")
        found = getattr(import_module(_PACKAGE + new), attribute)
        text = f"{module}.{name} is now {_PACKAGE}{new}.{attribute}; this path goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return found

    return find


class _Moved(MetaPathFinder, Loader):
    """Finds modules that are no more: empty ones, whose names lead on."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        old = fullname.removeprefix(_PACKAGE)
        known = old != fullname and any(key == old or key.startswith(f"{old}:") for key in _table())
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = moved_names(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Let the old paths be imported, where nothing else is found under them."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
