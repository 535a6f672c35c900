"""Numbers and their intervals as text, the same in every report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ends_text", "interval_text", "number_text"]


def number_text(value: float | None, spec: str) -> str:
    """Format a number, or n/a; what rounds to zero gets no minus.

    Example:
        >>> number_text(-0.0001, ".2f"), number_text(None, ".2f")
        ('0.00', 'n/a')
    """
    return "n/a" if value is None else format(value, spec.replace(".", "z.", 1))


def interval_text(interval: Mapping[str, Any], spec: str = ".3f") -> str:
    """Format an interval's number and its ends, where there are any.

    Example:
        >>> interval_text({"mean": 0.5, "low": 0.4, "high": 0.6}, ".1f")
        '0.5 [0.4, 0.6]'
    """
    ends = ends_text(interval, spec)
    return number_text(interval["mean"], spec) + (f" {ends}" if ends != "n/a" else "")


def ends_text(interval: Mapping[str, Any], spec: str, which: str = "") -> str:
    """Format an interval's ends, or the bootstrap's by ``which="bootstrap_"``."""
    low, high = interval[f"{which}low"], interval[f"{which}high"]
    return "n/a" if low is None or high is None else f"[{number_text(low, spec)}, {number_text(high, spec)}]"
