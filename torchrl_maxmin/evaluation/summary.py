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
from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES, ClusterBootstrap, Estimate
from torchrl_maxmin.evaluation.policies import BASELINE, pairs_summary, policy_summary, win_matrices
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.win_rates import compare_win_matrices

__all__ = ["BASELINE", "MAXMIN", "ORACLE", "summarise", "write_summary"]

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

    Headline numbers are plain numbers; beside each stands ``<key>_interval`` with ``t_low``/``t_high``, the
    interval to read (:func:`~torchrl_maxmin.evaluation.clustered.interval_over_seeds`: t over seeds and the
    component of the prompts that they share; over prompts alone with one seed), and ``low``/``high``, the
    percentile interval of the seeds-then-prompts bootstrap, which few seeds make too narrow. Relative changes
    under ``comparison`` have the t interval of :func:`~torchrl_maxmin.evaluation.intervals.estimate`, null
    with one seed. The worst group's interval is [smallest low, smallest high] over groups; its point estimate
    is biased low, which ``notes`` say. ``pairs`` holds every policy against every other. ``per_seed`` lists
    hold the same keys seed by seed. What cannot be computed is null. The same records give the same bytes.

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

    # The same seed, so the same resamples as the comparison's.
    settings = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    ordered = _ordered_policies(results)
    policies = {policy: policy_summary(policy, results, names, settings) for policy in ordered}
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
        "pairs": pairs_summary(ordered, results, names, settings),
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
        if bool(result.wins) != bool(first.wins):
            raise ValueError(
                f"seeds {first.seed} and {result.seed} were judged in two ways, by utilities and by "
                "comparisons; judge all seeds alike"
            )
        if result.num_prompts != first.num_prompts:
            raise ValueError(
                f"seeds {first.seed} and {result.seed} have {first.num_prompts} and {result.num_prompts} "
                "held-out prompts; all seeds must be evaluated on the same ones"
            )
    return results


def _ordered_policies(results: list[SeedResult]) -> list[str]:
    found = list(dict.fromkeys(policy for result in results for policy in result.policies))
    rank = {REFERENCE: 0, BASELINE: 1, MAXMIN: 2, ORACLE: 4}
    return sorted(found, key=lambda policy: rank.get(policy, 3))


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
    both = [r for r in results if MAXMIN in r.policies and BASELINE in r.policies]
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
            win_matrices(both, MAXMIN, REFERENCE),
            win_matrices(both, BASELINE, REFERENCE),
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
    with_oracle = [r for r in results if MAXMIN in r.policies and ORACLE in r.policies]
    if with_oracle:
        gain = compare_win_matrices(
            win_matrices(with_oracle, MAXMIN, REFERENCE),
            win_matrices(with_oracle, ORACLE, REFERENCE),
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
