"""What the settings of all stages check alike."""

from __future__ import annotations

import math

from torchrl_maxmin.errors import UserError

__all__ = ["CheckedSettings"]


class CheckedSettings:
    """Base of dataclasses whose fields are flags; each check names the flag that is wrong."""

    def require_known(self, **choices: tuple[str, ...]) -> None:
        """Raise :class:`UserError` where a field holds none of the words it may."""
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"--{name} {value!r} is none of {', '.join(known)}")

    def require_in_range(self, low: float, high: float, *names: str) -> None:
        """Raise :class:`UserError` where a number is not between two others; a NaN never is."""
        for name in names:
            if not low <= getattr(self, name) <= high:
                bounds = "not be negative" if high == math.inf else f"be between {low:g} and {high:g}"
                raise UserError(f"--{name} must {bounds}")

    def require_positive(self, *names: str) -> None:
        """Raise :class:`UserError` where a count is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1")
