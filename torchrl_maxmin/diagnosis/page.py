"""The page of a diagnosis: ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_maxmin.diagnosis.verdict import page_verdict, repeats_text
from torchrl_maxmin.pages import (
    Code,
    Figures,
    Items,
    Mark,
    Page,
    Picture,
    Section,
    Strip,
    Table,
    Term,
    Text,
    strip_chart,
    write_page,
)
from torchrl_maxmin.pages.stability import stability_section
from torchrl_maxmin.pages.wants import wants_blocks

__all__ = ["diagnosis_page", "write_diagnosis_page"]

_HOLDS = {True: "holds", False: "does not hold", None: "cannot be said"}
_NAMES = {"single": "one reward for all", "mixture": "a reward a group", "maxmin": "MaxMin"}


def write_diagnosis_page(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write the page of what ``diagnose`` found; returns its path."""
    return write_page(path, diagnosis_page(summary))


def diagnosis_page(summary: Mapping[str, Any]) -> Page:
    """Put the page of a diagnosis together."""
    figures = Figures(summary)
    facts = [
        f"{summary['num_users']:,} users",
        f"{summary['num_pairs']:,.0f} choices",
        f"{summary['num_features']} features",
    ]
    sections = [
        _cost(summary, figures),
        _groups(summary, figures),
        _accuracy(summary, figures),
        *_wants(summary),
        *_people(summary, figures),
        _stability(summary, figures),
        _theory(summary, figures),
        _warnings(summary, figures),
    ]
    return Page("What one reward costs these users", page_verdict(summary), facts, sections)


def _strips(summary: Mapping[str, Any], figures: Figures, key: str, names: Sequence[str]) -> list[Strip]:
    strips = []
    for k, group in enumerate(summary["groups"]):
        strips.append(Strip(group["name"], f"{group['share']['mean']:.0%} of the users"))
        for style, name in enumerate(names):
            point = group[key].get(name)
            if point:
                mark = Mark(point["mean"], point["low"], point["high"], style=style)
                strips.append(Strip(_NAMES[name], "", mark, figures.interval(".3f", "groups", k, key, name)))
    return strips


def _cost(summary: Mapping[str, Any], figures: Figures) -> Section:
    strips = _strips(summary, figures, "alignment_gap", ("single", "maxmin"))
    chart = strip_chart("alignment gap by group", strips, at_line="no loss")
    caption = (
        "What each group loses against its own best policy, in deviations of its reward; less is better."
    )
    blocks: list[Any] = [*_doubt(summary), Picture([chart], caption)]
    maxmin = summary["maxmin"]
    rows: list[list[Any]] = [
        [
            "under one reward",
            *(figures.number(".3f", "maxmin", "single_utilities", k) for k in range(len(summary["groups"]))),
        ],
        [
            "under MaxMin",
            *(figures.number(".3f", "maxmin", "utilities", k) for k in range(len(summary["groups"]))),
        ],
        [
            "weight under MaxMin",
            *(figures.number(".3f", "maxmin", "weights", k) for k in range(len(maxmin["weights"]))),
        ],
    ]
    blocks.append(
        Table(
            "Utility of each group, KL penalty included", ["", *(g["name"] for g in summary["groups"])], rows
        )
    )
    meaning = "What a policy trained on one reward for all, and one trained by MaxMin, costs each group."
    return Section(
        "cost", "Who pays", meaning, blocks, ("alignment_gap", "maxmin", "adversary", "t_interval")
    )


def _doubt(summary: Mapping[str, Any]) -> list[Any]:
    if len(summary["groups"]) < 2 or summary.get("established"):
        return []
    doubt = "The groups are not established: figures by group may be chance, and say nothing of anybody."
    return [Text(doubt, important=True)]


def _groups(summary: Mapping[str, Any], figures: Figures) -> Section:
    rows: list[list[Any]] = []
    header: list[str | Term] = ["group", "users", "share", Term("epsilon", "epsilon")]
    header.append("distance to the mixture")
    for k, group in enumerate(summary["groups"]):
        cells = [
            figures.interval(".3f", "groups", k, key) for key in ("share", "epsilon", "distance_to_mixture")
        ]
        rows.append([group["name"], figures.count("groups", k, "users"), *cells])
    blocks: list[Any] = [Table("The groups, with intervals", header, rows)]
    if summary["choice"] is None:
        blocks.append(Text("The number of groups was given."))
    else:
        blocks.append(Code(summary["choice"]["report"], "How the number of groups was chosen"))
    meaning = "Who differs, and by how much."
    return Section("groups", "Groups", meaning, blocks, ("diversity", "epsilon", "heldout", "nats"))


def _accuracy(summary: Mapping[str, Any], figures: Figures) -> Section:
    strips = _strips(summary, figures, "accuracy", ("single", "mixture"))
    blocks: list[Any] = []
    if any(strip.mark for strip in strips):
        chart = strip_chart("accuracy by group", strips, limits=(0.3, 1.0), line=0.5, at_line="a coin")
        blocks.append(Picture([chart], "How often the reward ranks a held-out pair as the user did."))
    reasons = [
        f"{g['name']}: {g['accuracy']['reason']}."
        for g in summary["groups"]
        if g["accuracy"]["single"] is None
    ]
    rows: list[list[Any]] = [
        [group["name"], figures.interval("+.3f", "groups", k, "accuracy", "difference")]
        for k, group in enumerate(summary["groups"])
        if group["accuracy"].get("difference")
    ]
    if rows:
        blocks.append(Table("What a reward of its own adds", ["group", "difference"], rows))
    if reasons:
        blocks.append(Items(reasons))
    meaning = "Whether rewards predict choices that they were not fitted to."
    return Section("accuracy", "Accuracy on held-out pairs", meaning, blocks, ("head_accuracy", "heldout"))


def _wants(summary: Mapping[str, Any]) -> list[Section]:
    groups = summary["groups"]
    if len(groups) < 2 or "wants" not in groups[0]:
        return []
    named = [(group["name"], group["wants"]) for group in groups]
    blocks: list[Any] = wants_blocks(
        Figures(summary), named, [("groups", k, "wants") for k in range(len(groups))]
    )
    blocks = [*_doubt(summary), *blocks]
    meaning = "Each group against the others, these weighted by their shares."
    return [Section("wants", "What each group wants", meaning, blocks, ("established",))]


def _people(summary: Mapping[str, Any], figures: Figures) -> list[Section]:
    if "describing" not in summary:
        return []
    header, tests = ["column", *(group["name"] for group in summary["groups"])], []
    rows: list[list[Any]] = []
    for column, found in summary["describing"]["columns"].items():
        path = ("describing", "columns", column, "groups")
        places = range(len(found["groups"]))
        if found["kind"] == "numbers":
            rows.append([f"{column}, mean", *(figures.interval(".2f", *path, k, "mean") for k in places)])
        else:
            for level in found["groups"][0]["levels"]:
                cells = [figures.interval(".2f", *path, k, "levels", level) for k in places]
                rows.append([f"{column}: {level}", *cells])
        if found["p"] is None:
            tests.append(f"{column}: not tested, as {found['reason']}.")
        else:
            related = "related to the groups" if found["related"] else "not seen to be related to the groups"
            tests.append(
                f"{column}: {related} (p = {found['p_holm']:.4g} by Holm over the columns; {found['test']})."
            )
    blocks: list[Any] = [Table("Columns by group", header, rows), Items(tests)]
    blocks = [*_doubt(summary), *blocks]
    meaning = "This describes the groups and explains nothing: no column here is a cause."
    return [Section("people", "Who is in each group", meaning, blocks, ("misassigned",))]


def _stability(summary: Mapping[str, Any], figures: Figures) -> Section:
    names = [group["name"] for group in summary["groups"]]
    evidence = summary["evidence"]
    reports = {"Evidence for the groups": evidence["report"]} if evidence else {}
    return stability_section(summary, figures, names, reports, "The groups were")


def _theory(summary: Mapping[str, Any], figures: Figures) -> Section:
    rows: list[list[Any]] = []
    for k, group in enumerate(summary["groups"]):
        path = ("groups", k)
        cells = [figures.number(".3g", *path, "lemma1", name) for name in ("bound", "measured")]
        cells += [
            figures.number(".3g", *path, "theorem1", name) for name in ("printed", "squared", "measured")
        ]
        rows.append([group["name"], *cells])
    header: list[str | Term] = [
        "group",
        "Lemma 1, bound",
        "parameters apart, measured",
        "Theorem 1, printed",
        "Theorem 1, squared",
    ]
    table = Table(
        "Bounds of the paper", [*header, Term("alignment gap in log odds, measured", "alignment_gap")], rows
    )
    assumed = [[item["assumption"], _HOLDS[item["holds"]], item["told"]] for item in summary["assumptions"]]
    blocks: list[Any] = [
        table,
        Table("What the bounds assume", ["assumption", "here", "because"], assumed, words=True),
        Items(summary["proof_gaps"]),
    ]
    meaning = (
        "The paper's bounds are a diagnostic and no certificate: what they assume stands below, "
        "with the gaps of the printed proof."
    )
    return Section("theory", "Lemma 1 and Theorem 1", meaning, blocks, ("epsilon", "diversity"))


def _warnings(summary: Mapping[str, Any], figures: Figures) -> Section:
    lines = [
        "The alignment gap is that of policies which choose between the two responses of a pair. It says "
        "nothing of responses that nobody compared, and is not the gap of a trained language model.",
        f"Intervals: {summary['intervals']}. They hold the chance of the users, not that of the number of "
        "groups.",
    ]
    if summary.get("repeated_pairs"):
        lines.append(repeats_text(summary["repeated_pairs"]))
    misassigned = figures.number(".1%", "misassignment", "balanced")
    rows: list[list[Any]] = [["users expected in a wrong group", misassigned]]
    if summary.get("recovery"):
        label = "agreement with the groups that the data name (adjusted Rand index)"
        rows.append([label, figures.number(".3f", "recovery", "adjusted_rand_index")])
    blocks: list[Any] = [Items(lines), Table("How far to trust the groups", ["", "value"], rows)]
    return Section(
        "warnings", "Warnings", "What to know before the numbers are used.", blocks, ("misassigned",)
    )
