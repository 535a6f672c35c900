"""Tables of a report: numbers with their intervals, by policy and group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_maxmin.evaluation.policies import interval_to_read

__all__ = [
    "ends_text",
    "interval_text",
    "markdown_table",
    "number_text",
    "pairs_block",
    "policy_table",
    "rate_text",
    "size_block",
]


def number_text(value: float | None, spec: str) -> str:
    """A number, or n/a."""
    return "n/a" if value is None else _format(value, spec)


def ends_text(low: float | None, high: float | None, spec: str) -> str:
    """An interval, or n/a."""
    return "n/a" if low is None or high is None else f"[{_format(low, spec)}, {_format(high, spec)}]"


def _format(value: float, spec: str) -> str:
    """As ``spec`` says, and what rounds to zero without a minus."""
    return format(value, spec.replace(".", "z.", 1))


def interval_text(interval: Mapping[str, Any], spec: str) -> str:
    """The interval to read, or n/a."""
    return ends_text(*interval_to_read(interval), spec)


def rate_text(rate: Mapping[str, Any], spec: str = ".3f") -> str:
    """A mean with the interval to read."""
    return f"{number_text(rate['mean'], spec)} {interval_text(rate, spec)}"


def _value_text(policy: Mapping[str, Any], key: str, spec: str) -> str:
    """``policy[key]`` with the interval that stands beside it."""
    told = number_text(policy[key], spec)
    interval = interval_text(policy.get(f"{key}_interval", {}), spec)
    return told if interval == "n/a" else f"{told} {interval}"


def policy_table(summary: Mapping[str, Any]) -> str:
    """Win rates against sft by policy and group."""
    names = [group["name"] for group in summary["groups"]]
    header = ["policy", *names, "worst group (biased low)", "average", "KL (nats)", "length"]
    rows = [
        [
            name,
            *(rate_text(policy["win_rate_vs_sft"][group]) for group in names),
            _value_text(policy, "worst_group_win_rate", ".3f"),
            _value_text(policy, "average_win_rate", ".3f"),
            number_text(policy["kl"], ".2f"),
            number_text(policy["length"], ".1f"),
        ]
        for name, policy in summary["policies"].items()
    ]
    return markdown_table(header, rows)


def pairs_block(summary: Mapping[str, Any]) -> list[str]:
    """Every policy against every other but sft, whose table stands above."""
    pairs = [pair for pair in summary.get("pairs", []) if pair["other"] != "sft"]
    if not pairs:
        return []
    names = [group["name"] for group in summary["groups"]]
    rows = [
        [pair["policy"], pair["other"], *(rate_text(pair["win_rate"][group]) for group in names),
         _value_text(pair, "worst_group_win_rate", ".3f"),
         _value_text(pair, "average_win_rate", ".3f")]
        for pair in pairs
    ]  # fmt: skip
    header = ["policy", "against", *names, "worst group (biased low)", "average"]
    return ["## Policies against each other\n\n" + markdown_table(header, rows)]


def size_block(summary: Mapping[str, Any]) -> list[str]:
    """Utility, KL, length, and how far length explains utility."""
    policies = summary["policies"]
    if not all("length_correlation" in policy for policy in policies.values()):
        return []
    names = [group["name"] for group in summary["groups"]]
    rows: list[list[str]] = []
    reasons: dict[str, None] = {}
    for name, policy in policies.items():
        points = [{"mean": policy["utility"][group], **policy["utility_interval"][group]} for group in names]
        correlation = [policy["length_correlation"][group] for group in names]
        reasons |= dict.fromkeys(point["reason"] for point in correlation if point["mean"] is None)
        told = ["n/a" if point["mean"] is None else rate_text(point, "+.2f") for point in correlation]
        sizes = [_value_text(policy, "kl", ".2f"), _value_text(policy, "length", ".1f")]
        rows.append([name, *map(rate_text, points), *sizes, *told])
    header = ["policy", *(f"utility, {group}" for group in names), "KL (nats)", "length"]
    header += [f"length with utility, {group}" for group in names]
    text = (
        "## Utility, KL and length\n\nThe last columns are the correlation of length with utility within "
        "prompts: near 1 or -1, length alone earns the utility. Their intervals are the bootstrap's.\n\n"
        + markdown_table(header, rows)
    )
    if reasons:
        text += "\n\nNo correlation: " + "; ".join(reasons) + "."
    return [text]


def markdown_table(header: list[str], rows: list[list[str]], rule: str = "|---:") -> str:
    """A Markdown table; ``rule`` aligns all columns but the first."""
    lines = ["| " + " | ".join(header) + " |", "|---" + rule * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
