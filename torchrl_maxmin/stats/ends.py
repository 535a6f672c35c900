"""Hold the ends of t intervals at any confidence, with the checks and warnings that intervals share."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit, logit

from torchrl_maxmin.stats.interval import CoverageWarning, Interval

__all__ = ["FEWEST_USERS", "MOST_EXTREME_RATE", "TEnds", "checked", "coverage_notes"]

#: Intervals were seen to miss their coverage below so many users, and for rates so far from one half.
FEWEST_USERS = 30
MOST_EXTREME_RATE = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class TEnds:
    """Ends of a t interval at any confidence: half^2 = sum of t(freedom)^2 variance over its parts.

    Attributes:
        mean: The estimate [...].
        parts: ``(variance [...], degrees of freedom)``, infinite for a normal part.
        scale: ``logit`` or ``identity``.
        count: Number of independent units, which bounds a rate of exactly 0 or 1.

    Example:
        >>> TEnds(np.float64(0), ((np.float64(1), np.inf),), "identity", 9)(0.95)[1].round(2)
        np.float64(1.96)
    """

    mean: np.ndarray
    parts: tuple[tuple[np.ndarray, float], ...]
    scale: str
    count: int

    def __call__(self, confidence: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Return lows and highs [...] at a two-sided confidence, or several that broadcast to them."""
        quantile = (1 + np.asarray(confidence)) / 2
        squares = [stats.t.ppf(quantile, max(df, 1)) ** 2 * variance for variance, df in self.parts]
        return _logit_ends(self.mean, np.sqrt(sum(squares)), self.scale, self.count, confidence)

    def interval(self, confidence: float, method: str, bootstrap: tuple[Any, Any], **fields: Any) -> Interval:
        """Make the interval at this confidence, which keeps the others."""
        error = np.sqrt(sum(variance for variance, _ in self.parts))
        low, high = self(confidence)
        return Interval(
            self.mean,
            low,
            high,
            method,
            *bootstrap,
            confidence=confidence,
            standard_error=error,
            freedom=max(self.parts[0][1], 1),
            ends_at=self,
            **fields,
        )


def checked(values: ArrayLike, dims: int, scale: str) -> np.ndarray:
    """Return values as float64, or say what is wrong with them: ``dims`` dimensions are clusters."""
    array = np.asarray(values, dtype=np.float64)
    shape = "[U, ...]" if dims == 1 else "[S, N, ...]"
    if array.ndim < dims or array.size == 0:
        raise ValueError(f"values must be {shape} and not empty, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("values hold NaN or infinity; drop those users or prompts first")
    if scale not in ("logit", "identity"):
        raise ValueError(f"scale is 'logit' (rates) or 'identity', not {scale!r}")
    if scale == "logit" and (array.min() < 0 or array.max() > 1):
        raise ValueError("rates must lie in [0, 1]; give scale='identity' for rewards and differences")
    return array


def _logit_ends(
    mean: np.ndarray, half: np.ndarray, scale: str, count: int, confidence: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    if scale == "identity":
        return mean - half, mean + half
    inside = np.clip(mean, 1e-12, 1 - 1e-12)
    width = half / (inside * (1 - inside))
    # Without any scatter (a policy against itself) there is no width either, and no rounding.
    low, high = (np.where(half == 0, mean, expit(logit(inside) + side * width)) for side in (-1, 1))
    # Never a loss in so many units: how often losses could be and still stay unseen.
    unseen = 1 - ((1 - np.asarray(confidence)) / 2) ** (1 / count)
    known = ~np.isnan(half)  # one unit says nothing of others: neither end, or a reader finds one of the two
    return np.where(known & (mean == 1), 1 - unseen, low), np.where(known & (mean == 0), unseen, high)


def coverage_notes(notes: list[str], mean: np.ndarray, scale: str, warn: bool) -> list[str]:
    """Add the note on extreme rates, and warn of all of them."""
    if scale == "logit" and np.any(np.abs(mean - 0.5) > MOST_EXTREME_RATE - 0.5):
        ends = f"above {MOST_EXTREME_RATE:g} or below {1 - MOST_EXTREME_RATE:.1f}"
        notes.append(f"a rate {ends}: the interval may be too narrow")
    for note in notes if warn else ():
        warnings.warn(note, CoverageWarning, stacklevel=3)
    return notes
