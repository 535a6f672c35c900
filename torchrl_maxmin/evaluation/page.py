"""The page of an evaluation: ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_maxmin.evaluation.page_details import (
    calibration_section,
    certificate_section,
    groups_section,
    plain_name,
    sizes_section,
    stability_section,
)
from torchrl_maxmin.evaluation.plots import as_seeds, group_curves
from torchrl_maxmin.evaluation.policies import BASELINE
from torchrl_maxmin.evaluation.results import REFERENCE
from torchrl_maxmin.evaluation.tables import group_names, number_text
from torchrl_maxmin.evaluation.texts import (
    NOT_ESTABLISHED,
    WORST_OF_PAIRS,
    caveats,
    description,
    oracle_text,
)
from torchrl_maxmin.evaluation.verdict import (
    SHARES,
    compared_policies,
    nothing_claimed,
    people_text,
    seeds_text,
    verdict,
)
from torchrl_maxmin.pages import (
    Answer,
    Answers,
    Cell,
    Curve,
    Figures,
    Items,
    Mark,
    Page,
    Picture,
    Prompt,
    Section,
    Strip,
    Table,
    Term,
    Text,
    curve_panel,
    strip_chart,
    write_page,
)

__all__ = ["evaluation_page", "write_evaluation_page"]

_AVERAGES = {
    "average_over_groups": ("average over groups", "each group counts once"),
    "average_over_people": ("average over people", "groups weighted by their shares"),
}
_TOTALS = (
    Term("worst group (biased low)", "biased_low"),
    Term("average over groups", "averages"),
    Term("average over people", "averages"),
)
_NO_WEIGHTS = "No weights: it was trained on one reward for all, or on other groups than these."
_AVERAGE_STYLE = 5  # of a shape that no group has while there are at most five


def write_evaluation_page(
    path: str | Path, summary: Mapping[str, Any], histories: Mapping[str, Any] | None = None
) -> Path:
    """Write the page; returns its path.

    Args:
        path: The file.
        summary: What :func:`~torchrl_maxmin.evaluation.summary.summarise` returned.
        histories: Training metrics, as :func:`~torchrl_maxmin.evaluation.plots.plot_training` takes them.
    """
    return write_page(path, evaluation_page(summary, histories))


def evaluation_page(summary: Mapping[str, Any], histories: Mapping[str, Any] | None = None) -> Page:
    """Put the page of an evaluation together."""
    figures = Figures(summary)
    sections = [
        _who_pays(summary, figures),
        _by_group(summary, figures),
        *_pairs(summary, figures),
        *_responses(summary, figures),
        *_training(summary, histories),
        *sizes_section(summary, figures),
        certificate_section(summary),
        *calibration_section(summary),
        groups_section(summary, figures),
        stability_section(summary, figures),
        Section("warnings", "Warnings", "What to know before the numbers are "
        "used.", [Items(caveats(summary, plain_name))],
                ("biased_low", "bootstrap", "t_interval")),
    ]  # fmt: skip
    facts = [
        f"{len(summary['policies'])} policies",
        f"{summary['num_prompts']} held-out prompts",
        f"{seeds_text(summary)} ({', '.join(map(str, summary['seeds']))})",
    ]
    return Page("Evaluation by group", verdict(summary), facts, sections)


def _who_pays(summary: Mapping[str, Any], figures: Figures) -> Section:
    policy, baseline = compared_policies(summary)
    blocks: list[Any] = _doubt(summary)
    if policy is not None and baseline == BASELINE:
        several = len(summary["comparison"].get("changes_per_seed", [])) > 1
        title = f"change of the win rate, {policy} against {baseline}"
        chart = strip_chart(title, _changes(summary, figures), at_line="no change")
        caption = (
            f"Change of the win rate against {REFERENCE} from {baseline} to {policy}, with its interval. "
            f"Right of the line gains, left of it loses.{_rings(several)}"
        )
        blocks.append(Picture([chart], caption))
        if text := people_text(summary):
            blocks.append(Text(f"{text} People are counted by {SHARES[summary['shares_are']]}."))
        blocks.append(_relative(summary, figures))
        if oracle := oracle_text(summary):
            blocks.append(Text(oracle))
    else:
        text = (
            f"There is no pair of {BASELINE} and maxmin here, so that what MaxMin changes is not known; the "
            f"next section holds every policy against {REFERENCE}."
        )
        blocks.append(Text(text))
    meaning = "What changes for each group, and over everybody, in the place of one reward for all."
    return Section("who", "Who gains and who pays", meaning, blocks, ("averages", "win_rate", "t_interval"))


def _doubt(summary: Mapping[str, Any]) -> list[Any]:
    return [Text(NOT_ESTABLISHED, important=True)] if nothing_claimed(summary) else []


def _changes(summary: Mapping[str, Any], figures: Figures) -> list[Strip]:
    """Make a strip of the change of every group, and of both averages."""
    compared = summary["comparison"]
    rows = compared.get("changes_per_seed", [])
    rows = rows if len(rows) > 1 else []
    strips = []
    for k, group in enumerate(summary["groups"]):
        name = group["name"]
        mark = _mark(compared["changes"][name], [row["changes"][name] for row in rows], k)
        cell = figures.interval("+.3f", "comparison", "changes", name)
        strips.append(Strip(name, f"{group['share']:.0%} of people", mark, cell))
    for key, (label, note) in _AVERAGES.items():
        name = f"{key}_change"
        if f"{name}_interval" in compared:
            seeds = [row[name] for row in rows if name in row]
            mark = _mark(compared[f"{name}_interval"], seeds, _AVERAGE_STYLE)
            cell = figures.interval("+.3f", "comparison", f"{name}_interval")
            strips.append(Strip(label, note, mark, cell))
    return strips


def _relative(summary: Mapping[str, Any], figures: Figures) -> Table:
    compared = summary["comparison"]
    labels = {
        "worst_group_relative_gain": "worst group",
        "average_over_groups_relative_change": "average over groups",
        "average_over_people_relative_change": "average over people",
        "majority_relative_change": f"majority ({compared['majority_group']})",
    }
    rows: list[list[Any]] = []
    for key, label in labels.items():
        seeds = " ".join(number_text(entry.get(key), "+.0%") for entry in compared["per_seed"])
        rows.append([label, figures.interval("+.1%", "comparison", f"{key}_interval"), seeds])
    header = ["", "relative change", "by seed"]
    return Table(f"Relative change of the win rate against {REFERENCE}", header, rows)


def _mark(interval: Mapping[str, Any], seeds: Sequence[float], style: int) -> Mark:
    return Mark(interval["mean"], interval["low"], interval["high"], seeds, style)


def _rings(several: bool) -> str:
    return " Small rings are the seeds." if several else " There is one seed."


def _by_group(summary: Mapping[str, Any], figures: Figures) -> Section:
    strips, several = [], len(summary["seeds"]) > 1
    for policy, entry in summary["policies"].items():
        if policy == REFERENCE:
            continue
        strips.append(Strip(policy))
        per_seed = entry["per_seed"] if several else []
        for k, group in enumerate(summary["groups"]):
            name = group["name"]
            seeds = [row["win_rate_vs_sft"][name] for row in per_seed]
            mark = _mark(entry["win_rate_vs_sft"][name], seeds, k)
            cell = figures.interval(".3f", "policies", policy, "win_rate_vs_sft", name)
            strips.append(Strip(name, f"{group['share']:.0%} of people", mark, cell))
        for key, (label, _) in _AVERAGES.items():
            mark = _mark(
                entry[f"{key}_interval"], [row[key] for row in per_seed if key in row], _AVERAGE_STYLE
            )
            strips.append(
                Strip(label, "", mark, figures.interval(".3f", "policies", policy, f"{key}_interval"))
            )
    blocks: list[Any] = _doubt(summary)
    if strips:
        chart = strip_chart(f"win rates against {REFERENCE}", strips, limits=(-0.02, 1.02), line=0.5,
                            at_line=f"as good as {REFERENCE}")  # fmt: skip
        blocks.append(Picture([chart], f"Win rates against {REFERENCE}.{_rings(several)}"))
    names = group_names(summary)
    header: list[str | Term] = ["policy", *names, *_TOTALS, Term("KL (nats)", "kl"), "length"]
    rows: list[list[Any]] = []
    for policy in summary["policies"]:
        rates = [figures.interval(".3f", "policies", policy, "win_rate_vs_sft", name) for name in names]
        sizes = [
            figures.number(".2f", "policies", policy, "kl"),
            figures.number(".1f", "policies", policy, "length"),
        ]
        rows.append([policy, *rates, *_totals(figures, "policies", policy), *sizes])
    blocks.append(Table(f"Win rates against {REFERENCE} with their intervals", header, rows))
    blocks.append(Text(description(summary, plain_name)))
    meaning = f"How often each group prefers a policy's response to one of {REFERENCE}; 0.5 is no preference."
    return Section(
        "groups",
        "Table by group",
        meaning,
        blocks,
        ("win_rate", "worst_group", "averages", "kl", "sft", "single", "maxmin"),
    )


def _totals(figures: Figures, *path: str | int) -> list[Cell]:
    keys = ("worst_group_win_rate", *_AVERAGES)
    return [figures.interval(".3f", *path, f"{key}_interval") for key in keys]


def _pairs(summary: Mapping[str, Any], figures: Figures) -> list[Section]:
    places = [n for n, pair in enumerate(summary.get("pairs", [])) if pair["other"] != REFERENCE]
    if not places:
        return []
    names = group_names(summary)
    rows: list[list[Any]] = []
    for n in places:
        pair = summary["pairs"][n]
        rates = [figures.interval(".3f", "pairs", n, "win_rate", name) for name in names]
        rows.append([f"{pair['policy']} against {pair['other']}", *rates, *_totals(figures, "pairs", n)])
    table = Table("Win rates of the first policy against the second", ["policies", *names, *_TOTALS], rows)
    meaning = "How often each group prefers the first policy's response to the second's."
    return [
        Section(
            "pairs", "Policies against each other", meaning, [table, Text(WORST_OF_PAIRS)], ("worst_group",)
        )
    ]


def _responses(summary: Mapping[str, Any], figures: Figures) -> list[Section]:
    there = [n for n, extra in enumerate(summary.get("extra", [])) if extra.get("responses")]
    if not there:
        return []
    n = there[0]  # one seed is enough to read
    extra = summary["extra"][n]
    shown = extra["responses"]
    titles = {
        "random": "Chosen at random",
        "disagreement": "Chosen where the groups' changes differ most",
    }
    blocks: list[Any] = []
    for kind, title in titles.items():
        prompts = []
        for p, entry in enumerate(shown[kind]):
            path = ("extra", n, "responses", kind, p, "responses")
            answers = [
                Answer(policy, answer["text"], [
                    (group, figures.number(".2f", *path, policy, "scores", group)) for group in
                    answer["scores"]
                ])
                for policy, answer in entry["responses"].items()
            ]  # fmt: skip
            prompts.append(Prompt(entry["prompt"], answers))
        if prompts:
            blocks.append(Answers(title, prompts))
    scores = "Numbers are the response's utility for each group."
    if shown["scores"] == "win rate":
        scores = (
            f"Numbers are the win rate of the policy's responses to that prompt against those of {REFERENCE}."
        )
    blocks.insert(0, Text(f"{scores} One response of every policy is drawn at random (seed "
    f"{extra['seed']}). Where the "
                          "groups differ most is no typical case."))  # fmt: skip
    return [
        Section(
            "responses",
            "Responses side by side",
            "What the policies write, and what it is worth to each group.",
            blocks,
            ("utility",),
        )
    ]


def _training(summary: Mapping[str, Any], histories: Mapping[str, Any] | None) -> list[Section]:
    if not histories:
        return []
    names = group_names(summary)
    runs = {policy: as_seeds(history) for policy, history in histories.items()}
    utilities = {policy: group_curves(of, "rewards/{}/mean", len(names)) for policy, of in runs.items()}
    weights = {policy: group_curves(of, "maxmin/weights/{}", len(names)) for policy, of in runs.items()}
    levels = {
        name: value for name, value in summary["policies"][REFERENCE]["utility"].items() if value is not None
    }
    values = [
        v for of in utilities.values() for curves in of for curve in curves for v in curve[np.isfinite(curve)]
    ]
    if not values:
        return []
    low, high = min(values + list(levels.values())), max(values + list(levels.values()))
    room = 0.05 * (high - low) or 1.0
    panels: list[Any] = []
    limits, lines = (
        (float(low - room), float(high + room)),
        [(f"{REFERENCE}, {n}", v) for n, v in levels.items()],
    )
    for policy in runs:
        curves = _curves(utilities[policy], names)
        panels.append(curve_panel(policy, curves, unit="utility", limits=limits, levels=lines))
        curves = _curves(weights[policy], names)
        panels.append(
            curve_panel(policy, curves, unit="weight of the group", limits=(0.0, 1.0), empty=_NO_WEIGHTS)
        )
    caption = f"Utilities are in the unit of the tables; broken level lines are the utilities of {REFERENCE}."
    if any(len(of) > 1 for of in runs.values()):
        caption += " Thin lines are seeds, thick lines their mean."
    meaning = "How the groups fared while the policies were trained, and how much each group counted."
    return [Section("training", "Training", meaning, [Picture(panels, caption)], ("utility", "adversary"))]


def _curves(of_groups: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> list[Curve]:
    found = []
    for k, curves in enumerate(of_groups):
        runs = [[float(v) if np.isfinite(v) else None for v in curve] for curve in curves]
        if runs:
            found.append(Curve(names[k], runs, k))
    return found
