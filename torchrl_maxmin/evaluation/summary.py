"""From one record a seed to ``summary.json``: results by group, with intervals, as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.aggregate import (
    calibration_summary,
    certificate_summary,
    em_summary,
    mean_tree,
    plain,
)
from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES, ClusterBootstrap, Estimate, estimate
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.win_rates import (
    GroupWinRates,
    compare_win_matrices,
    rates_from_win_matrix,
    win_matrix,
)

__all__ = ["BASELINE", "MAXMIN", "ORACLE", "summarise", "write_summary"]

#: The policy trained on one reward for all.
BASELINE = "single"
#: The policy that the headline is about.
MAXMIN = "maxmin"
#: MaxMin on the true utilities.
ORACLE = "oracle"

_COMPARISONS = ("worst_group_relative_gain", "average_relative_gain", "majority_relative_change")


def summarise(
    results: Sequence[SeedResult],
    *,
    wall_seconds: float | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Content of ``summary.json``.

    Headline numbers are plain numbers; beside each stands ``<key>_interval`` with ``low``/``high`` (the
    percentile interval of the seeds-then-prompts bootstrap) and, for the win rates and the comparison,
    ``t_low``/``t_high`` (the t interval over seeds, null with one seed). ``per_seed`` lists hold the same
    keys seed by seed. What cannot be computed is null. The same records give the same bytes.

    A policy that only some seeds hold is summarised over those seeds, and compared over the seeds that
    hold both.

    These entries of ``SeedResult.extra`` are read; all others come back under ``extra``, seed by seed:

    * ``em``: numbers (``user_accuracy``, ``num_groups_selected``, ``heldout_log_likelihood``, ...) or lists
      and dicts of numbers. Averaged over seeds; ``<key>_min`` is added for plain numbers;
      ``num_groups_selected`` is the most frequent choice.
    * ``certificate``: ``{value, low, high, reason}``. Over seeds: mean value, smallest low, largest high;
      null if one seed's is, with that seed's reason.
    * ``calibration``: ``{used, worst_group: {convention: group}}`` and/or ``utilities: {convention: {group:
      number}}`` (the worst group is then the smallest).
    * ``group_users``: users in each group, a list [G]; the first seed's are reported.
    * ``timings``: ``{stage: seconds}``, averaged.

    Args:
        results: One record a seed, all on the same held-out prompts.
        wall_seconds: Wall time of the whole run, as measured outside.
        confidence: Coverage asked for.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        A dict of plain JSON.

    Raises:
        ValueError: If there is no result, seeds repeat, or groups or prompts differ between seeds.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> def utilities(shift):
        ...     return rng.normal(size=(50, 2, 2)) + shift
        >>> results = [
        ...     SeedResult(seed, ["long", "short"], [0.9, 0.1],
        ...                {"sft": utilities(0), "single": utilities([2, -1]), "maxmin": utilities(1)})
        ...     for seed in range(2)
        ... ]
        >>> summarise(results)["comparison"]["worst_group_relative_gain"] > 1.0
        True
    """
    results = _checked(results)
    first = results[0]
    names = list(first.group_names)
    shares = np.mean([result.group_shares for result in results], axis=0).tolist()
    seeds = [int(result.seed) for result in results]
    bootstraps: dict[int, ClusterBootstrap] = {}

    def bootstrap_for(count: int) -> ClusterBootstrap:
        # One set of resamples a number of seeds: policies on the same seeds are compared paired.
        if count not in bootstraps:
            bootstraps[count] = ClusterBootstrap(
                count, first.num_prompts, num_resamples=num_resamples, seed=seed
            )
        return bootstraps[count]

    policies = {
        policy: _policy_summary(policy, results, names, bootstrap_for, confidence)
        for policy in _ordered_policies(results)
    }
    users = first.extra.get("group_users")
    known = {"em", "certificate", "calibration", "group_users", "timings"}
    summary = {
        "seeds": seeds,
        "num_prompts": first.num_prompts,
        "confidence": confidence,
        "num_resamples": num_resamples,
        "wall_seconds": wall_seconds,
        "groups": [
            {"name": name, "share": shares[k], "users": None if users is None else int(users[k])}
            for k, name in enumerate(names)
        ],
        "em": em_summary(results),
        "policies": policies,
        "comparison": _comparison(results, names, shares, bootstrap_for, confidence),
        "certificate": certificate_summary(results),
        "calibration": calibration_summary(results),
        "timings": mean_tree([result.extra.get("timings", {}) for result in results]),
        "extra": [
            {"seed": int(result.seed), **{k: v for k, v in result.extra.items() if k not in known}}
            for result in results
        ],
    }
    return plain(summary)


def write_summary(folder: str | Path, summary: dict[str, Any]) -> Path:
    """Write ``summary.json`` into ``folder`` (made if missing) and return its path."""
    path = Path(folder) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _checked(results: Sequence[SeedResult]) -> list[SeedResult]:
    if not results:
        raise ValueError("nothing to summarise: no seed results")
    results = sorted(results, key=lambda result: result.seed)
    seeds = [result.seed for result in results]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds repeat: {seeds}; a run counted twice would narrow every interval")
    first = results[0]
    for result in results[1:]:
        if list(result.group_names) != list(first.group_names):
            raise ValueError(
                f"seeds {first.seed} and {result.seed} name other groups: {first.group_names} and "
                f"{result.group_names}; order them alike"
            )
        if result.num_prompts != first.num_prompts:
            raise ValueError(
                f"seeds {first.seed} and {result.seed} have {first.num_prompts} and {result.num_prompts} "
                "held-out prompts; all seeds must be evaluated on the same ones"
            )
    return results


def _ordered_policies(results: list[SeedResult]) -> list[str]:
    found = list(dict.fromkeys(policy for result in results for policy in result.utilities))
    rank = {REFERENCE: 0, BASELINE: 1, MAXMIN: 2, ORACLE: 4}
    return sorted(found, key=lambda policy: rank.get(policy, 3))


def _win_matrices(results: list[SeedResult], policy: str, other: str) -> np.ndarray:
    """[S, N, G]; seed by seed, as M may differ between seeds."""
    return np.stack([win_matrix(r.utilities[policy], r.utilities[other]) for r in results])


def _policy_summary(
    policy: str,
    results: list[SeedResult],
    names: list[str],
    bootstrap_for: Callable[[int], ClusterBootstrap],
    confidence: float,
) -> dict[str, Any]:
    results = [result for result in results if policy in result.utilities]
    seeds = [result.seed for result in results]
    bootstrap = bootstrap_for(len(results))
    rates = rates_from_win_matrix(
        _win_matrices(results, policy, REFERENCE), names, bootstrap, confidence=confidence
    )
    utility = estimate(
        np.stack([result.utilities[policy].mean(axis=1, dtype=np.float64) for result in results]),
        bootstrap,
        confidence=confidence,
    )
    out: dict[str, Any] = {
        "win_rate_vs_sft": _by_group(rates),
        "utility": dict(zip(names, utility.mean, strict=True)),
        "utility_interval": {
            name: {"low": utility.low[k], "high": utility.high[k]} for k, name in enumerate(names)
        },
        "worst_group": rates.worst_group_name,
        **_with_interval("worst_group_win_rate", rates.worst_group),
        **_with_interval("average_win_rate", rates.average),
    }
    per_seed: list[dict[str, Any]] = [
        {
            "seed": seed,
            "win_rate_vs_sft": dict(zip(names, rates.per_seed[s], strict=True)),
            "utility": dict(zip(names, utility.per_seed[s], strict=True)),
            "worst_group_win_rate": rates.worst_group.per_seed[s],
            "average_win_rate": rates.average.per_seed[s],
        }
        for s, seed in enumerate(seeds)
    ]
    with_baseline = [result for result in results if BASELINE in result.utilities]
    if with_baseline:
        against = rates_from_win_matrix(
            _win_matrices(with_baseline, policy, BASELINE),
            names,
            bootstrap_for(len(with_baseline)),
            confidence=confidence,
        )
        out["win_rate_vs_single"] = _by_group(against)
        row = {result.seed: s for s, result in enumerate(with_baseline)}
        for entry in per_seed:
            if entry["seed"] in row:
                entry["win_rate_vs_single"] = dict(
                    zip(names, against.per_seed[row[entry["seed"]]], strict=True)
                )
    for key in ("kl", "length"):
        out[key], out[f"{key}_interval"] = None, {"low": None, "high": None}
        if all(policy in getattr(result, key) for result in results):
            values = np.stack([getattr(r, key)[policy].mean(axis=1, dtype=np.float64) for r in results])
            measured = estimate(values, bootstrap, confidence=confidence)
            out[key] = measured.mean
            out[f"{key}_interval"] = {"low": measured.low, "high": measured.high}
            for s, entry in enumerate(per_seed):
                entry[key] = measured.per_seed[s]
    out["per_seed"] = per_seed
    return out


def _by_group(rates: GroupWinRates) -> dict[str, dict[str, float]]:
    groups = rates.groups
    return {
        name: {
            "mean": groups.mean[k],
            "low": groups.low[k],
            "high": groups.high[k],
            "t_low": groups.t_low[k],
            "t_high": groups.t_high[k],
        }
        for k, name in enumerate(rates.group_names)
    }


def _with_interval(key: str, value: Estimate) -> dict[str, Any]:
    return {
        key: value.mean,
        f"{key}_interval": {
            "low": value.low,
            "high": value.high,
            "t_low": value.t_low,
            "t_high": value.t_high,
        },
    }


def _comparison(
    results: list[SeedResult],
    names: list[str],
    shares: list[float],
    bootstrap_for: Callable[[int], ClusterBootstrap],
    confidence: float,
) -> dict[str, Any]:
    both = [r for r in results if MAXMIN in r.utilities and BASELINE in r.utilities]
    out: dict[str, Any] = {
        "policy": MAXMIN,
        "baseline": BASELINE,
        "majority_group": names[int(np.argmax(shares))],
    }
    if not both:
        for key in _COMPARISONS:
            out[key] = None
            out[f"{key}_interval"] = dict.fromkeys(("low", "high", "t_low", "t_high"))
        out["per_seed"] = []
    else:
        compared = compare_win_matrices(
            _win_matrices(both, MAXMIN, REFERENCE),
            _win_matrices(both, BASELINE, REFERENCE),
            shares,
            bootstrap_for(len(both)),
            confidence=confidence,
        )
        for key in _COMPARISONS:
            out.update(_with_interval(key, getattr(compared, key)))
        out["per_seed"] = [
            {"seed": result.seed, **{key: getattr(compared, key).per_seed[s] for key in _COMPARISONS}}
            for s, result in enumerate(both)
        ]
    with_oracle = [r for r in results if MAXMIN in r.utilities and ORACLE in r.utilities]
    if with_oracle:
        gain = compare_win_matrices(
            _win_matrices(with_oracle, MAXMIN, REFERENCE),
            _win_matrices(with_oracle, ORACLE, REFERENCE),
            shares,
            bootstrap_for(len(with_oracle)),
            confidence=confidence,
        ).worst_group_relative_gain
        ratio = Estimate(
            *(getattr(gain, end) + 1 for end in ("mean", "low", "high", "t_low", "t_high", "per_seed"))
        )
        out.update(_with_interval("oracle_ratio", ratio))
        out["oracle_ratio_per_seed"] = [
            {"seed": result.seed, "oracle_ratio": ratio.per_seed[s]} for s, result in enumerate(with_oracle)
        ]
    return out
