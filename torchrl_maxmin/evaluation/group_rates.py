"""Win rates by group with clustered intervals: from win matrices, and from comparisons made by users."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.evaluation.clustered import (
    Interval,
    interval_over_seeds,
    interval_over_users,
    stack_intervals,
    worst_of,
)
from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES

__all__ = ["GroupRates", "rates_by_group", "user_win_rates"]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupRates:
    """Win rates by group with clustered intervals.

    Attributes:
        group_names: The G groups.
        groups: Win rates [G].
        worst_group_name: The group with the smallest one.
        worst_group: Its rate, and [smallest low, smallest high] over groups; the point estimate is biased
            low, and its ``notes`` say so.
        average: Unweighted mean over groups; None where groups have users of their own.
    """

    group_names: tuple[str, ...]
    groups: Interval
    worst_group_name: str
    worst_group: Interval
    average: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None."""
        return {
            "group_names": list(self.group_names),
            "groups": self.groups.to_dict(),
            "worst_group": self.worst_group_name,
            "worst_group_win_rate": self.worst_group.to_dict(),
            "average_win_rate": None if self.average is None else self.average.to_dict(),
        }


def rates_by_group(
    wins: ArrayLike,
    group_names: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> GroupRates:
    """Clustered intervals for a win matrix, such as judges gave.

    Args:
        wins: Win probabilities [S, N, G], or [N, G] of one seed.
        group_names: Names of the G groups; "0", "1", ... if None.
        confidence: Coverage asked for.
        num_resamples: Resamples of the bootstrap beside the interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: If shapes or names disagree, or a rate is NaN or outside [0, 1].

    Example:
        >>> import numpy as np
        >>> wins = np.random.default_rng(0).random((3, 50, 2)) ** [0.5, 2.0]
        >>> rates_by_group(wins, ["majority", "minority"]).worst_group_name
        'minority'
    """
    array = np.asarray(wins, dtype=np.float64)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise ValueError(f"wins must be [S, N, G] or [N, G], got {list(np.shape(wins))}")
    names = _names(group_names, array.shape[-1])
    settings: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    groups = interval_over_seeds(array, **settings)
    worst, worst_group = worst_of(groups)
    average = interval_over_seeds(array.mean(axis=-1), **settings)
    return GroupRates(names, groups, names[worst], worst_group, average)


def user_win_rates(
    wins: ArrayLike,
    users: Sequence[Any],
    groups: Mapping[Any, str] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> GroupRates:
    """Win rates by group from comparisons that people made: each user counts once.

    The population is that of the users, on prompts like these; where all answered the same few prompts the
    interval does not hold the chance of those.

    Args:
        wins: One outcome a comparison [P]: 1, 0, or one half for a tie; where both orders were shown, one
            row each.
        users: Who made it [P].
        groups: User -> group; all users are one group "all" if None.
        confidence: Coverage asked for.
        num_resamples: Resamples of the bootstrap beside the interval.
        seed: Seed of the resampling.

    Returns:
        :class:`GroupRates`, groups in order of first appearance.

    Raises:
        ValueError: If lengths disagree, a user has no group, or an outcome lies outside [0, 1].

    Example:
        >>> import numpy as np
        >>> wins = np.random.default_rng(0).random(400) < 0.7
        >>> users = np.repeat(np.arange(80), 5)
        >>> rates = user_win_rates(wins, users, {u: "old" if u < 30 else "young" for u in range(80)})
        >>> rates.groups.clusters
        {'users': [30, 50]}
    """
    outcomes, ids = np.asarray(wins, dtype=np.float64), list(users)
    if outcomes.ndim != 1 or len(outcomes) != len(ids) or not ids:
        raise ValueError(f"wins [P] and users [P] must be as many: {list(outcomes.shape)} and {len(ids)}")
    index = {user: i for i, user in enumerate(dict.fromkeys(ids))}
    rows = np.array([index[user] for user in ids])
    means = np.bincount(rows, outcomes) / np.bincount(rows)
    named: dict[str, list[int]] = {}
    for user, i in index.items():
        if groups is not None and user not in groups:
            raise ValueError(f"user {user!r} has no group")
        named.setdefault("all" if groups is None else str(groups[user]), []).append(i)
    settings: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    found = stack_intervals([interval_over_users(means[of], **settings) for of in named.values()])
    worst, worst_group = worst_of(found)
    names = tuple(named)
    return GroupRates(names, found, names[worst], worst_group)


def _names(group_names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(map(str, range(count) if group_names is None else group_names))
    if len(names) != count:
        raise ValueError(f"{len(names)} group names for {count} groups")
    return names
