"""What a run reports beside its policies, over seeds: EM, certificate, calibration, plain JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.results import SeedResult

__all__ = ["calibration_summary", "certificate_summary", "em_summary", "is_number", "mean_tree", "plain"]


def em_summary(results: list[SeedResult]) -> dict[str, Any]:
    """``extra["em"]`` over seeds: means, smallest values as ``<key>_min``, every seed's own."""
    per_seed = [{"seed": result.seed, **result.extra.get("em", {})} for result in results]
    entries = [result.extra["em"] for result in results if result.extra.get("em")]
    out: dict[str, Any] = {
        "user_accuracy": None,
        "num_groups_selected": None,
        "heldout_log_likelihood": None,
        **mean_tree(entries),
    }
    for key in [key for key, value in out.items() if is_number(value) and key != "num_groups_selected"]:
        # A mean hides the seed that failed: its neighbour is the smallest.
        out[f"{key}_min"] = min(entry[key] for entry in entries if is_number(entry.get(key)))
    chosen = [e["num_groups_selected"] for e in entries if is_number(e.get("num_groups_selected"))]
    if chosen:
        out["num_groups_selected"] = statistics.mode(sorted(chosen))
    out["per_seed"] = per_seed
    return out


def certificate_summary(results: list[SeedResult]) -> dict[str, Any]:
    """``extra["certificate"]`` over seeds: mean value, smallest low, largest high.

    One seed without a number makes the whole null: a certificate holds for all seeds or for none.
    """
    given = [(result.seed, result.extra.get("certificate")) for result in results]
    empty: dict[str, Any] = {"value": None, "low": None, "high": None}
    if all(certificate is None for _, certificate in given):
        return {**empty, "reason": "not computed", "per_seed": []}
    per_seed: list[dict[str, Any]] = [
        {"seed": seed, **{key: (certificate or {}).get(key) for key in ("value", "low", "high", "reason")}}
        for seed, certificate in given
    ]
    mute = [entry for entry in per_seed if not all(is_number(entry[key]) for key in empty)]
    if mute:
        first = f"seed {mute[0]['seed']}: {mute[0]['reason'] or 'not computed'}"
        reason = first if len(mute) == 1 else f"{len(mute)} of {len(per_seed)} seeds have none ({first})"
        return {**empty, "reason": reason, "per_seed": per_seed}
    return {
        "value": float(np.mean([entry["value"] for entry in per_seed])),
        "low": min(entry["low"] for entry in per_seed),
        "high": max(entry["high"] for entry in per_seed),
        "reason": None,
        "per_seed": per_seed,
    }


def calibration_summary(results: list[SeedResult]) -> dict[str, Any] | None:
    """``extra["calibration"]`` over seeds: in how many which group is the worst, by convention."""
    per_seed = [
        {"seed": result.seed, **result.extra["calibration"]}
        for result in results
        if result.extra.get("calibration")
    ]
    if not per_seed:
        return None
    for entry in per_seed:
        if "worst_group" not in entry and "utilities" in entry:
            entry["worst_group"] = {
                convention: min(by_group, key=by_group.get)
                for convention, by_group in entry["utilities"].items()
            }
    worst: dict[str, dict[str, int]] = {}
    for entry in per_seed:
        for convention, group in entry.get("worst_group", {}).items():
            counts = worst.setdefault(convention, {})
            counts[group] = counts.get(group, 0) + 1
    changing = [e["seed"] for e in per_seed if len(set(e.get("worst_group", {}).values())) > 1]
    return {
        "used": per_seed[0].get("used"),
        "worst_group": worst,
        "worst_group_changes": bool(changing),
        "seeds_where_it_changes": changing,
        "per_seed": per_seed,
    }


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number (a bool is not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return math.isfinite(value)


def mean_tree(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of nested dicts and equally long lists of numbers; text stays where all agree."""

    def mean(values: list[Any]) -> Any:
        if all(is_number(value) for value in values):
            return float(np.mean(values))
        if all(isinstance(value, dict) for value in values):
            return mean_tree(values)
        if all(isinstance(value, (list, tuple)) for value in values) and len({len(v) for v in values}) == 1:
            return [mean(list(column)) for column in zip(*values, strict=True)]
        return values[0] if all(value == values[0] for value in values) else None

    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {key: mean([entry[key] for entry in entries if key in entry]) for key in keys}


def plain(value: Any) -> Any:
    """Plain JSON: numpy to Python, NaN and infinity to null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
