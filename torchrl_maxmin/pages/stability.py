"""Whether the groups that were found are found again: a section of more than one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_maxmin.pages.document import Code, Figures, Items, Section, Table, Term, Text

__all__ = ["stability_section"]


def stability_section(
    summary: Mapping[str, Any],
    figures: Figures,
    names: Sequence[str],
    reports: Mapping[str, str],
    starts: str,
) -> Section:
    """Collect the evidence for groups, by group and in words.

    Args:
        summary: With ``evidence``, ``restarts`` and ``left_out``, where there are any.
        figures: Of the summary.
        names: Of the groups.
        reports: Texts to show as they are, by their headings.
        starts: Words before what ``restarts`` says.
    """
    blocks: list[Any] = []
    if evidence := summary.get("evidence"):
        rows: list[list[Any]] = []
        for k, (name, own) in enumerate(zip(names, evidence["groups"], strict=True)):
            path = ("evidence", "groups", k)
            measured = ("jaccard", "correlation", "gain", "beyond_others")
            cells = [figures.interval(".3f", *path, key) if key in own else "n/a" for key in measured]
            rows.append([name, own["reason"] or "yes", *cells])
        header: list[str | Term] = [
            "group",
            Term("established", "established"),
            Term("same users in refits (Jaccard)", "jaccard"),
            "heads' correlation in refits",
            Term("gain on left-out judgements, nats a choice", "heldout"),
            "gain over the other groups alone, nats a user",
        ]
        blocks.append(Table("Whether the groups are there", header, rows))
    else:
        blocks.append(Text("Whether the groups are found again was not asked."))
    if found := summary.get("restarts"):
        blocks.append(Text(f"{starts} {found['text']}."))
    blocks += [Code(text, heading) for heading, text in reports.items()]
    if lines := summary.get("left_out", {}).get("report"):
        blocks.append(Items(lines))
    meaning = (
        "Whether the same groups are found with other users and other starts, and what was left "
        "out to see it."
    )
    return Section("stability", "Stability", meaning, blocks, ("stability", "established", "jaccard"))
