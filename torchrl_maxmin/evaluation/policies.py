"""Summarise one policy, and every two: rates, utilities, KL, length and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.stats.clustered import interval_of_statistic, interval_over_seeds
from torchrl_maxmin.stats.interval import Interval
from torchrl_maxmin.stats.rates import GroupWinRates, rates_by_group

__all__ = [
    "BASELINE",
    "NO_INTERVAL",
    "headline",
    "length_correlation",
    "pairs_summary",
    "policy_summary",
    "win_matrices",
]

#: The policy trained on one reward for all.
BASELINE = "single"

#: The entry of an interval that cannot be computed.
NO_INTERVAL: Mapping[str, None] = dict.fromkeys(
    ("mean", "low", "high", "bootstrap_low", "bootstrap_high", "method")
)


def win_matrices(results: Sequence[SeedResult], policy: str, other: str) -> np.ndarray:
    """Stack the win matrices of the seeds [S, N, G]."""
    return np.stack([result.win_matrix(policy, other) for result in results])


def headline(key: str, interval: Interval | None) -> dict[str, Any]:
    """Make the two entries of a number: itself, and its interval as ``<key>_interval``."""
    if interval is None:
        return {key: None, f"{key}_interval": NO_INTERVAL}
    return {key: interval.estimate, f"{key}_interval": interval.to_dict()}


def policy_summary(
    policy: str, results: Sequence[SeedResult], names: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Summarise one policy over the seeds that hold it.

    Args:
        policy: Its name.
        results: All seeds, sorted.
        names: The groups.
        settings: Confidence, resamples and seed of the intervals.
    """
    results = [result for result in results if policy in result.policies]
    rates = _rates(results, policy, REFERENCE, names, settings)
    rows: dict[int, dict[str, Any]] = {result.seed: {"seed": result.seed} for result in results}

    def by_seed(interval: Interval, of: Sequence[SeedResult] = results) -> Any:
        return zip((rows[result.seed] for result in of), np.asarray(interval.per_seed), strict=True)

    for row, rate in by_seed(rates.groups):
        row["win_rate_vs_sft"] = dict(zip(names, rate, strict=True))
        row |= {"worst_group_win_rate": rate.min(), "average_win_rate": rate.mean()}
        row["average_over_groups"] = rate.mean()
    assert rates.average_over_people is not None
    for row, rate in by_seed(rates.average_over_people):
        row["average_over_people"] = rate
    out: dict[str, Any] = {
        "win_rate_vs_sft": _by_group(names, rates.groups),
        "utility": dict.fromkeys(names),  # judges that compare pairs say nothing of size
        "utility_interval": dict.fromkeys(names, NO_INTERVAL),
        **_totals(rates),
        "notes": list(rates.worst_group.notes),
    }
    if all(result.utilities for result in results):
        utility = _mean_over_samples(results, "utilities", policy, settings)
        out["utility"] = dict(zip(names, utility.estimate, strict=True))
        out["utility_interval"] = _by_group(names, utility)
        for row, value in by_seed(utility):
            row["utility"] = dict(zip(names, value, strict=True))
    with_baseline = [result for result in results if BASELINE in result.policies]
    if with_baseline:
        against = _rates(with_baseline, policy, BASELINE, names, settings).groups
        out["win_rate_vs_single"] = _by_group(names, against)
        for row, value in by_seed(against, with_baseline):
            row["win_rate_vs_single"] = dict(zip(names, value, strict=True))
    for key in ("kl", "length"):
        measured = all(policy in getattr(result, key) for result in results)
        interval = _mean_over_samples(results, key, policy, settings) if measured else None
        out |= headline(key, interval)
        if interval is not None:
            for row, value in by_seed(interval):
                row[key] = value
    out["length_correlation"] = _length_correlation(policy, results, names, settings)
    out["per_seed"] = list(rows.values())
    return out


def pairs_summary(
    policies: Sequence[str], results: Sequence[SeedResult], names: Sequence[str], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Compare every policy with every later one on shared prompts, over the seeds that hold both.

    Arguments are those of :func:`policy_summary`.
    """
    out = []
    for other, policy in combinations(policies, 2):
        if both := [r for r in results if policy in r.policies and other in r.policies]:
            rates = _rates(both, policy, other, names, settings)
            pair = {"policy": policy, "other": other, "seeds": [result.seed for result in both]}
            out.append(pair | {"win_rate": _by_group(names, rates.groups), **_totals(rates)})
    return out


def length_correlation(rewards: np.ndarray, length: np.ndarray, **settings: Any) -> Interval | None:
    """Correlate length with reward within prompts: near 1, length alone earns the reward.

    Both are centred prompt by prompt, so that prompts which ask for long answers do not count. The
    interval is that of the bootstrap over seeds and prompts, with few seeds too narrow.

    Args:
        rewards: [S, N, M] float64.
        length: [S, N, M] float64.
        **settings: Confidence, resamples and seed.

    Returns:
        The interval, or None where nothing varies in a prompt.
    """
    x, y = (array - array.mean(axis=2, keepdims=True) for array in (length, rewards))
    moments = np.stack([(x * y).mean(axis=2), (x * x).mean(axis=2), (y * y).mean(axis=2)], axis=-1)

    def correlation(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return means[..., 0] / np.sqrt(means[..., 1] * means[..., 2])

    if not np.isfinite(correlation(moments.mean(axis=(0, 1)))):
        return None
    return interval_of_statistic(moments, correlation, scale="percentile", **settings)


def _rates(
    results: Sequence[SeedResult], policy: str, other: str, names: Sequence[str], settings: Mapping[str, Any]
) -> GroupWinRates:
    # The notes say, policy by policy, what would be a warning.
    shares = [result.group_shares for result in results]
    return rates_by_group(win_matrices(results, policy, other), names, shares, warn=False, **settings)


def _totals(rates: GroupWinRates) -> dict[str, Any]:
    totals = {"worst_group": rates.worst_group_name} | headline("worst_group_win_rate", rates.worst_group)
    # The older name is one that other programs read.
    for key in ("average_win_rate", "average_over_groups"):
        totals |= headline(key, rates.average_over_groups)
    return totals | headline("average_over_people", rates.average_over_people)


def _mean_over_samples(
    results: Sequence[SeedResult], field: str, policy: str, settings: Mapping[str, Any]
) -> Interval:
    """Average a field of the records over samples, prompts and seeds."""
    values = [getattr(result, field)[policy].mean(axis=1, dtype=np.float64) for result in results]
    return interval_over_seeds(np.stack(values), scale="identity", **settings)


def _by_group(names: Sequence[str], interval: Interval) -> dict[str, dict[str, Any]]:
    return {name: interval.to_dict(k) for k, name in enumerate(names)}


def _length_correlation(
    policy: str, results: Sequence[SeedResult], names: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Correlate length with each group's utility, or give the reason why that is not known."""
    reason = None
    if not all(result.utilities for result in results):
        reason = "judges compared pairs and gave no utilities"
    elif not all(policy in result.length for result in results):
        reason = "lengths were not given"
    elif len({result.length[policy].shape for result in results}) > 1:
        reason = "seeds hold different numbers of samples"
    elif results[0].length[policy].shape[1] < 2:
        reason = "one sample a prompt: length and utility cannot be compared within a prompt"
    if reason:
        return {name: {**NO_INTERVAL, "reason": reason} for name in names}
    length = np.stack([result.length[policy] for result in results]).astype(np.float64)
    utility = np.stack([result.utilities[policy] for result in results]).astype(np.float64)
    missing = {**NO_INTERVAL, "reason": "every prompt's responses are of one length or one utility"}
    found = {name: length_correlation(utility[..., k], length, **settings) for k, name in enumerate(names)}
    return {name: missing if interval is None else interval.to_dict() for name, interval in found.items()}
