"""Check settings of all stages alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from torchrl_maxmin.core.errors import UserError

__all__ = ["LOGGERS", "CheckedSettings", "ReportSettings"]

#: loggers of TorchRL, and the packages that each needs
LOGGERS = {
    "csv": (),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


class CheckedSettings:
    """Base of dataclasses whose fields are flags; each check names the flag that is wrong."""

    def require_known(self, **choices: tuple[str, ...]) -> None:
        """Raise :class:`UserError` where a field holds none of the words it may."""
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"--{name} {value!r} is none of {', '.join(known)}")

    def require_in_range(self, low: float, high: float, *names: str) -> None:
        """Raise :class:`UserError` where a number is not between two others."""
        self._require(lambda value: low <= value <= high, f"be between {low:g} and {high:.10g}", names)

    def require_at_least(self, low: float, *names: str) -> None:
        """Raise :class:`UserError` where a number is below another, or not finite."""
        self._require(lambda value: low <= value, f"be at least {low:g}" if low else "not be negative", names)

    def require_positive(self, *names: str) -> None:
        """Raise :class:`UserError` where a number is not above 0, or not finite."""
        self._require(lambda value: value > 0, "be positive", names)

    def require_seed(self) -> None:
        """Raise :class:`UserError` for a ``seed`` that numpy and torch do not both take."""
        self.require_in_range(0, 2**32 - 1, "seed")

    def _require(self, holds: Callable[[float], bool], bounds: str, names: Iterable[str]) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None:  # left out
                continue
            if not math.isfinite(value):
                raise UserError(f"--{name} must be a finite number; it is {value}")
            if not holds(value):
                raise UserError(f"--{name} must {bounds}; it is {value}")


@dataclass(kw_only=True)
class ReportSettings(CheckedSettings):
    """Where a stage that trains sends its metrics beside ``metrics.jsonl``.

    Args:
        report_to: also log to csv, tensorboard, wandb, mlflow or trackio; the same names everywhere
            (docs/metrics.md). One that fails is left out, and ends no run.
    """

    report_to: str | None = None

    def check_report(self) -> None:
        """Raise :class:`UserError` for a logger that is unknown, or whose package is missing."""
        if self.report_to is None:
            return
        self.require_known(report_to=tuple(LOGGERS))
        if not all(find_spec(package) for package in LOGGERS[self.report_to]):
            raise UserError(f"--report_to {self.report_to} needs its package: pip install {self.report_to}")
