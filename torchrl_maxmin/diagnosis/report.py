"""``report.md``, the table of groups and the figure of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.tables import markdown_table, write_csv, write_paragraphs
from torchrl_maxmin.core.text_escape import fenced, markdown, plot, terminal
from torchrl_maxmin.diagnosis.page import write_diagnosis_page
from torchrl_maxmin.diagnosis.report_wants import wants_parts
from torchrl_maxmin.diagnosis.verdict import page_verdict, repeats_text, verdict
from torchrl_maxmin.evaluation.plots import (
    COLOURS,
    FONT,
    MARKERS,
    WIDTH,
    Drawing,
    add_legend,
    figure_parts,
    new_figure,
    tidy,
    write_figure,
)
from torchrl_maxmin.evaluation.tables import interval_text
from torchrl_maxmin.pages import verdict_markdown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plot_diagnosis", "repeats_text", "verdict", "verdict_table", "write_diagnosis"]

_HOLDS = {True: "holds", False: "does not hold", None: "cannot be said"}


def _sentence(text: str) -> str:
    return markdown(text, most=2000)


def verdict_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of the verdict and a column a group, for a terminal.

    Args:
        summary: What ``diagnose`` found.

    Returns:
        A ``rich.table.Table``.
    """
    from rich.table import Table
    from rich.text import Text

    groups = summary["groups"]
    table = Table(title=Text(verdict(summary, terminal), "bold"), title_justify="left")
    table.add_column("")
    for group in groups:
        heading = Text(f"{terminal(group['name'], 40)}\n{group['users']} users")
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {
        "share": [group["share"] for group in groups],
        "accuracy, one reward": [group["accuracy"]["single"] for group in groups],
        "accuracy, own reward": [group["accuracy"]["mixture"] for group in groups],
        "epsilon": [group["epsilon"] for group in groups],
        "gap, one reward": [group["alignment_gap"]["single"] for group in groups],
        "gap, MaxMin": [group["alignment_gap"]["maxmin"] for group in groups],
    }
    for name, points in rows.items():
        table.add_row(name, *("n/a" if point is None else interval_text(point, ".2f") for point in points))
    return table


def write_diagnosis(folder: str | Path, summary: Mapping[str, Any], *, figures: bool | None = None) -> Path:
    """Write ``report.md``, ``report.html``, ``groups.csv`` and the figure into ``folder``; returns the first.

    Args:
        folder: Output folder, made if missing.
        summary: What :func:`~torchrl_maxmin.diagnosis.analysis.diagnose` found, ``.summary``.
        figures: Draw the figure; None draws it if Matplotlib is there. One that is there is shown
            in any case.

    Raises:
        ImportError: If ``figures`` is True and Matplotlib is missing.
    """
    folder = Path(folder)
    alt = "Accuracy and alignment gap by group"
    drawing = Drawing("diagnosis", alt, "", lambda: plot_diagnosis(summary, folder / "figures" / "diagnosis"))
    write_diagnosis_page(folder / "report.html", summary)
    parts = [
        "# What one reward costs these users",
        verdict_markdown(page_verdict(summary, _sentence)),
        _data(summary),
        *figure_parts(folder, [drawing], figures, "figure"),
        *_evidence(summary),
        *_left_out(summary),
        "## Groups\n\n" + _group_table(summary),
        "## Diversity between groups\n\n" + _diversity_table(summary),
        "## Accuracy on held-out pairs\n\n" + _accuracy_table(summary),
        *wants_parts(summary),
        "## Lemma 1 and Theorem 1\n\n" + _bounds(summary),
        "## Assumptions\n\n" + _assumptions(summary),
        "## Known gaps of the printed proof\n\n"
        + "\n".join(f"- {_sentence(gap)}" for gap in summary["proof_gaps"]),
        "## How to read this\n\n" + _caveats(summary),
    ]
    report = write_paragraphs(folder / "report.md", parts)
    _write_groups(folder / "groups.csv", summary)
    return report


def plot_diagnosis(summary: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Draw accuracy of the single reward and of the mixture by group, and the alignment gap of both policies.

    Args:
        summary: What ``diagnose`` found.
        path: Where to write, without suffix: .png, .svg and .csv are added.

    Returns:
        The three paths.

    Raises:
        ImportError: If Matplotlib is missing.
    """
    groups = summary["groups"]
    stacked = len(groups) > 3  # side by side, their names would cover one another
    figure = new_figure(WIDTH, 6.6 if stacked else 3.9)
    left, right = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    rows: list[dict[str, Any]] = []
    series = [
        (left, "accuracy on held-out pairs", "accuracy", ("single", "mixture")),
        (right, "alignment gap (less is better)", "alignment_gap", ("single", "maxmin")),
    ]
    for axis, title, key, names in series:
        for side, name in enumerate(names):
            points = [(k, group[key][name]) for k, group in enumerate(groups) if group[key].get(name)]
            if not points:
                continue
            where = np.array([k for k, _ in points]) + (0.13 if side else -0.13)
            means, low, high = (
                np.array([point["mean"] if point[end] is None else point[end] for _, point in points])
                for end in ("mean", "low", "high")
            )
            axis.errorbar(
                where, means, yerr=np.clip([means - low, high - means], 0, None), fmt=MARKERS[side],
                color=COLOURS[side], markersize=7, capsize=6, capthick=2, elinewidth=2.2,
                label=("one reward for all", "a reward a group / MaxMin")[side],
            )  # fmt: skip
            rows += [
                {"figure": key, "group": groups[k]["name"], "model": name,
                 **{end: point[end] for end in ("mean", "low", "high")}}
                for k, point in points
            ]  # fmt: skip
        axis.set_xticks(
            range(len(groups)), [f"{plot(group['name'])}\n({group['share']['mean']:.0%})" for group in groups]
        )
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.set_title(title, fontsize=FONT + 1)
        tidy(axis)
        axis.tick_params(axis="x", labelsize=FONT)
    if not any(row["figure"] == "accuracy" for row in rows):
        left.text(0.5, 0.5, "no held-out pairs", ha="center", color="0.4", transform=left.transAxes)
    else:
        left.axhline(0.5, color="0.35", linewidth=1.4, linestyle="--", zorder=0)
        left.set_ylim(min(0.45, left.get_ylim()[0]), 1.0)
        left.text(0.99, 0.505, "chance", transform=left.get_yaxis_transform(), ha="right", va="bottom",
                  color="0.35", fontsize=FONT - 2)  # fmt: skip
    low, high = right.get_ylim()
    right.set_ylim(min(0.0, low), 1.0 if summary["one_reward_serves"] else high)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        add_legend(figure, handles, labels)
    return write_figure(figure, path, rows)


def _data(summary: Mapping[str, Any]) -> str:
    text = (
        f"{summary['num_users']} users, {summary['num_pairs']:g} choices, {summary['num_features']} "
        f"features. KL weight {summary['beta']:g}. Penalty by left-out users: "
        + ", ".join(f"{value:g} at K={k}" for k, value in sorted(summary["l2"].items()))
        + ". "
    )
    if summary.get("repeated_pairs"):
        text += repeats_text(summary["repeated_pairs"]) + " "
    if (starts := summary.get("restarts")) is not None:
        text += f"The groups were {_sentence(starts['text'])}. "
    if summary["choice"] is None:
        return text + "The number of groups was given."
    return text + "The number of groups was chosen:\n\n" + fenced(summary["choice"]["report"])


def _evidence(summary: Mapping[str, Any]) -> list[str]:
    """Why the groups are claimed, or are not."""
    found = summary["evidence"]
    if found is None:
        return []
    rows = []
    for group, own in zip(summary["groups"], found["groups"], strict=True):
        gain = "n/a" if own["gain"] is None else interval_text(own["gain"])
        shown = [interval_text(own[name]) for name in ("jaccard", "correlation")]
        beyond = interval_text(own["beyond_others"]) if "beyond_others" in own else "n/a"  # n/a: of before
        rows.append([markdown(group["name"]), _sentence(own["reason"] or "yes"), *shown, gain, beyond])
    header = ["group", "established", "same users in refits (Jaccard)", "heads' correlation in refits"]
    header += ["gain on left-out judgements, nats a choice", "gain over the other groups alone, nats a user"]
    table = markdown_table(header, rows)
    about = (
        f"The {found['num_refits']} refits are to users drawn anew, from other starts; intervals are t over "
        "refits, or over users. Established groups are found again, predict left-out judgements better "
        "than one reward, and explain left-out users better than tastes spread evenly between them, and than "
        "the other groups' tastes alone, followed closely, hardly or not at all."
    )
    return ["## Are the groups there?", fenced(found["report"]), table, about]


def _left_out(summary: Mapping[str, Any]) -> list[str]:
    """What was left out; nothing for a summary of before."""
    lines = summary.get("left_out", {}).get("report")
    return ["## What was left out\n\n" + "\n".join(f"- {_sentence(line)}" for line in lines)] if lines else []


def _group_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for group in summary["groups"]:
        figures = [group[key] for key in ("share", "epsilon", "distance_to_mixture")]
        figures += [group["alignment_gap"][name] for name in ("single", "maxmin")]
        rows.append([markdown(group["name"]), str(group["users"]), *map(interval_text, figures)])
    header = ["group", "users", "share", "epsilon", "distance to the mixture", "alignment gap, one reward"]
    text = markdown_table([*header, "alignment gap, MaxMin"], rows)
    maxmin = summary["maxmin"]
    return text + (
        f"\n\nThe worst-off group's utility is {min(maxmin['single_utilities']):.4f} under one reward and "
        f"{min(maxmin['utilities']):.4f} under MaxMin, whose optimum by the dual is "
        f"{maxmin['dual_value']:.4f} (weights {', '.join(f'{w:.3f}' for w in maxmin['weights'])}). "
        f"Intervals: {_sentence(summary['intervals'])}."
    )


def _diversity_table(summary: Mapping[str, Any]) -> str:
    names = [markdown(group["name"]) for group in summary["groups"]]
    if len(names) == 1:
        return "0: there is one group."
    found = summary["diversity"]

    def cell(i: int, j: int) -> str:
        ends = {end: None if found[end] is None else found[end][i][j] for end in ("low", "high")}
        return "0" if i == j else interval_text({"mean": found["mean"][i][j], **ends})

    rows = [[name, *(cell(i, j) for j in range(len(names)))] for i, name in enumerate(names)]
    return (
        "Total variation of the groups' preference probabilities (Definition 1), averaged over the pairs.\n\n"
        + markdown_table(["", *names], rows)
    )


def _accuracy_table(summary: Mapping[str, Any]) -> str:
    rows, notes = [], set()
    for group in summary["groups"]:
        name, found = markdown(group["name"]), group["accuracy"]
        if found["single"] is None:
            rows.append([name, _sentence(found["reason"]), "", "", ""])
            continue
        cells = [interval_text(found[name]) for name in ("single", "mixture", "difference")]
        rows.append([name, str(found["users"]), *cells])
        notes |= {f"- {name}: {_sentence(note)}." for note in found.get("notes", [])}
    text = markdown_table(["group", "users", "one reward", "a reward a group", "difference"], rows)
    return text + ("\n\n" + "\n".join(sorted(notes)) if notes else "")


def _bounds(summary: Mapping[str, Any]) -> str:
    constants, lipschitz = summary["constants"], summary["constants"]["lipschitz"]
    rows = []
    for group in summary["groups"]:
        lemma, theorem = group["lemma1"], group["theorem1"]
        numbers = [lemma["bound"], lemma["measured"]]
        numbers += [theorem[name] for name in ("printed", "squared", "measured")]
        shown = [markdown(group["name"]), *(f"{number:.3g}" for number in numbers)]
        rows.append([*shown, _sentence(theorem["reason"] or "")])
    header = ["group", "Lemma 1, bound", "parameters apart, measured", "Theorem 1, printed"]
    header += ["Theorem 1, squared", "alignment gap in log odds, measured", "note"]
    return (
        "As printed: parameters are at least epsilon (1 - share) / (4 D) apart, and the alignment gap is at "
        "least lambda / (64 beta^2 L) epsilon (1 - share) / D^2. Here D = "
        f"{constants['feature_bound']:.3g}, lambda = {constants['smallest_eigenvalue']:.3g}, L = 1 / c = "
        f"{'infinite' if lipschitz is None else format(lipschitz, '.3g')}.\n\n" + markdown_table(header, rows)
    )


def _assumptions(summary: Mapping[str, Any]) -> str:
    rows = [
        [_sentence(item["assumption"]), _HOLDS[item["holds"]], _sentence(item["told"])]
        for item in summary["assumptions"]
    ]
    return markdown_table(["assumption", "here", "because"], rows, rule="|---")


def _caveats(summary: Mapping[str, Any]) -> str:
    lines = [
        "The alignment gap is exact for policies that choose between the two responses of a pair, reference "
        "uniform, under the fitted rewards, each scaled to deviation 1 within pairs (`sft_std`, as the `ppo` "
        "verb has it). It says nothing of responses that nobody compared, and it is not the gap of a trained "
        "language model. A group whose choices say little gets a reward of the same size as the others.",
        "The bounds are a diagnostic and no certificate: see the assumptions and the gaps of the proof. The "
        "gap that stands beside them is in log odds, where the penalty makes it too small.",
        "Rewards are linear in frozen features and shrunk by a penalty. Diversity, epsilon, distance and gap "
        "are the fit's less the bias that fits to simulated choices show (`fitted` in summary.json has them "
        "as they were). Intervals hold the chance of the users, not that of K and the penalty.",
    ]
    misassigned = summary["misassignment"]["balanced"]
    if misassigned > 0:
        lines.append(
            f"{misassigned:.1%} of the users (averaged over groups) are expected in a wrong group; accuracy "
            "by group is by the group that was found."
        )
    if summary.get("recovery"):
        lines.append(
            "Against the groups that the data name: adjusted Rand index "
            f"{summary['recovery']['adjusted_rand_index']:.3f} (1 is the same partition, 0 chance)."
        )
    return "\n".join(f"- {line}" for line in lines)


def _write_groups(path: Path, summary: Mapping[str, Any]) -> None:
    """Write one line a group."""
    rows = []
    for group in summary["groups"]:
        row = {"group": group["name"], "users": group["users"], "established": group["established"]}
        for key in ("share", "epsilon", "distance_to_mixture"):
            row[key] = group[key]["mean"]
            row |= {f"{key}_{end}": group[key][end] for end in ("low", "high")}
        for name in ("single", "mixture"):
            found = group["accuracy"][name]
            row[f"accuracy_{name}"] = None if found is None else found["mean"]
        for name in ("single", "maxmin"):
            row[f"alignment_gap_{name}"] = group["alignment_gap"][name]["mean"]
        row |= {f"lemma1_{name}": value for name, value in group["lemma1"].items()}
        row |= {f"theorem1_{name}": group["theorem1"][name] for name in ("printed", "squared")}
        rows.append(row)
    write_csv(path, rows)
