"""``report.md`` and ``report.html`` of a reward mixture: its groups, and how good their rewards are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.tables import write_paragraphs
from torchrl_maxmin.core.text_escape import fenced, markdown
from torchrl_maxmin.pages import (
    Cell,
    Code,
    Curve,
    Figures,
    Line,
    Mark,
    Page,
    Picture,
    Section,
    Strip,
    Table,
    Term,
    Text,
    Verdict,
    curve_panel,
    strip_chart,
    verdict_markdown,
    write_page,
)
from torchrl_maxmin.pages.stability import stability_section
from torchrl_maxmin.pages.wants import wants_blocks
from torchrl_maxmin.stats.text import interval_text

__all__ = ["reward_page", "reward_verdict", "write_reward_report"]


def write_reward_report(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``report.md`` and ``report.html`` of a reward stage; returns the first.

    Args:
        folder: Of the reward mixture.
        summary: What stands in its ``summary.json``.
    """
    folder = Path(folder)
    write_page(folder / "report.html", reward_page(summary))
    found = verdict_markdown(reward_verdict(summary, _sentence))
    return write_paragraphs(
        folder / "report.md", ["# Groups and their rewards", found, fenced(summary["report"])]
    )


def _sentence(text: object) -> str:
    return markdown(text, most=2000)


def reward_verdict(summary: Mapping[str, Any], show: Any = str) -> Verdict:
    """Say which groups there are, and whether their rewards beat a coin, as far as the intervals go.

    Args:
        summary: What stands in ``summary.json`` of a reward stage.
        show: Makes texts safe for where they are shown.
    """
    count, users = summary["num_groups"], sum(summary["users"])
    lines = [_accuracy_line(summary, k) for k in range(count)]
    if summary.get("calibration_error"):
        lines.append(Line("note", f"Not calibrated: {show(summary['calibration_error'])}."))
    if count == 1:
        choice = summary.get("choice")
        headline = f"One reward for all {users:,} users was fitted."
        if choice is not None:
            headline = f"One reward serves the {users:,} users, as far as these data can tell."
            if choice.get("beats_coin") is False:
                headline = (
                    "Nothing is learned of these users: no reward predicts left-out users better than a coin."
                )
        return Verdict(headline, lines)
    established = summary.get("established")
    if established is False:
        why = "; ".join(map(show, summary["evidence"]["reasons"]))
        headline = f"Nothing is claimed on groups: the {count} that were found are not established."
        return Verdict(headline, [Line("unsure", f"Why: {why}.")])
    if established is None:
        headline = f"{count} groups among {users:,} users; whether they would be found again was not asked."
        return Verdict(headline, lines)
    return Verdict(f"{count} groups are established among {users:,} users.", lines)


def _accuracy_line(summary: Mapping[str, Any], k: int) -> Line:
    heldout = summary["heldout"]
    users, share = summary["users"][k], summary["mixing_weights"][k]
    who = f"group {k} ({users:,} users, {share:.0%} of the mixture)"
    accuracy = heldout.get("head_accuracy", [None] * (k + 1))[k]
    if accuracy is None:
        return Line("unsure", f"{who}: accuracy on held-out pairs is not known.")
    low, high = heldout["head_accuracy_interval"][k]
    shown = interval_text({"mean": accuracy, "low": low, "high": high})
    if low is None or low <= 0.5 <= high:
        return Line("unsure", f"{who}: not decided whether its reward beats a coin, accuracy {shown}.")
    return Line(
        "gain" if low > 0.5 else "lose", f"{who}: its reward ranks {shown} of held-out pairs as the user did."
    )


def reward_page(summary: Mapping[str, Any]) -> Page:
    """Put the page of a reward mixture together."""
    figures = Figures(summary)
    facts = [f"{sum(summary['users']):,} users", f"{summary['num_groups']} groups"]
    sections = [
        _groups(summary, figures),
        *_wants(summary, figures),
        _stability(summary, figures),
        *_fitting(summary),
        Section("lines", "As the terminal says it", "The same, with what was left out, line by line.",
                [Code(summary["report"], "Report of the fit")], ("heldout", "nats")),
    ]  # fmt: skip
    return Page("Groups and their rewards", reward_verdict(summary), facts, sections)


def _groups(summary: Mapping[str, Any], figures: Figures) -> Section:
    heldout, strips = summary["heldout"], []
    rows: list[list[Any]] = []
    for k in range(summary["num_groups"]):
        cells: list[Cell] = [figures.count("users", k), figures.number(".3f", "mixing_weights", k)]
        if accuracy := heldout.get("head_accuracy", []):
            cells.append(figures.number(".3f", "heldout", "head_accuracy", k))
            if accuracy[k] is not None:
                low, high = heldout["head_accuracy_interval"][k]
                shown = interval_text({"mean": accuracy[k], "low": low, "high": high})
                cells[-1] = Cell(shown, cells[-1].source)
                strips.append(Strip(f"group {k}", "", Mark(accuracy[k], low, high, style=k), cells[-1]))
        rows.append([f"group {k}", *cells])
    header: list[str | Term] = ["group", "users", "mixing weight"]
    if len(rows[0]) > len(header):
        header.append(Term("head accuracy", "head_accuracy"))
    blocks: list[Any] = []
    if strips:
        chart = strip_chart("head accuracy", strips, limits=(0.3, 1.0), line=0.5, at_line="a coin")
        blocks.append(
            Picture([chart], "How often each group's reward ranks held-out pairs as its users did.")
        )
    blocks.append(Table("The groups", header, rows))
    if "log_likelihood" in heldout:
        likelihood = figures.number(".3f", "heldout", "log_likelihood")
        label = "Held-out log-likelihood, where a coin gets -0.693"
        blocks.append(Table(label, ["", "value"], [["nats a pair", likelihood]]))
    meaning = (
        "How many people each group has, and how well its reward predicts choices that it was not fitted to."
    )
    return Section("groups", "Groups", meaning, blocks, ("head_accuracy", "heldout", "nats"))


def _wants(summary: Mapping[str, Any], figures: Figures) -> list[Section]:
    wants = summary.get("wants")
    if not wants:
        return []
    named = [(f"group {k}", entry) for k, entry in enumerate(wants)]
    blocks = wants_blocks(figures, named, [("wants", k) for k in range(len(wants))])
    if summary.get("established") is False:
        doubt = "The groups are not established: what follows may be chance, and says nothing of anybody."
        blocks.insert(0, Text(doubt, important=True))
    meaning = "Each group against the others, these weighted by their shares, by these rewards."
    return [Section("wants", "What each group wants", meaning, blocks, ("established",))]


def _stability(summary: Mapping[str, Any], figures: Figures) -> Section:
    names = [f"group {k}" for k in range(len(summary["mixing_weights"]))]
    choice = summary.get("choice")
    reports = {"How the number of groups was chosen": choice["report"]} if choice else {}
    return stability_section(summary, figures, names, reports, "The groups that EM began with were")


def _fitting(summary: Mapping[str, Any]) -> list[Section]:
    run = [row.get("em/log_likelihood") for row in summary["history"]]
    known = [value for value in run if value is not None]
    if len(known) < 2:
        return []
    room = 0.05 * (max(known) - min(known)) or 0.1
    limits = (min(known) - room, max(known) + room)
    panel = curve_panel("fit", [Curve("training pairs", [run])], unit="log-likelihood, nats", limits=limits)
    meaning = "How the fit to the training pairs improved, round by round."
    return [
        Section("fit", "Fitting", meaning, [Picture([panel], "Log-likelihood by round of EM.")], ("nats",))
    ]
