"""Hold a number with its interval, put groups together, and find the worst one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["SCHEMA_VERSION", "CoverageWarning", "Interval", "stack_intervals", "worst_of"]

#: Of summary.json. Since 2, ``low`` and ``high`` of every interval are the ones to read; since 3, averages
#: over groups and over people stand beside one another.
SCHEMA_VERSION = 3

_NUMBERS = ("estimate", "low", "high", "bootstrap_low", "bootstrap_high")


class CoverageWarning(UserWarning):
    """Warns that an interval may cover less often than it says."""


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """A number, or one a group, with the interval to read and the cluster bootstrap beside it.

    Attributes:
        estimate: The number [...].
        low: Lower end of the interval to read [...]; NaN where there is one cluster.
        high: Its upper end [...].
        method: What ``low`` and ``high`` are, such as ``t over seeds and prompts``.
        bootstrap_low: Lower end of the percentile interval of the cluster bootstrap [...]; None without one.
        bootstrap_high: Its upper end.
        clusters: How many of which unit, such as ``{"seeds": 3, "prompts": 200}``; a list by group where
            groups differ.
        notes: Why coverage may be short of nominal, or the estimate biased; plain sentences.
        per_seed: The estimate within each seed [S, ...]; None without seeds.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    method: str
    bootstrap_low: np.ndarray | None = None
    bootstrap_high: np.ndarray | None = None
    clusters: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    per_seed: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        """The estimate, by its name in ``summary.json``."""
        return self.estimate

    def to_dict(self, *index: int) -> dict[str, Any]:
        """Return ``{mean, low, high, bootstrap_low, bootstrap_high, method}``, of one group by its index."""
        arrays = {name: getattr(self, name) for name in _NUMBERS}
        numbers = {
            name: np.asarray(array)[index].tolist() for name, array in arrays.items() if array is not None
        }
        return {"mean": numbers.pop("estimate"), **numbers, "method": self.method}

    def to_list(self) -> list[float | None]:
        """Return ``[estimate, low, high]`` of one number, None for an end that is not known."""
        ends = (float(end) for end in (self.estimate, self.low, self.high))
        return [end if np.isfinite(end) else None for end in ends]


def stack_intervals(intervals: Sequence[Interval]) -> Interval:
    """Stack one interval a group into one [G], such as of groups with users of their own.

    Raises:
        ValueError: If there is none.
    """
    if not intervals:
        raise ValueError("no groups to put together")
    units = dict.fromkeys(unit for interval in intervals for unit in interval.clusters)
    return Interval(
        **_each_number(lambda name: np.stack([getattr(each, name) for each in intervals]), intervals[0]),
        method=intervals[0].method,
        clusters={unit: [interval.clusters.get(unit) for interval in intervals] for unit in units},
        notes=tuple(dict.fromkeys(note for interval in intervals for note in interval.notes)),
    )


def worst_of(groups: Interval) -> tuple[int, Interval]:
    """Find the worst group: its index, and [smallest of the lows, smallest of the highs].

    Simulated (`reproductions/coverage`, 2000 studies; the worse of two groups at .6, the other 0, .05 or .1
    above), a nominal 95% covers the true minimum .952 to .969 with 30 and 100 users, .959 to .977 with 3 and
    6 seeds. A t interval over every seed's own minimum covers .89 / .72 with 3 / 6 seeds where the groups are
    equal: each minimum is biased low (by .02 here), and more seeds do not mend that.

    Args:
        groups: An interval over groups [G].

    Returns:
        ``(index, interval)``; its notes begin with the bias of its point estimate.

    Example:
        >>> import numpy as np
        >>> from torchrl_maxmin.stats import interval_over_users
        >>> rates = np.random.default_rng(0).binomial(20, [0.8, 0.5], size=(50, 2)) / 20
        >>> index, worst = worst_of(interval_over_users(rates))
        >>> index, worst.notes
        (1, ('the smallest of 2 noisy means is biased low, most where the groups are close',))
    """
    count, index = len(np.atleast_1d(groups.estimate)), int(np.argmin(groups.estimate))
    bias = (f"the smallest of {count} noisy means is biased low, most where the groups are close",)
    worst = dataclasses.replace(
        groups,
        **_each_number(lambda name: np.min(getattr(groups, name)), groups),
        notes=(bias if count > 1 else ()) + groups.notes,
        per_seed=None if groups.per_seed is None else groups.per_seed.min(axis=-1),
    )
    return index, worst


def _each_number(make: Callable[[str], Any], like: Interval) -> dict[str, Any]:
    return {name: make(name) for name in _NUMBERS if getattr(like, name) is not None}
