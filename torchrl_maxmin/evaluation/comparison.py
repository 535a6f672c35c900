"""Compare MaxMin with one reward for all: what the worst group gains, and what it costs whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.policies import BASELINE, NO_INTERVAL, headline, win_matrices
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.stats.changes import paired_change, relative_change
from torchrl_maxmin.stats.interval import Interval
from torchrl_maxmin.stats.rates import over_people

__all__ = ["MAXMIN", "ORACLE", "comparison_summary"]

#: The policy that the headline is about.
MAXMIN = "maxmin"
#: MaxMin on the true utilities.
ORACLE = "oracle"

#: Differences of the averages, beside those by group.
_CHANGES = ("average_over_groups_change", "average_over_people_change")

_ENDS = ("estimate", "low", "high", "bootstrap_low", "bootstrap_high", "per_seed")


def comparison_summary(
    results: Sequence[SeedResult], names: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare MaxMin with the baseline, and with MaxMin on the true utilities, by win rates against sft.

    Args:
        results: All seeds, sorted; a comparison is over those that hold both policies.
        names: The groups.
        settings: Confidence, resamples and seed of the intervals.

    Returns:
        Relative changes of the worst group, of the averages over groups and over people and of the majority,
        each with its interval; ``changes``, the difference of the win rates by group; ``people``, the shares
        of the people whose group gains and loses, and whose group's interval holds 0; the averages'
        differences as ``average_over_groups_change`` and ``average_over_people_change``; ``oracle_ratio``.
    """
    majority = int(np.argmax(np.mean([result.group_shares for result in results], axis=0)))
    out: dict[str, Any] = {"policy": MAXMIN, "baseline": BASELINE, "majority_group": names[majority]}
    rows: dict[int, dict[str, Any]] = {}
    both = _with_both(results, BASELINE)
    for key, change in _changes(both, BASELINE, majority, settings).items():
        out |= headline(key, change)
        for s, result in enumerate(both if change is not None else ()):
            rows.setdefault(result.seed, {"seed": result.seed})[key] = change.per_seed[s]
    out["per_seed"] = list(rows.values())
    out |= _people(both, names, settings)
    with_oracle = _with_both(results, ORACLE)
    gain = _changes(with_oracle, ORACLE, majority, settings)["worst_group_relative_gain"]
    if gain is not None:
        ratio = dataclasses.replace(gain, **{end: getattr(gain, end) + 1 for end in _ENDS})
        out |= headline("oracle_ratio", ratio)
        by_seed = zip((result.seed for result in with_oracle), ratio.per_seed, strict=True)
        out["oracle_ratio_per_seed"] = [{"seed": seed, "oracle_ratio": value} for seed, value in by_seed]
    return out


def _with_both(results: Sequence[SeedResult], other: str) -> list[SeedResult]:
    return [r for r in results if MAXMIN in r.policies and other in r.policies]


def _changes(
    both: Sequence[SeedResult], other: str, majority: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Relative changes from another policy; None without seeds that hold both."""
    statistic_of: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "worst_group_relative_gain": lambda means: means.min(axis=-1),
        "average_over_groups_relative_change": lambda means: means.mean(axis=-1),
        "majority_relative_change": lambda means: means[..., majority],
    }
    more = "average_relative_gain", "average_over_people_relative_change"
    found: dict[str, Any] = dict.fromkeys((*statistic_of, *more))
    if not both:
        return found
    maxmin, others = (win_matrices(both, policy, REFERENCE) for policy in (MAXMIN, other))
    shares = [result.group_shares for result in both]
    for key, statistic in statistic_of.items():
        found[key] = relative_change(maxmin, others, statistic, **settings)
    # The older name is one that other programs read.
    found["average_relative_gain"] = found["average_over_groups_relative_change"]
    ours, theirs = (over_people(wins, shares) for wins in (maxmin, others))
    found["average_over_people_relative_change"] = relative_change(ours, theirs, **settings)
    return found


def _people(both: Sequence[SeedResult], names: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Say how many people gain and lose: shares of the groups whose interval of the change leaves 0 out."""
    if not both:
        averages = headline(_CHANGES[0], None) | headline(_CHANGES[1], None)
        return {"changes": dict.fromkeys(names, NO_INTERVAL), "people": None} | averages
    maxmin, others = (win_matrices(both, policy, REFERENCE) for policy in (MAXMIN, BASELINE))
    change: Interval = paired_change(maxmin, others, **settings)
    shares = np.mean([result.group_shares for result in both], axis=0)
    kinds = {"gain": change.low > 0, "lose": change.high < 0}
    people = {kind: float(shares[which].sum()) for kind, which in kinds.items()}
    people["unsure"] = float(shares[~(kinds["gain"] | kinds["lose"])].sum())
    each = [result.group_shares for result in both]
    over = [(wins.mean(axis=-1), over_people(wins, each)) for wins in (maxmin, others)]
    out = {"changes": {name: change.to_dict(k) for k, name in enumerate(names)}, "people": people}
    assert change.per_seed is not None
    rows: list[dict[str, Any]] = [
        {"seed": result.seed, "changes": dict(zip(names, changes, strict=True))}
        for result, changes in zip(both, change.per_seed, strict=True)
    ]
    for key, ours, theirs in zip(_CHANGES, *over, strict=True):
        average = paired_change(ours, theirs, **settings)
        out |= headline(key, average)
        assert average.per_seed is not None
        for row, value in zip(rows, average.per_seed, strict=True):
            row[key] = value
    return out | {"changes_per_seed": rows}
