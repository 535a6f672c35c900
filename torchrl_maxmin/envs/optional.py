"""MO-Gymnasium, which is optional: imported where it is used, and missed with one message."""

from __future__ import annotations

import importlib
import os
from typing import Any

from torchrl_maxmin.core.errors import UserError

__all__ = ["require_mo_gymnasium"]


def require_mo_gymnasium(purpose: str, module: str = "mo_gymnasium") -> Any:
    """Import a module of MO-Gymnasium, which registers its environments with gymnasium.

    Args:
        purpose: what needs it, the start of the message.
        module: which one.

    Returns:
        The module.

    Raises:
        UserError: if MO-Gymnasium is not installed.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise UserError(
            f"{purpose} needs MO-Gymnasium, which cannot be imported ({missing}): "
            "pip install 'torchrl-maxmin[mo]'"
        ) from missing
