"""Win rates and accuracies by group with clustered intervals, from utilities, judgements and people."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.stats.clustered import interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.crossed import interval_over_users_and_prompts, prompt_ids, shared_correlation
from torchrl_maxmin.stats.interval import Interval, stack_intervals, worst_of

__all__ = [
    "GroupWinRates",
    "accuracy_by_group",
    "group_win_rates",
    "over_people",
    "rates_by_group",
    "user_win_rates",
    "win_matrix",
]


def win_matrix(utilities: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """Count the share of sample pairs that each group prefers, prompt by prompt.

    For a prompt and a group, the mean over all M x M' pairs of
    1[u_policy > u_reference] + 1/2 1[u_policy = u_reference].

    Args:
        utilities: The policy's utilities [..., M, G].
        reference: The other policy's utilities [..., M', G], same prompts in the same order.

    Returns:
        [..., G] float64 in [0, 1].

    Raises:
        ValueError: If shapes disagree, a dimension is empty or a number is NaN.

    Example:
        >>> win_matrix([[[1.0], [0.0]]], [[[0.0], [0.0]]])
        array([[0.75]])
    """
    policy, other = np.asarray(utilities), np.asarray(reference)
    if policy.ndim < 3 or policy.ndim != other.ndim:
        raise ValueError(
            "utilities and reference must both be [N, M, G] (or [S, N, M, G]); got "
            f"{list(policy.shape)} and {list(other.shape)}"
        )
    if policy.shape[:-2] != other.shape[:-2] or policy.shape[-1] != other.shape[-1]:
        raise ValueError(
            "utilities and reference must share seeds, prompts and groups (only the number of samples may "
            f"differ); got {list(policy.shape)} and {list(other.shape)}"
        )
    if policy.size == 0 or other.size == 0:
        raise ValueError(f"nothing to compare: {list(policy.shape)} against {list(other.shape)}")
    if np.isnan(policy).any() or np.isnan(other).any():
        raise ValueError("utilities hold NaN, which a comparison would count as a loss; drop those samples")
    total = np.zeros((*policy.shape[:-2], policy.shape[-1]))
    # One sample at a time keeps memory at [S, N, M', G].
    for sample in range(policy.shape[-2]):
        own = policy[..., sample : sample + 1, :]
        total += (own > other).mean(axis=-2) + 0.5 * (own == other).mean(axis=-2)
    return total / policy.shape[-2]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupWinRates:
    """Win rates of one policy against another, by group.

    Attributes:
        group_names: The G groups.
        groups: Win rates [G].
        worst_group_name: The group with the smallest one.
        worst_group: Its rate with the interval of :func:`~torchrl_maxmin.stats.worst_of`; the point estimate
            is biased low, and its ``notes`` say by about how much.
        average_over_groups: Mean over groups, each counted once; None where groups have users of their own.
        average_over_people: Mean over groups weighted by their shares, so that each person counts once; the
            interval takes the shares as they are. Over the users themselves where they are known; None
            without either.
    """

    group_names: tuple[str, ...]
    groups: Interval
    worst_group_name: str
    worst_group: Interval
    average_over_groups: Interval | None = None
    average_over_people: Interval | None = None

    @property
    def average(self) -> Interval | None:
        """The average over groups, by its name until now."""
        warnings.warn(
            "GroupWinRates.average is average_over_groups; beside it stands average_over_people",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.average_over_groups

    @property
    def mean(self) -> np.ndarray:
        """Win rate by group [G]."""
        return self.groups.estimate

    @property
    def low(self) -> np.ndarray:
        """Lower ends by group [G]."""
        return self.groups.low

    @property
    def high(self) -> np.ndarray:
        """Upper ends by group [G]."""
        return self.groups.high

    @property
    def per_seed(self) -> np.ndarray | None:
        """Win rates by seed and group [S, G]; None without seeds."""
        return self.groups.per_seed


def group_win_rates(
    utilities: ArrayLike,
    reference: ArrayLike,
    *,
    group_names: Sequence[str] | None = None,
    shares: ArrayLike | None = None,
    **settings: Any,
) -> GroupWinRates:
    """Estimate win rates by group of a policy against a reference.

    The reference may be any other policy that answered the same prompts; ties count one half. ``low`` and
    ``high`` are the t interval over seeds plus the component of the prompts that all seeds share
    (:func:`~torchrl_maxmin.stats.interval_over_seeds`), which covers .954 to .967 with 3 seeds and .953 to
    .962 with 6; above .9 it warns. The worst group's interval is that of
    :func:`~torchrl_maxmin.stats.worst_of`, and its point estimate is biased low. With one seed all hold the
    chance of the prompts only.

    For comparisons that people made see :func:`user_win_rates`, for judges
    :func:`~torchrl_maxmin.evaluation.judges.judge_pairs`.

    Args:
        utilities: The policy's utilities [S seeds, N prompts, M samples, G groups] or [N, M, G].
        reference: The other policy's utilities, same prompts in the same order; M may differ.
        group_names: Names of the G groups; "0", "1", ... if None.
        shares: Shares of the people [G], or [S, G] where seeds have their own; for the average over people.
        **settings: ``confidence``, ``num_resamples`` of the bootstrap beside the interval, and its ``seed``.

    Returns:
        :class:`GroupWinRates`.

    Raises:
        ValueError: If shapes disagree, utilities hold NaN or shares are negative.

    Warns:
        CoverageWarning: For a rate above .9 or below .1.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> sft, better = rng.normal(size=(3, 100, 4, 2)), rng.normal(size=(3, 100, 4, 2)) + [1.0, 0.2]
        >>> rates = group_win_rates(better, sft, group_names=["majority", "minority"])
        >>> rates.worst_group_name, bool(rates.worst_group.low < rates.worst_group.estimate)
        ('minority', True)
    """
    matrix = win_matrix(utilities, reference)
    if matrix.ndim not in (2, 3):
        raise ValueError(f"utilities must be [S, N, M, G] or [N, M, G], got {list(np.shape(utilities))}")
    return rates_by_group(matrix, group_names, shares, **settings)


def over_people(values: np.ndarray, shares: ArrayLike) -> np.ndarray:
    """Weigh groups by their shares of the people.

    Args:
        values: [S, N, G].
        shares: [G], or [S, G] where seeds have their own; they need not add up to 1.

    Returns:
        [S, N].

    Raises:
        ValueError: If shapes disagree, or shares are negative or nothing.

    Example:
        >>> over_people(np.array([[[1.0, 0.0]]]), [10, 1]).round(3)
        array([[0.909]])
    """
    weights = np.asarray(shares, dtype=np.float64)
    if weights.shape not in (values.shape[-1:], (len(values), values.shape[-1])):
        raise ValueError(f"shares must be [G={values.shape[-1]}] or [S, G], got {list(weights.shape)}")
    total = weights.sum(axis=-1, keepdims=True)
    if not (weights >= 0).all() or not (total > 0).all():
        raise ValueError(f"shares must be at least 0 and not all 0, got {weights.tolist()}")
    weights = np.broadcast_to(weights / total, (len(values), values.shape[-1]))
    return np.einsum("sng,sg->sn", values, weights)


def rates_by_group(
    wins: ArrayLike,
    group_names: Sequence[str] | None = None,
    shares: ArrayLike | None = None,
    **settings: Any,
) -> GroupWinRates:
    """Estimate win rates from a win matrix, such as judges gave.

    Args:
        wins: Win probabilities [S, N, G], or [N, G] of one seed.
        group_names: Names of the G groups; "0", "1", ... if None.
        shares: As :func:`group_win_rates` takes them.
        **settings: Likewise.

    Raises:
        ValueError: If shapes or names disagree, shares are negative, or a rate is NaN or outside [0, 1].

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
    count = array.shape[-1]
    names = tuple(map(str, range(count) if group_names is None else group_names))
    if len(names) != count:
        raise ValueError(f"{len(names)} group names for {count} groups")
    groups = interval_over_seeds(array, **settings)
    worst, worst_group = worst_of(groups)
    average = interval_over_seeds(array.mean(axis=-1), **settings)
    people = None if shares is None else interval_over_seeds(over_people(array, shares), **settings)
    return GroupWinRates(names, groups, names[worst], worst_group, average, people)


def user_win_rates(
    wins: ArrayLike,
    users: Sequence[Any],
    groups: Mapping[Any, str] | None = None,
    prompts: Iterable[Any] | None = None,
    **settings: Any,
) -> GroupWinRates:
    """Estimate win rates by group from comparisons that people made: each user counts once.

    The population is that of the users and, with ``prompts``, that of the prompts, which users may share
    (:func:`~torchrl_maxmin.stats.crossed.interval_over_users_and_prompts`). Without, the interval is for
    prompts like these: where all answered the same few it does not hold the chance of those.

    Args:
        wins: One outcome a comparison [P]: 1, 0, or one half for a tie; where both orders were shown, one
            row each.
        users: Who made it [P].
        groups: User -> group; all users are one group "all" if None.
        prompts: What was answered [P]; None and empty ones are shared with nobody.
        **settings: As :func:`group_win_rates` takes them.

    Returns:
        :class:`GroupWinRates`, groups in order of first appearance.

    Raises:
        ValueError: If lengths disagree, a user has no group, or an outcome lies outside [0, 1].

    Warns:
        CoverageWarning: Under 30 users or 20 shared prompts in a group, or for a rate above .9 or below .1.

    Example:
        >>> import numpy as np
        >>> wins = np.random.default_rng(0).random(400) < 0.7
        >>> users = np.repeat(np.arange(80), 5)
        >>> of = {u: "old" if u < 30 else "young" for u in range(80)}
        >>> user_win_rates(wins, users, of).groups.clusters
        {'users': [30, 50]}
        >>> user_win_rates(wins, users, of, prompts=np.tile(np.arange(40), 10)).groups.clusters
        {'users': [30, 50], 'prompts': [40, 40]}
    """
    outcomes, ids = np.asarray(wins, dtype=np.float64), list(users)
    if outcomes.ndim != 1 or len(outcomes) != len(ids) or not ids:
        raise ValueError(f"wins [P] and users [P] must be as many: {list(outcomes.shape)} and {len(ids)}")
    index = {user: i for i, user in enumerate(dict.fromkeys(ids))}
    rows = np.array([index[user] for user in ids])
    named: dict[str, int] = {}
    for user in index:
        if groups is not None and user not in groups:
            raise ValueError(f"user {user!r} has no group")
        named.setdefault("all" if groups is None else str(groups[user]), len(named))
    of = np.array([named["all" if groups is None else str(groups[user])] for user in index])
    shown = None if prompts is None else prompt_ids(prompts)
    intervals = accuracy_by_group(outcomes, rows, of, len(named), prompts=shown, **settings)
    found = stack_intervals([one for one in intervals if one is not None])
    if shown is not None and found.standard_error is not None:
        shared = shared_correlation(outcomes, rows, shown, of[rows], found.standard_error)
        found = dataclasses.replace(found, correlation=shared)
    worst, worst_group = worst_of(found)
    quiet = settings | {"warn": False}  # the groups have said it
    people = accuracy_by_group(outcomes, rows, np.zeros(len(index)), 1, prompts=shown, **quiet)[0]
    return GroupWinRates(tuple(named), found, list(named)[worst], worst_group, average_over_people=people)


def accuracy_by_group(
    right: ArrayLike,
    row_users: ArrayLike,
    groups: ArrayLike,
    num_groups: int,
    *,
    row_weights: ArrayLike | None = None,
    prompts: Iterable[Any] | None = None,
    **settings: Any,
) -> list[Interval | None]:
    """Estimate how often a reward ranks pairs as the users of each group did, each user counted once.

    Args:
        right: Whether the chosen response got the larger reward [P]; one half for equal rewards. [P, ...]
            for several rewards at once.
        row_users: User of every pair [P], 0..U-1.
        groups: Group of every user [U].
        num_groups: K.
        row_weights: How much each pair counts [P]; a tie is both directions at one half.
        prompts: What each pair is about [P], so that prompts which users share are clusters too
            (:func:`~torchrl_maxmin.stats.crossed.interval_over_users_and_prompts`); None and empty ones are
            shared with nobody.
        **settings: As :func:`~torchrl_maxmin.stats.interval_over_users` takes them.

    Returns:
        One interval a group; None for a group without pairs.

    Raises:
        ValueError: If the prompts are not one a pair.

    Example:
        >>> found = accuracy_by_group([1, 1, 0, 1] * 30, [u // 4 for u in range(120)], [0] * 30, 2)
        >>> float(found[0].estimate), found[1]
        (0.75, None)
    """
    correct, users, of = np.asarray(right, dtype=np.float64), np.asarray(row_users), np.asarray(groups)
    weights = np.ones(len(users)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    ids = None if prompts is None else prompt_ids(prompts)
    if ids is not None and len(ids) != len(users):
        raise ValueError(f"{len(ids)} prompts for {len(users)} pairs; give one a pair")
    if not len(users):
        return [None] * num_groups
    total = np.bincount(users, weights, minlength=len(of))
    flat = (correct.reshape(len(users), -1) * weights[:, None]).T
    sums = np.stack([np.bincount(users, column, minlength=len(of)) for column in flat], axis=-1)
    found: list[Interval | None] = []
    for k in range(num_groups):
        mine = (of == k) & (total > 0)
        if not mine.any():
            found.append(None)
        elif ids is None:
            means = (sums[mine] / total[mine, None]).reshape(int(mine.sum()), *correct.shape[1:])
            found.append(interval_over_users(means, **settings))
        else:
            rows = mine[users]
            data = correct[rows], users[rows], ids[rows]
            found.append(interval_over_users_and_prompts(*data, row_weights=weights[rows], **settings))
    return found
