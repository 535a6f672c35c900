"""What a summary says of one policy, and of every two: rates, utilities, KL, length and their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.clustered import CoverageWarning, Interval, interval_over_seeds
from torchrl_maxmin.evaluation.group_rates import GroupRates, rates_by_group
from torchrl_maxmin.evaluation.metrics import length_correlation
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult

__all__ = ["BASELINE", "interval_to_read", "pairs_summary", "policy_summary", "win_matrices"]

#: The policy trained on one reward for all.
BASELINE = "single"


def win_matrices(results: Sequence[SeedResult], policy: str, other: str) -> np.ndarray:
    """Win matrices of the seeds [S, N, G]."""
    return np.stack([result.win_matrix(policy, other) for result in results])


def interval_to_read(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Ends of a summary's interval: t over seeds and prompts, and the bootstrap's where there is no t.

    Example:
        >>> interval_to_read({"low": 0.4, "high": 0.6, "t_low": 0.3, "t_high": 0.7})
        (0.3, 0.7)
        >>> interval_to_read({"low": 0.4, "high": 0.6, "t_low": None, "t_high": None})
        (0.4, 0.6)
    """
    if entry.get("t_low") is not None and entry.get("t_high") is not None:
        return entry["t_low"], entry["t_high"]
    return entry.get("low"), entry.get("high")


def policy_summary(
    policy: str, results: Sequence[SeedResult], names: Sequence[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """One policy over the seeds that hold it.

    Args:
        policy: Its name.
        results: All seeds, sorted.
        names: The groups.
        settings: Confidence, resamples and seed of the intervals.
    """
    results = [result for result in results if policy in result.policies]
    rates, per_seed = _rates(results, policy, REFERENCE, names, settings)
    out: dict[str, Any] = {
        "win_rate_vs_sft": _by_group(rates),
        **_utility(policy, results, names, settings, per_seed),
        "worst_group": rates.worst_group_name,
        **_with_interval("worst_group_win_rate", rates.worst_group),
        **_with_interval("average_win_rate", rates.average),
        "notes": list(rates.worst_group.notes),
    }
    with_baseline = [result for result in results if BASELINE in result.policies]
    if with_baseline:
        against, by_seed = _rates(with_baseline, policy, BASELINE, names, settings)
        out["win_rate_vs_single"] = _by_group(against)
        rows = {entry["seed"]: entry["win_rate"] for entry in by_seed}
        for entry in per_seed:
            if entry["seed"] in rows:
                entry["win_rate_vs_single"] = rows[entry["seed"]]
    for entry in per_seed:
        entry["win_rate_vs_sft"] = entry.pop("win_rate")
    for key in ("kl", "length"):
        out |= {key: None, f"{key}_interval": dict.fromkeys(("low", "high", "t_low", "t_high"))}
        if all(policy in getattr(result, key) for result in results):
            values = np.stack([getattr(r, key)[policy].mean(axis=1, dtype=np.float64) for r in results])
            out |= _with_interval(key, interval_over_seeds(values, scale="identity", **settings))
            for entry, value in zip(per_seed, values.mean(axis=1), strict=True):
                entry[key] = value
    out["length_correlation"] = _length_correlation(policy, results, names, settings)
    out["per_seed"] = per_seed
    return out


def pairs_summary(
    policies: Sequence[str], results: Sequence[SeedResult], names: Sequence[str], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every policy against every later one on the prompts that they share, over the seeds that hold both.

    Arguments are those of :func:`policy_summary`.
    """
    out = []
    for i, other in enumerate(policies):
        for policy in policies[i + 1 :]:
            both = [r for r in results if policy in r.policies and other in r.policies]
            if not both:
                continue
            rates, _ = _rates(both, policy, other, names, settings)
            out.append(
                {
                    "policy": policy,
                    "other": other,
                    "seeds": [result.seed for result in both],
                    "win_rate": _by_group(rates),
                    "worst_group": rates.worst_group_name,
                    **_with_interval("worst_group_win_rate", rates.worst_group),
                    **_with_interval("average_win_rate", rates.average),
                }
            )
    return out


def _rates(
    results: Sequence[SeedResult], policy: str, other: str, names: Sequence[str], settings: dict[str, Any]
) -> tuple[GroupRates, list[dict[str, Any]]]:
    """Rates over seeds, and seed by seed."""
    matrix = win_matrices(results, policy, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # the notes say it, policy by policy
        rates = rates_by_group(matrix, names, **settings)
    per_seed: list[dict[str, Any]] = [
        {
            "seed": result.seed,
            "win_rate": dict(zip(names, by_group, strict=True)),
            "worst_group_win_rate": by_group.min(),
            "average_win_rate": by_group.mean(),
        }
        for result, by_group in zip(results, matrix.mean(axis=1), strict=True)
    ]
    return rates, per_seed


def _utility(
    policy: str,
    results: Sequence[SeedResult],
    names: Sequence[str],
    settings: dict[str, Any],
    per_seed: list[dict[str, Any]],
) -> dict[str, Any]:
    """Mean utility by group; null where judges compared pairs, which says nothing of size."""
    nothing = dict.fromkeys(("low", "high", "t_low", "t_high"))
    if not all(result.utilities for result in results):
        return {"utility": dict.fromkeys(names), "utility_interval": dict.fromkeys(names, nothing)}
    values = np.stack([result.utilities[policy].mean(axis=1, dtype=np.float64) for result in results])
    interval = interval_over_seeds(values, scale="identity", **settings)
    for entry, value in zip(per_seed, values.mean(axis=1), strict=True):
        entry["utility"] = dict(zip(names, value, strict=True))
    return {
        "utility": dict(zip(names, interval.mean, strict=True)),
        "utility_interval": {name: _ends(interval, k) for k, name in enumerate(names)},
    }


def _length_correlation(
    policy: str, results: Sequence[SeedResult], names: Sequence[str], settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """How far length explains each group's utility within prompts, or the reason why that is not known."""
    reason = None
    if not all(result.utilities for result in results):
        reason = "judges compared pairs and gave no utilities"
    elif not all(policy in result.length for result in results):
        reason = "lengths were not given"
    elif len({result.length[policy].shape for result in results}) > 1:
        reason = "seeds hold different numbers of samples"
    elif results[0].length[policy].shape[1] < 2:
        reason = "one sample a prompt: length and utility cannot be compared within a prompt"
    nothing: dict[str, Any] = {"mean": None, "low": None, "high": None}
    if reason:
        return {name: {**nothing, "reason": reason} for name in names}
    length = np.stack([result.length[policy] for result in results]).astype(np.float64)
    utility = np.stack([result.utilities[policy] for result in results]).astype(np.float64)
    out = {}
    for k, name in enumerate(names):
        found = length_correlation(utility[..., k], length, **settings)
        why = "every prompt's responses are of one length or one utility"
        out[name] = {**nothing, "reason": why}
        if found is not None:
            out[name] = {"mean": found.mean, "low": found.low, "high": found.high}
    return out


def _by_group(rates: GroupRates) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": rates.groups.mean[k], **_ends(rates.groups, k)}
        for k, name in enumerate(rates.group_names)
    }


def _with_interval(key: str, value: Interval | None) -> dict[str, Any]:
    assert value is not None
    return {key: value.mean, f"{key}_interval": _ends(value)}


def _ends(interval: Interval, *index: int) -> dict[str, float]:
    return {
        "low": np.asarray(interval.bootstrap_low)[index],
        "high": np.asarray(interval.bootstrap_high)[index],
        "t_low": np.asarray(interval.low)[index],
        "t_high": np.asarray(interval.high)[index],
    }
