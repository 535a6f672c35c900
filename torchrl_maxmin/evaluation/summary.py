"""Summarise records of seeds as ``summary.json``: results by group, with intervals, as plain data."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.json_text import complete, plain, write_json_text
from torchrl_maxmin.evaluation.comparison import MAXMIN, ORACLE, comparison_summary
from torchrl_maxmin.evaluation.policies import BASELINE, NO_INTERVAL, pairs_summary, policy_summary
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.verdict import verdict
from torchrl_maxmin.stats.clustered import NUM_RESAMPLES
from torchrl_maxmin.stats.interval import SCHEMA_VERSION

__all__ = ["BASELINE", "MAXMIN", "ORACLE", "load_summary", "summarise", "write_summary"]


def summarise(
    results: Sequence[SeedResult],
    *,
    wall_seconds: float | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Summarise the records of all seeds as the content of ``summary.json``.

    Headline numbers are plain numbers; beside each stands ``<key>_interval``. Every interval is ``{mean,
    low, high, bootstrap_low, bootstrap_high, method}``: ``low`` and ``high`` are the ones to read, by
    ``method`` the t interval of :func:`~torchrl_maxmin.stats.interval_over_seeds` (over prompts alone with
    one seed), for relative changes under ``comparison`` that of
    :func:`~torchrl_maxmin.stats.interval_of_statistic`; ``bootstrap_low`` and ``bootstrap_high`` are
    percentiles of the seeds-then-prompts bootstrap, which few seeds make too narrow. One seed's relative
    changes, and ``length_correlation``, have the bootstrap alone. The worst group's interval is that of
    :func:`~torchrl_maxmin.stats.worst_of`; its point estimate is biased low, which ``notes`` say. Averages
    stand over groups, each counted once, and over people, groups weighed by every seed's shares
    (``shares_are`` says whose); ``average_win_rate`` and ``average_relative_gain`` are older names of those
    over groups. ``pairs`` holds every policy against every other. ``per_seed`` lists hold the same keys seed
    by seed. What cannot be computed is null. The same records give the same bytes.

    A policy that only some seeds hold is summarised over those seeds, and compared over the seeds that
    hold both. ``verdict`` is what :func:`~torchrl_maxmin.evaluation.verdict.verdict` says of it all.

    These entries of ``SeedResult.extra`` are read; all others come back under ``extra``, seed by seed:

    * ``em``: numbers (``user_accuracy``, ``num_groups_selected``, ``heldout_log_likelihood``, ...) or lists
      and dicts of numbers. Averaged over seeds; ``<key>_min`` is added for plain numbers;
      ``num_groups_selected`` is the most frequent choice.
    * ``certificate``: ``{value, low, high, reason}``, and what it rests on: ``{mass, worth, prompt_mass,
      prompt_loss, statement}``. Over seeds: mean value, smallest low, largest high, and what the seed with
      the smallest worth rests on, whose statement is the hardest to believe; null if one seed's is, with
      that seed's reason.
    * ``calibration``: ``{used, worst_group: {convention: group}}`` and/or ``utilities: {convention: {group:
      number}}`` (the worst group is then the smallest); ``offsets``: ``{deviation: {group: number},
      by_prompt, num_prompts, wrong_worst_group}``, averaged, but for the largest ``wrong_worst_group``.
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
    # One seed, so one set of resamples a number of seeds: policies on the same seeds are compared paired.
    settings = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    rank = {REFERENCE: 0, BASELINE: 1, MAXMIN: 2, ORACLE: 4}
    there = dict.fromkeys(policy for result in results for policy in result.policies)
    ordered = sorted(there, key=lambda policy: rank.get(policy, 3))
    users = first.extra.get("group_users")
    known = {"em", "certificate", "calibration", "group_users", "timings"}
    summary = {
        "seeds": [int(result.seed) for result in results],
        "num_prompts": first.num_prompts,
        "confidence": confidence,
        "num_resamples": num_resamples,
        "wall_seconds": wall_seconds,
        "shares_are": first.shares_are,
        "groups": [
            {"name": name, "share": shares[k], "users": None if users is None else int(users[k])}
            for k, name in enumerate(names)
        ],
        "em": _em_summary(results),
        "policies": {policy: policy_summary(policy, results, names, settings) for policy in ordered},
        "pairs": pairs_summary(ordered, results, names, settings),
        "comparison": comparison_summary(results, names, settings),
        "certificate": _certificate_summary(results),
        "calibration": _calibration_summary(results),
        "timings": _mean_tree([result.extra.get("timings", {}) for result in results]),
        "extra": [
            {"seed": int(result.seed), **{k: v for k, v in result.extra.items() if k not in known}}
            for result in results
        ],
    }
    found = verdict(summary)
    summary["verdict"] = {"headline": found.headline, "lines": [vars(line) for line in found.lines]}
    return plain(summary)


def write_summary(folder: str | Path, summary: dict[str, Any]) -> Path:
    """Write ``summary.json`` into ``folder`` (made if missing) and return its path."""
    path = Path(folder) / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION} | summary
    write_json_text(path, content)
    return path


def load_summary(folder: str | Path) -> dict[str, Any]:
    """Read the ``summary.json`` of a folder, an older one by today's names.

    Raises:
        UserError: If there is none, or a newer version wrote it.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise UserError(
            f"no summary.json in {folder}; give the output folder of demo, evaluate, diagnose or reward"
        )
    with complete(path):
        summary = json.loads(path.read_text(encoding="utf-8"))
        version = summary.setdefault("schema_version", 1)
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema_version {version}, this version reads {SCHEMA_VERSION}; upgrade"
            )
        if version < 2:
            summary = _upgraded(summary)
        if version < 3 and "policies" in summary:
            _add_averages(summary)
        if "policies" in summary:
            _add_changes(summary)
        return summary | {"schema_version": SCHEMA_VERSION}


def _add_changes(summary: dict[str, Any]) -> None:
    """Add the averages' differences where an earlier version left them out: numbers without intervals."""
    compared = summary["comparison"]
    pairs = [summary["policies"].get(name) for name in (MAXMIN, BASELINE)]
    for key in ("average_over_groups", "average_over_people"):
        change = pairs[0][key] - pairs[1][key] if all(pairs) else None
        if compared.setdefault(f"{key}_change", change) == change:
            compared.setdefault(f"{key}_change_interval", {**NO_INTERVAL, "mean": change})
    compared.setdefault("changes_per_seed", [])


def _add_averages(summary: dict[str, Any]) -> None:
    """Name the averages of version 2, which were over groups; those over people have no interval there."""
    shares = {group["name"]: group["share"] for group in summary["groups"]}
    summary["shares_are"] = "given"
    rates = [(each, each["win_rate_vs_sft"]) for each in summary["policies"].values()]
    for entry, by_group in rates + [(pair, pair["win_rate"]) for pair in summary.get("pairs", [])]:
        people = sum(share * by_group[name]["mean"] for name, share in shares.items()) / sum(shares.values())
        entry |= {
            "average_over_groups": entry["average_win_rate"],
            "average_over_groups_interval": entry["average_win_rate_interval"],
            "average_over_people": people,
            "average_over_people_interval": {**NO_INTERVAL, "mean": people},
        }
    compared = summary["comparison"]
    pairs = [summary["policies"].get(name) for name in (MAXMIN, BASELINE)]
    people = pairs[0]["average_over_people"] / pairs[1]["average_over_people"] - 1 if all(pairs) else None
    compared |= {
        "average_over_groups_relative_change": compared["average_relative_gain"],
        "average_over_groups_relative_change_interval": compared["average_relative_gain_interval"],
        "average_over_people_relative_change": people,
        "average_over_people_relative_change_interval": {**NO_INTERVAL, "mean": people},
    }
    for row in compared["per_seed"]:
        row["average_over_groups_relative_change"] = row["average_relative_gain"]


def _upgraded(value: Any) -> Any:
    """Rename the ends of version 1, where ``low`` was the bootstrap's and ``t_low`` the one to read."""
    if isinstance(value, list):
        return [_upgraded(item) for item in value]
    if not isinstance(value, dict):
        return value
    out = {key: _upgraded(item) for key, item in value.items()}
    if "t_low" in out:
        low, high = out.pop("t_low"), out.pop("t_high")
        out |= {"bootstrap_low": out["low"], "bootstrap_high": out["high"]}
        if low is not None:
            out |= {"low": low, "high": high}
        out["method"] = "t" if low is not None else None if out["low"] is None else "bootstrap"
    for key in [key for key in out if f"{key}_interval" in out]:
        by_group = out[key] if isinstance(out[key], dict) else {None: out[key]}
        for name, number in by_group.items():
            interval = out[f"{key}_interval"]
            (interval if name is None else interval[name])["mean"] = number
    return out


def _checked(results: Sequence[SeedResult]) -> list[SeedResult]:
    if not results:
        raise ValueError("nothing to summarise: no seed results")
    results = sorted(results, key=lambda result: result.seed)
    seeds = [result.seed for result in results]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds repeat: {seeds}; a run counted twice would narrow every interval")
    first = results[0]
    for result in results[1:]:
        pair = f"seeds {first.seed} and {result.seed}"
        if list(result.group_names) != list(first.group_names):
            names = f"{first.group_names} and {result.group_names}"
            raise ValueError(f"{pair} name other groups: {names}; order them alike")
        if bool(result.wins) != bool(first.wins):
            raise ValueError(
                f"{pair} were judged in two ways, by utilities and by comparisons; judge all seeds alike"
            )
        if result.num_prompts != first.num_prompts:
            raise ValueError(
                f"{pair} have {first.num_prompts} and {result.num_prompts} held-out prompts; all seeds must "
                "be evaluated on the same ones"
            )
    return results


def _em_summary(results: list[SeedResult]) -> dict[str, Any]:
    """Summarise ``extra["em"]`` over seeds: means, smallest values as ``<key>_min``, every seed's own."""
    entries = [result.extra["em"] for result in results if result.extra.get("em")]
    out: dict[str, Any] = dict.fromkeys(("user_accuracy", "num_groups_selected", "heldout_log_likelihood"))
    out |= _mean_tree(entries)
    for key in [key for key, value in out.items() if _is_number(value) and key != "num_groups_selected"]:
        # A mean hides the seed that failed: its neighbour is the smallest.
        out[f"{key}_min"] = min(entry[key] for entry in entries if _is_number(entry.get(key)))
    chosen = [e["num_groups_selected"] for e in entries if _is_number(e.get("num_groups_selected"))]
    if chosen:
        out["num_groups_selected"] = statistics.mode(sorted(chosen))
    out["per_seed"] = [{"seed": result.seed, **result.extra.get("em", {})} for result in results]
    return out


def _certificate_summary(results: list[SeedResult]) -> dict[str, Any]:
    """Summarise ``extra["certificate"]`` over seeds: mean value, outermost ends, weakest statement.

    One seed without a number makes the whole null: a certificate holds for all seeds or for none.
    """
    numbers = ("value", "low", "high")
    empty: dict[str, Any] = dict.fromkeys((*numbers, *_RESTS_ON))
    if all(result.extra.get("certificate") is None for result in results):
        return {**empty, "reason": "not computed", "per_seed": []}
    per_seed: list[dict[str, Any]] = [
        {"seed": r.seed} | {key: (r.extra.get("certificate") or {}).get(key) for key in ("reason", *empty)}
        for r in results
    ]
    silent = [entry for entry in per_seed if not all(_is_number(entry[key]) for key in numbers)]
    if silent:
        first = f"seed {silent[0]['seed']}: {silent[0]['reason'] or 'not computed'}"
        reason = first if len(silent) == 1 else f"{len(silent)} of {len(per_seed)} seeds have none ({first})"
        return {**empty, "reason": reason, "per_seed": per_seed}
    values, lows, highs = ([entry[key] for entry in per_seed] for key in numbers)
    ends = {"low": min(lows), "high": max(highs)}
    # a smaller worth excludes more; results of earlier versions have none
    weakest = min(per_seed, key=lambda entry: -np.inf if entry["worth"] is None else entry["worth"])
    rests_on = {key: weakest[key] for key in _RESTS_ON}
    return {"value": float(np.mean(values)), **ends, "reason": None, **rests_on, "per_seed": per_seed}


_RESTS_ON = ("mass", "worth", "prompt_mass", "prompt_loss", "statement")


def _calibration_summary(results: list[SeedResult]) -> dict[str, Any] | None:
    """Summarise ``extra["calibration"]`` over seeds: in how many which group is the worst, by convention."""
    per_seed = [
        {"seed": result.seed, **result.extra["calibration"]}
        for result in results
        if result.extra.get("calibration")
    ]
    if not per_seed:
        return None
    for entry in per_seed:
        if "worst_group" not in entry and "utilities" in entry:
            entry["worst_group"] = {name: min(by, key=by.get) for name, by in entry["utilities"].items()}
    worst: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in per_seed:
        for convention, group in entry.get("worst_group", {}).items():
            worst[convention][group] += 1
    changing = [e["seed"] for e in per_seed if len(set(e.get("worst_group", {}).values())) > 1]
    return {
        "used": per_seed[0].get("used"),
        "worst_group": worst,
        "worst_group_changes": bool(changing),
        "seeds_where_it_changes": changing,
        "offsets": _offsets_summary([entry["offsets"] for entry in per_seed if entry.get("offsets")]),
        "per_seed": per_seed,
    }


def _offsets_summary(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not entries:
        return None
    wrong = [e["wrong_worst_group"] for e in entries if _is_number(e["wrong_worst_group"])]
    by_prompt = any(entry["by_prompt"] for entry in entries)
    return _mean_tree(entries) | {"by_prompt": by_prompt, "wrong_worst_group": max(wrong, default=None)}


def _is_number(value: Any) -> bool:
    """Say whether ``value`` is a finite number (a bool is not)."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _mean_tree(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average over seeds nested dicts and equally long lists of numbers; text stays where all agree."""

    def mean(values: list[Any]) -> Any:
        if all(_is_number(value) for value in values):
            return float(np.mean(values))
        if all(isinstance(value, dict) for value in values):
            return _mean_tree(values)
        if all(isinstance(value, (list, tuple)) for value in values) and len({len(v) for v in values}) == 1:
            return [mean(list(column)) for column in zip(*values, strict=True)]
        return values[0] if all(value == values[0] for value in values) else None

    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {key: mean([entry[key] for entry in entries if key in entry]) for key in keys}
