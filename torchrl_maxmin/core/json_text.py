"""JSON that every reader takes: numbers that JSON has no word for are null."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.errors import UserError

__all__ = ["complete", "json_text", "plain", "write_json_text"]


def plain(value: Any) -> Any:
    """Make plain JSON: arrays and tensors to lists, NaN and infinity to None.

    Example:
        >>> plain({"mean": float("nan"), 1: (2, 3.5)})
        {'mean': None, '1': [2, 3.5]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy and torch
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(content: Any, indent: int | None = 2) -> str:
    """Format content as JSON (RFC 8259), other alphabets as they are.

    Args:
        content: what :func:`plain` takes.
        indent: spaces a level; None writes one line.

    Raises:
        TypeError: for an object that is no JSON.

    Example:
        >>> json_text({"loss": float("inf"), "group": "für"}, indent=None)
        '{"loss": null, "group": "für"}'
    """
    return json.dumps(plain(content), indent=indent, allow_nan=False, ensure_ascii=False)


def write_json_text(path: Path, content: Any) -> None:
    """Write content as a JSON file; half a character becomes its own escape, which JSON reads back."""
    path.write_text(json_text(content) + "\n", encoding="utf-8", errors="backslashreplace")


@contextmanager
def complete(path: Path) -> Iterator[None]:
    """Whatever is missing from a summary, or is not what was written there, as one :class:`UserError`.

    Args:
        path: of the file.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not what was written there ({type(error).__name__}: {error}); it was changed or "
            "damaged: run the verb that wrote it again"
        ) from error
