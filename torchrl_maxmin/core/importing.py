"""What the user names as ``module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["import_named"]


def import_named(spec: str) -> Any:
    """Import ``module:name``, also from the folder that the command was called in.

    Args:
        spec: the module and, after a colon, the name in it.

    Raises:
        ImportError, AttributeError, ValueError: if it leads nowhere; the caller tells what was looked for.

    Example:
        >>> import_named("math:floor")(2.5)
        2
    """
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not look where it is called from
        sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), name)
