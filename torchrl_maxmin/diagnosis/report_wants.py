"""Sections of the report on what each group wants, and on who is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_maxmin.core.tables import markdown_table
from torchrl_maxmin.core.text_escape import markdown
from torchrl_maxmin.evaluation.tables import interval_text

__all__ = ["wants_parts"]

_SHOWN_FEATURES = 8
_SHOWN_ITEMS = 10
_SHOWN_CHARACTERS = 300
_NOT_ESTABLISHED = (
    "The groups are not established: what follows may be chance, and says nothing of anybody.\n\n"
)


def wants_parts(summary: Mapping[str, Any]) -> list[str]:
    """Make the sections, as far as the summary has their figures.

    Args:
        summary: What ``diagnose`` found.

    Returns:
        Paragraphs with their headings; none with one group.
    """
    groups = summary["groups"]
    doubt = "" if summary.get("established") else _NOT_ESTABLISHED
    parts = []
    if len(groups) > 1 and "wants" in groups[0]:
        parts.append("## What each group wants\n\n" + doubt + _HOW_TO_READ)
        for group in groups:
            texts = [render(group["wants"]) for render in (_features, _items, _pairs)]
            parts.append(f"### {markdown(group['name'])}\n\n" + "\n\n".join(text for text in texts if text))
    if "describing" in summary:
        parts.append("## Who is in each group\n\n" + doubt + _describing(summary))
    return parts


_HOW_TO_READ = "Each group is set against the others, these weighted by their shares."


def _features(wants: Mapping[str, Any]) -> str:
    if not wants["features"]:
        return ""
    rows = []
    for entry in wants["features"][:_SHOWN_FEATURES]:
        point = {"mean": entry["difference"], "low": entry["low"], "high": entry["high"]}
        told = {True: "yes", False: "no", None: "not known"}[entry["told_apart"]]
        cells = [f"{entry['weight']:.3f}", f"{entry['others']:.3f}", interval_text(point), told]
        rows.append([markdown(entry["feature"]), *cells])
    header = ["feature", "weight", "of the others", "difference", "told apart"]
    return (
        "Features that it weighs otherwise, the surest first (weights on standardised features, shrunk by "
        "the penalty; intervals hold for all features of the group at once, over users left out):\n\n"
        + markdown_table(header, rows)
    )


def _items(wants: Mapping[str, Any]) -> str:
    items = wants["items"]
    if not items:
        return ""
    apart = sorted(items, key=lambda entry: -abs(entry["difference"]))[:_SHOWN_ITEMS]
    rows = [
        [
            markdown(entry["item"]),
            *(str(entry[name]) for name in ("rank", "rank_by_others")),
            f"{entry['difference']:+d}",
            f"{entry['score']:.3f}",
        ]
        for entry in sorted(apart, key=lambda entry: entry["rank"])
    ]
    first = ", ".join(markdown(entry["item"], 60) for entry in items[:3])
    return (
        f"It ranks {len(items)} items; first come {first}. Those that the others rank most otherwise:"
        "\n\n" + markdown_table(["item", "rank", "rank by the others", "higher by", "score"], rows)
    )


def _pairs(wants: Mapping[str, Any]) -> str:
    if not wants["pairs"]:
        return ""
    rows = []
    for entry in wants["pairs"]:
        prompt = [] if entry["prompt"] is None else [markdown(entry["prompt"], _SHOWN_CHARACTERS)]
        texts = [markdown(entry[name], _SHOWN_CHARACTERS) for name in ("preferred", "other")]
        rows.append([f"{entry['group']:.2f}", f"{entry['others']:.2f}", *texts, *prompt])
    header = ["this group", "others", "is preferred", "to"]
    header += ["prompt"] if len(rows[0]) > len(header) else []
    return (
        "Pairs on which it differs most from the others, by the fitted probability of the preference:\n\n"
        + markdown_table(header, rows, rule="|---")
    )


def _describing(summary: Mapping[str, Any]) -> str:
    names = [markdown(group["name"]) for group in summary["groups"]]
    header, rows, tests = ["column", *names], [], []
    for column, found in summary["describing"]["columns"].items():
        name = markdown(column, 60)
        if found["kind"] == "numbers":
            means = ["n/a" if g["mean"] is None else interval_text(g["mean"], ".2f") for g in found["groups"]]
            rows.append([f"{name}, mean", *means])
            rows.append([f"{name}, quartiles", *(_quartiles(g["quartiles"]) for g in found["groups"])])
        else:
            for level in found["groups"][0]["levels"]:
                points = [g["levels"][level] for g in found["groups"]]
                cells = ["n/a" if p["mean"] is None else interval_text(p, ".2f") for p in points]
                rows.append([f"{name}: {markdown(level, 60)}", *cells])
        missing = f"; {found['missing']:,} users have no value" if found["missing"] else ""
        if found["p"] is None:
            tests.append(f"- {name}: not tested, as {markdown(found['reason'])}{missing}.")
            continue
        verdict = "related to the groups" if found["related"] else "not seen to be related to the groups"
        tests.append(
            f"- {name}: {verdict} (p = {found['p']:.4g}, {found['p_holm']:.4g} by Holm over the columns; "
            f"{markdown(found['test'])}{missing})."
        )
    misassigned = summary["misassignment"]["balanced"]
    return (
        "This describes the groups and does not explain them: a column that is related may stand for "
        "something else, and nothing here is a cause. Each user counts in the likeliest group; "
        f"{misassigned:.1%} of the users (averaged over groups) are expected in a wrong one, which makes "
        "differences look smaller. Shares have Wilson's 95% intervals, means t intervals over users.\n\n"
        + markdown_table(header, rows)
        + "\n\n"
        + "\n".join(tests)
    )


def _quartiles(values: list[float] | None) -> str:
    return "n/a" if values is None else ", ".join(f"{value:g}" for value in values)
