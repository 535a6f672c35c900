"""Tables of win rates for ``report.md``, and numbers with their intervals as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_maxmin.core.tables import markdown_table
from torchrl_maxmin.core.text_escape import markdown
from torchrl_maxmin.evaluation.texts import NOT_ESTABLISHED, WORST_OF_PAIRS, oracle_text
from torchrl_maxmin.evaluation.verdict import SHARES, people_text
from torchrl_maxmin.stats.text import ends_text, interval_text, number_text

__all__ = [
    "comparison_block",
    "ends_text",
    "group_names",
    "interval_text",
    "number_text",
    "pairs_block",
    "policy_table",
]

_ROWS = {
    "worst_group_relative_gain": "worst group",
    "average_over_groups_relative_change": "average over groups",
    "average_over_people_relative_change": "average over people",
    "majority_relative_change": "majority ({})",
}


_TOTALS = ("worst group (biased low)", "average over groups", "average over people")


def group_names(summary: Mapping[str, Any]) -> list[str]:
    """Return the groups in their order."""
    return [group["name"] for group in summary["groups"]]


def _rates(entry: Mapping[str, Any], rates: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Cells of win rates by group, of the worst group and of both averages."""
    keys = ("worst_group_win_rate", "average_over_groups", "average_over_people")
    totals = [entry[f"{key}_interval"] for key in keys]
    return [interval_text(rate) for rate in (*(rates[group] for group in names), *totals)]


def policy_table(summary: Mapping[str, Any]) -> str:
    """Tabulate every policy's win rates against sft, KL and length."""
    names = group_names(summary)
    header = ["policy", *map(markdown, names), *_TOTALS, "KL (nats)", "length"]
    rows = []
    for name, policy in summary["policies"].items():
        sizes = number_text(policy["kl"], ".2f"), number_text(policy["length"], ".1f")
        rows.append([markdown(name), *_rates(policy, policy["win_rate_vs_sft"], names), *sizes])
    return markdown_table(header, rows)


def pairs_block(summary: Mapping[str, Any]) -> list[str]:
    """Compare every policy with every other but sft, whose table stands above."""
    pairs = [pair for pair in summary.get("pairs", []) if pair["other"] != "sft"]
    if not pairs:
        return []
    names = group_names(summary)
    header = ["policy", "against", *map(markdown, names), *_TOTALS]
    rows = [
        [markdown(pair["policy"]), markdown(pair["other"]), *_rates(pair, pair["win_rate"], names)]
        for pair in pairs
    ]
    table = markdown_table(header, rows)
    return ["## Policies against each other\n\n" + WORST_OF_PAIRS + "\n\n" + table]


def comparison_block(summary: Mapping[str, Any]) -> str:
    """Write what MaxMin changes against one reward for all, for whom and for how many people."""
    compared = summary["comparison"]
    name = compared["policy"]
    policy, baseline = markdown(name), markdown(compared["baseline"])
    heading = f"## {policy} against {baseline}\n\n"
    if compared["worst_group_relative_gain"] is None:
        return heading + f"Not compared: the results hold no {policy}, no {baseline}, or a win rate of zero."
    intervals = {key: compared[f"{key}_interval"] for key in _ROWS}
    by_t = all(str(interval["method"] or "t")[0] == "t" for interval in intervals.values())
    header = [
        "relative change of the win rate against sft",
        "estimate",
        "t over seeds",
        "bootstrap",
        "by seed",
    ]
    rows = [
        [
            label.format(markdown(compared["majority_group"])),
            number_text(compared[key], "+.1%"),
            ends_text(intervals[key], "+.1%"),
            ends_text(intervals[key], "+.1%", "bootstrap_"),
            " ".join(number_text(entry.get(key), "+.0%") for entry in compared["per_seed"]),
        ]
        for key, label in _ROWS.items()
    ]
    if not by_t:
        header, *rows = ([*row[:2], *row[3:]] for row in (header, *rows))
    text = heading + markdown_table(header, rows)
    text += (
        "\n\nThe average over groups counts each group once; the average over people weighs groups by "
        f"{SHARES[summary['shares_are']]}, which its interval takes as they are."
    )
    if compared.get("people"):
        each = ((markdown(group), interval_text(c, "+.3f")) for group, c in compared["changes"].items())
        text += f" Change of the win rate by group: {', '.join(map(' '.join, each))}."
        text += f" {people_text(summary) or NOT_ESTABLISHED}"
    head_to_head = summary["policies"][name].get("win_rate_vs_single")
    if head_to_head:
        rates = ", ".join(f"{markdown(group)} {interval_text(r)}" for group, r in head_to_head.items())
        text += (
            f"\n\nHead to head, each group prefers {policy} to {baseline} with win rate: {rates}. The "
            "baseline is trained for the majority, so the majority's preference for it is expected: what it "
            "gives up is the last row of the table."
        )
    if oracle := oracle_text(summary):
        text += f"\n\n{oracle}"
    return text
