"""Hold a number with its interval, put groups together, and find the worst one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.stats.worst import bias_of_smallest, ends_of_smallest

__all__ = ["SCHEMA_VERSION", "CoverageWarning", "Interval", "ends_of_worst", "stack_intervals", "worst_of"]

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
        confidence: How often ``low`` and ``high`` are to hold the truth.
        standard_error: Of the estimate [...]; None where no one number says it.
        freedom: Degrees of freedom of the standard error, one or one a group.
        correlation: Mean correlation of the errors of two groups, which are last in [...].
        ends_at: Maps a two-sided confidence to ends like ``low`` and ``high``; None where there are none.
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
    confidence: float = 0.95
    standard_error: np.ndarray | None = None
    freedom: float | np.ndarray = np.inf
    correlation: float | np.ndarray = 0.0
    ends_at: Callable[..., tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(default=None, repr=False)

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


def stack_intervals(intervals: Sequence[Interval], correlation: float = 0.0) -> Interval:
    """Stack one interval a group into one [..., G], such as of groups with users of their own.

    Args:
        intervals: One a group.
        correlation: Mean correlation of two groups' errors; 0 where groups share neither users nor prompts.

    Raises:
        ValueError: If there is none.
    """
    if not intervals:
        raise ValueError("no groups to put together")
    units = dict.fromkeys(unit for interval in intervals for unit in interval.clusters)
    others = [interval.ends_at for interval in intervals]
    errors = [interval.standard_error for interval in intervals if interval.standard_error is not None]
    return Interval(
        **_each_number(
            lambda name: np.stack([getattr(each, name) for each in intervals], axis=-1), intervals[0]
        ),
        method=intervals[0].method,
        clusters={unit: [interval.clusters.get(unit) for interval in intervals] for unit in units},
        notes=tuple(dict.fromkeys(note for interval in intervals for note in interval.notes)),
        confidence=intervals[0].confidence,
        standard_error=np.stack(errors, axis=-1) if len(errors) == len(intervals) else None,
        freedom=np.array([interval.freedom for interval in intervals]),
        correlation=correlation,
        ends_at=None if None in others else functools.partial(_stacked_ends, others),
    )


def ends_of_worst(groups: Interval) -> tuple[np.ndarray, np.ndarray]:
    """Find lower and upper end [...] for the smallest true mean of groups [..., G]; see :func:`worst_of`.

    Raises:
        ValueError: If the interval has no standard error, or no ends at another confidence.
    """
    if groups.ends_at is None or groups.standard_error is None:
        raise ValueError("only an interval with standard_error and ends_at has ends for the worst group")
    return ends_of_smallest(
        groups.estimate,
        groups.standard_error,
        groups.ends_at,
        freedom=groups.freedom,
        correlation=groups.correlation,
        confidence=groups.confidence,
    )


def worst_of(groups: Interval) -> tuple[int, Interval]:
    """Find the worst group: its index, and an interval for the smallest of the groups' true means.

    Of many noisy means the smallest lies too low, and so does the smallest of their highs, most where groups
    are close. The ends allow for that, and for errors that groups share
    (:func:`~torchrl_maxmin.stats.worst.ends_of_smallest`).

    Simulated (`reproductions/coverage/worst.py`, 1000 studies a cell; the worst of 2, 4, 8 and 16 groups at
    .6, the others equal, .05 or .1 above, or spread over .2), a nominal 95% covers the true minimum .936 to
    .985 with 30 and 100 users a group and .958 to .994 with 3 and 6 seeds, whose groups share none or .8 of
    their effects. [Smallest low, smallest high] covers .92 / .82 / .70 in the worst cell of 4 / 8 / 16
    groups. A t interval over every seed's own minimum covers .89 / .72 with 3 / 6 seeds where two groups are
    equal: each minimum is biased low, and more seeds do not mend that.

    Args:
        groups: An interval over groups [G].

    Returns:
        ``(index, interval)``; its notes begin with the bias of its point estimate, an approximation, and its
        bootstrap ends are the smallest of the groups' own.

    Example:
        >>> import numpy as np
        >>> from torchrl_maxmin.stats import interval_over_users
        >>> rates = np.random.default_rng(0).binomial(20, [0.55, 0.5], size=(50, 2)) / 20
        >>> index, worst = worst_of(interval_over_users(rates))
        >>> index, worst.notes[0].split(": ")[1]
        (1, 'by about 0.0099, and 0.0099 if all were equal')
    """
    count, index = len(np.atleast_1d(groups.estimate)), int(np.argmin(groups.estimate))
    notes = list(groups.notes)
    ends: dict[str, Any] = {}
    if count > 1:
        if groups.ends_at is None or groups.standard_error is None:
            notes.insert(0, f"the upper end is the smallest of {count} highs, too low where groups are close")
        else:
            found = ends_of_worst(groups)
            ends = dict(zip(("low", "high"), found, strict=True))
        notes.insert(0, _bias_note(groups, count))
    worst = dataclasses.replace(
        groups,
        **_each_number(lambda name: np.min(getattr(groups, name)), groups) | ends,
        notes=tuple(notes),
        per_seed=None if groups.per_seed is None else groups.per_seed.min(axis=-1),
        # Those of one group; the smallest of several has neither.
        standard_error=None,
        ends_at=None,
    )
    return index, worst


def _bias_note(groups: Interval, count: int) -> str:
    note = f"the smallest of {count} noisy means is biased low, most where the groups are close"
    if groups.standard_error is None:
        return note
    about, most = bias_of_smallest(groups.estimate, groups.standard_error, float(groups.correlation))
    return note if np.isnan(most) else f"{note}: by about {about:.2g}, and {most:.2g} if all were equal"


def _stacked_ends(ends: Sequence[Any], confidence: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Groups' ends [..., G] at one confidence, or at confidences [..., 1]."""
    level = np.asarray(confidence)
    low, high = zip(*(each(level[..., 0] if level.ndim else level) for each in ends), strict=True)
    return np.stack(low, axis=-1), np.stack(high, axis=-1)


def _each_number(make: Callable[[str], Any], like: Interval) -> dict[str, Any]:
    return {name: make(name) for name in _NUMBERS if getattr(like, name) is not None}
