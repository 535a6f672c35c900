"""The frontier between groups: what a policy gives the worst group, and what that costs the majority.

Policies that were trained with the same budget and answered the same held-out prompts become points
(:func:`frontier_points`). From them: which point, or which mixture of points, serves the worst group best at
a bounded cost to the majority (:func:`best_within`, :func:`best_mixture`), and whether one policy lies on or
above the frontier of others (:func:`compare_with_sweep`). All intervals are those of
:mod:`torchrl_maxmin.stats.interval`: t over seeds plus the component of the prompts that all share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog

from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.stats.changes import paired_change
from torchrl_maxmin.stats.clustered import interval_over_seeds
from torchrl_maxmin.stats.interval import Interval, worst_of
from torchrl_maxmin.stats.rates import GroupWinRates, rates_by_group, win_matrix

__all__ = [
    "FrontierPoint",
    "SweepComparison",
    "best_mixture",
    "best_within",
    "compare_with_sweep",
    "exact_frontier",
    "frontier_point",
    "frontier_points",
    "frontier_rows",
    "verdict",
    "worst_group_change",
]


@dataclasses.dataclass(frozen=True, eq=False)
class FrontierPoint:
    """One policy, or a mixture of several, against the reference.

    Attributes:
        name: The policy.
        wins: Win probabilities against the reference [S seeds, N prompts, G groups].
        gains: Mean utility less that of the reference [S, N, G].
        rates: Win rates by group, of the worst group and on average, with intervals.
        gain: Utility gains by group [G].
        worst_gain: The gain of the group that gained least.
        majority: Index of the group with the largest share.
        kl: KL to the reference in nats; None where it was not measured.
        shares: Of the people, [G] or [S, G]; None counts groups alike.
    """

    name: str
    wins: np.ndarray
    gains: np.ndarray
    rates: GroupWinRates
    gain: Interval
    worst_gain: Interval
    majority: int
    kl: Interval | None = None
    shares: ArrayLike | None = None

    @property
    def majority_rate(self) -> float:
        """The majority's win rate."""
        return float(self.rates.groups.mean[self.majority])

    @property
    def worst_rate(self) -> float:
        """The worst group's win rate; biased low where groups are close."""
        return float(self.rates.worst_group.mean)


@dataclasses.dataclass(frozen=True)
class SweepComparison:
    """A policy beside the best of a sweep, for the worst group.

    Attributes:
        best: The sweep's policy whose worst group does best. It was chosen by the numbers that it is compared
            on, which favours the sweep.
        change: The policy's worst group less the best's, paired by prompt.
        on_or_above: Whether the interval of ``change`` reaches 0 or lies above.
    """

    best: str
    change: Interval
    on_or_above: bool


def frontier_point(
    name: str,
    wins: ArrayLike,
    gains: ArrayLike,
    group_names: Sequence[str],
    majority: int,
    kl: ArrayLike | None = None,
    shares: ArrayLike | None = None,
) -> FrontierPoint:
    """A point from win probabilities and utility gains, prompt by prompt.

    Args:
        name: The policy.
        wins: [S, N, G].
        gains: [S, N, G].
        group_names: Names of the G groups.
        majority: Index of the largest group.
        kl: log pi - log pi_ref by prompt [S, N].
        shares: Of the people [G], or [S, G]; the same for all groups if None.

    Raises:
        ValueError: If shapes disagree, or ``majority`` is no group.
    """
    won, gained = np.asarray(wins, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if won.ndim != 3 or won.shape != gained.shape:
        raise ValueError(f"wins and gains must both be [S, N, G]: {list(won.shape)}, {list(gained.shape)}")
    if not 0 <= majority < won.shape[2]:
        raise ValueError(f"majority {majority} is none of {won.shape[2]} groups")
    gain = interval_over_seeds(gained, scale="identity")
    divergence = None if kl is None else interval_over_seeds(kl, scale="identity")
    rates = rates_by_group(won, group_names, np.ones(won.shape[2]) if shares is None else shares)
    return FrontierPoint(name, won, gained, rates, gain, worst_of(gain)[1], majority, divergence, shares)


def frontier_points(
    results: Sequence[SeedResult], policies: Iterable[str] | None = None, reference: str = REFERENCE
) -> dict[str, FrontierPoint]:
    """Points of policies that the same seeds trained and measured on the same prompts.

    Args:
        results: One record a seed.
        policies: Which; all but the reference if None.
        reference: Whom win rates and gains are against.

    Returns:
        Policy name -> :class:`FrontierPoint`, in the order of ``policies``.

    Raises:
        ValueError: Without results, or where a policy or group is missing in a seed.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> def utilities(shift):
        ...     return rng.normal(size=(50, 4, 2)) + shift
        >>> results = [
        ...     SeedResult(seed, ["many", "few"], [0.9, 0.1],
        ...                {"sft": utilities(0), "single": utilities([2, -1]), "maxmin": utilities(1)})
        ...     for seed in range(2)
        ... ]
        >>> points = frontier_points(results)
        >>> points["maxmin"].worst_rate > points["single"].worst_rate
        True
    """
    if not results:
        raise ValueError("no results: nothing to draw a frontier of")
    first = results[0]
    names = [name for name in first.policies if name != reference] if policies is None else list(policies)
    for result in results:
        if missing := [name for name in (reference, *names) if name not in result.utilities]:
            raise ValueError(f"seed {result.seed}: policy {missing[0]!r} was not measured")
        if list(result.group_names) != list(first.group_names):
            raise ValueError(f"seeds {first.seed} and {result.seed} name other groups")
    majority = int(np.argmax(first.group_shares))
    base = [result.utilities[reference] for result in results]
    points = {}
    for name in names:
        own = [result.utilities[name] for result in results]
        measured = all(name in result.kl for result in results)
        points[name] = frontier_point(
            name,
            np.stack([win_matrix(one, other) for one, other in zip(own, base, strict=True)]),
            np.stack([one.mean(axis=1) - other.mean(axis=1) for one, other in zip(own, base, strict=True)]),
            first.group_names,
            majority,
            np.stack([result.kl[name].mean(axis=1) for result in results]) if measured else None,
            [result.group_shares for result in results],
        )
    return points


def frontier_rows(points: Iterable[FrontierPoint]) -> list[dict[str, Any]]:
    """Plain numbers of points: win rates and gains by group, worst and averages, each with its interval."""

    def ends(key: str, interval: Interval, index: int | None = None) -> dict[str, float]:
        names = {"": "mean", " low": "low", " high": "high"}
        values = {end: getattr(interval, attribute) for end, attribute in names.items()}
        return {key + end: float(v if index is None else v[index]) for end, v in values.items()}

    rows = []
    for point in points:
        row: dict[str, Any] = {"policy": point.name, "worst group": point.rates.worst_group_name}
        row |= ends("worst", point.rates.worst_group)
        for key in ("average_over_groups", "average_over_people"):
            row |= ends(key.replace("_", " "), getattr(point.rates, key))
        for k, name in enumerate(point.rates.group_names):
            row |= ends(name, point.rates.groups, k)
        row |= ends("worst gain", point.worst_gain)
        for k, name in enumerate(point.rates.group_names):
            row |= ends(f"{name} gain", point.gain, k)
        row["kl"] = None if point.kl is None else float(point.kl.mean)
        rows.append(row)
    return rows


def worst_group_change(point: FrontierPoint, baseline: FrontierPoint) -> Interval:
    """The worst group's win rate less the baseline's worst group's, paired by seed and prompt.

    Which group is the worst may differ between the two; it is taken from each one's pooled rates.

    Raises:
        ValueError: If seeds or prompts differ in number.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> def point(name, rates):
        ...     wins = rng.random((1, 200, 2)) < rates
        ...     return frontier_point(name, wins, wins, ["many", "few"], majority=0)
        >>> change = worst_group_change(point("maxmin", [0.7, 0.7]), point("single", [0.9, 0.2]))
        >>> bool(change.low > 0.3)
        True
    """

    def worst(which: FrontierPoint) -> np.ndarray:
        return which.wins[..., int(np.argmin(which.rates.groups.mean))]

    return paired_change(worst(point), worst(baseline))


def verdict(change: Interval) -> str:
    """``better`` or ``worse`` where the interval of a change says so, else ``not told apart``."""
    if change.low > 0:
        return "better"
    return "worse" if change.high < 0 else "not told apart"


def compare_with_sweep(point: FrontierPoint, sweep: Iterable[FrontierPoint]) -> SweepComparison:
    """Whether a policy is on or above a sweep's frontier for the worst group, within intervals.

    Raises:
        ValueError: If the sweep is empty.
    """
    others = list(sweep)
    if not others:
        raise ValueError("the sweep holds no policy to compare with")
    best = max(others, key=lambda other: other.worst_rate)
    change = worst_group_change(point, best)
    return SweepComparison(best.name, change, bool(change.high >= 0))


def best_within(
    points: Iterable[FrontierPoint], baseline: FrontierPoint, cost: float = 0.05
) -> FrontierPoint | None:
    """The policy that serves the worst group best while the majority keeps 1 - cost of its win rate.

    Args:
        points: Policies to choose from.
        baseline: Whose majority win rate is kept, usually the single-reward policy's.
        cost: Largest relative loss of the majority's win rate.

    Returns:
        The point, or None where each costs more. Chosen among several, its worst group is biased high.
    """
    floor = (1 - cost) * baseline.majority_rate
    kept = [point for point in points if point.majority_rate >= floor]
    return max(kept, key=lambda point: point.worst_rate) if kept else None


def best_mixture(
    points: Iterable[FrontierPoint], baseline: FrontierPoint, cost: float = 0.05
) -> tuple[dict[str, float], FrontierPoint] | None:
    """The same among mixtures: draw one of the policies for every response, with these probabilities.

    Win rates against a reference are linear in the policy, so the best mixture is a linear program: maximise
    t such that every group's rate is at least t and the majority's at least (1 - cost) of the baseline's.

    Args:
        points: Policies to mix, on the same seeds and prompts.
        baseline: Whose majority win rate is kept.
        cost: Largest relative loss of the majority's win rate.

    Returns:
        Probabilities by name, those above a thousandth, and the mixture as a point; None where every mixture
        costs more.

    Example:
        >>> import numpy as np
        >>> def point(name, rates):
        ...     wins = np.broadcast_to(rates, (1, 2, 2))
        ...     return frontier_point(name, wins, wins, ["many", "few"], majority=0)
        >>> single, maxmin = point("single", [0.9, 0.2]), point("maxmin", [0.8, 0.7])
        >>> probabilities, mixture = best_mixture([single, maxmin], single)
        >>> {name: round(p, 3) for name, p in probabilities.items()}, round(mixture.worst_rate, 3)
        ({'single': 0.55, 'maxmin': 0.45}, 0.425)
    """
    known = list(points)
    if not known:
        return None
    rates = np.stack([point.rates.groups.mean for point in known], axis=1)  # [G, P]
    num_groups, count = rates.shape
    floor = (1 - cost) * baseline.majority_rate
    found = linprog(
        c=np.r_[np.zeros(count), -1.0],
        A_ub=np.r_[np.c_[-rates, np.ones(num_groups)], [np.r_[-rates[baseline.majority], 0.0]]],
        b_ub=np.r_[np.zeros(num_groups), -floor],
        A_eq=[np.r_[np.ones(count), 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    if not found.success:
        return None
    kept = np.where(found.x[:count] > 1e-3, found.x[:count], 0.0)
    kept /= kept.sum()
    probabilities = {point.name: float(p) for point, p in zip(known, kept, strict=True) if p > 0}
    name = " + ".join(f"{p:.0%} {policy}" for policy, p in probabilities.items())
    wins, gains = (
        np.tensordot(kept, np.stack([getattr(point, field) for point in known]), 1)
        for field in ("wins", "gains")
    )
    return probabilities, frontier_point(
        name,
        np.clip(wins, 0, 1),
        gains,
        known[0].rates.group_names,
        baseline.majority,
        shares=known[0].shares,
    )


def exact_frontier(
    rewards: ArrayLike, beta: float, weights: ArrayLike, log_reference: ArrayLike | None = None
) -> np.ndarray:
    """What the best policy of each weighting gives every group, where responses can be enumerated.

    For fixed weights w the best policy is pi_ref exp(w . r / beta) / Z; its F_u = E[r_u] - beta KL is exact.
    :func:`~torchrl_maxmin.welfare.solve_dual` gives the weights of the max-min optimum.

    Args:
        rewards: [X, n, K].
        beta: KL weight, positive.
        weights: One weighting a row [W, K].
        log_reference: log pi_ref [X, n]; uniform if None.

    Returns:
        F_u by weighting, prompt and group [W, X, K] float64.

    Example:
        >>> found = exact_frontier([[[1.0, 0.0], [0.0, 1.0]]], 0.1, [[1.0, 0.0], [0.5, 0.5]])
        >>> found[:, 0].round(2).tolist()
        [[0.93, -0.07], [0.5, 0.5]]
    """
    from torchrl_maxmin.diagnosis.exact import policy_utilities, tilted_policy  # torch, only for this

    values = np.asarray(rewards, dtype=np.float64)
    return np.stack(
        [
            policy_utilities(tilted_policy(values @ w, beta, log_reference), values, beta, log_reference)
            for w in np.asarray(weights, dtype=np.float64)
        ]
    )
