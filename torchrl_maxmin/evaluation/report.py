"""Write ``report.md`` and the terminal table from a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.core.tables import markdown_table, write_paragraphs
from torchrl_maxmin.core.text_escape import code, markdown, terminal
from torchrl_maxmin.evaluation.plots import figure_parts, figure_text, plot_training, plot_win_rates
from torchrl_maxmin.evaluation.tables import (
    comparison_block,
    ends_text,
    group_names,
    interval_text,
    number_text,
    pairs_block,
    policy_table,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["interval_text", "number_text", "rich_table", "write_report"]

_SENTENCE = 2000  # characters shown of what is longer than a name


def write_report(
    folder: str | Path,
    summary: Mapping[str, Any],
    *,
    histories: Mapping[str, Any] | None = None,
    title: str = "Results by group",
    figures: bool | None = None,
) -> Path:
    """Write ``report.md`` and its figures into ``folder``.

    Args:
        folder: Output folder (made if missing); figures go to ``folder/figures``.
        summary: What :func:`summarise` returned.
        histories: Training metrics for :func:`plot_training`; without them a figure that is there stays.
        title: First heading.
        figures: Draw figures; None draws them if Matplotlib is there, and says so in the report if not.

    Returns:
        Path of the report.

    Raises:
        ImportError: If ``figures`` is True and Matplotlib is missing.

    Example:
        >>> import tempfile, numpy as np
        >>> from torchrl_maxmin.evaluation import SeedResult, summarise
        >>> result = SeedResult(0, ["a", "b"], [0.9, 0.1], {"sft": np.zeros((4, 2, 2)),
        ...     "single": np.ones((4, 2, 2)), "maxmin": np.ones((4, 2, 2))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(folder, summarise([result]), figures=False).name
        'report.md'
    """
    figures_folder = Path(folder) / "figures"

    def draw() -> list[str]:
        plot_win_rates(summary, figures_folder / "win_rates")
        alt = "Win rates against sft by policy and group, with intervals"
        drawn = [figure_text("win_rates", alt, "Bars are the intervals of the table. ")]
        if histories:
            plot_training(histories, figures_folder / "training", group_names=group_names(summary))
        if (figures_folder / "training.png").is_file():
            alt, note = (
                "Group utilities and weights over training",
                "Thin lines are seeds, thick lines their mean. ",
            )
            drawn.append(figure_text("training", alt, note))
        return drawn

    parts = [
        f"# {title}",
        _what_was_done(summary),
        "## Win rates by group\n\n" + policy_table(summary),
        comparison_block(summary),
        *pairs_block(summary),
        *_size_block(summary),
        *figure_parts(draw, figures, "figures"),
        _em_block(summary),
        _certificate_block(summary),
        *_calibration_block(summary),
        _caveats(summary),
    ]
    return write_paragraphs(Path(folder) / "report.md", parts)


def rich_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of policies and groups for a terminal: win rates against sft, worst, averages, KL.

    Args:
        summary: What :func:`summarise` returned.

    Returns:
        A ``rich.table.Table``; print it with ``rich.console.Console().print``.

    Example:
        >>> rate = {"mean": 0.8, "low": 0.7, "high": 0.9}
        >>> policy = {"win_rate_vs_sft": {"all": rate}, "worst_group_win_rate": 0.8,
        ...           "average_over_groups": 0.8, "average_over_people": 0.8, "kl": 3.0}
        >>> rich_table({"groups": [{"name": "all", "share": 1.0}], "policies": {"maxmin": policy},
        ...             "seeds": [0]}).row_count
        1
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Win rate against sft, {_seeds(summary)}", title_justify="left")
    table.add_column("policy", style="bold")
    for group in summary["groups"]:
        table.add_column(Text(f"{terminal(group['name'], 40)} ({group['share']:.0%})"), justify="right")
    for column in ("worst group", "average over groups", "average over people", "KL"):
        table.add_column(column, justify="right")
    for name, policy in summary["policies"].items():
        table.add_row(
            Text(terminal(name, 40)),
            *(interval_text(policy["win_rate_vs_sft"][group["name"]]) for group in summary["groups"]),
            number_text(policy["worst_group_win_rate"], ".3f"),
            number_text(policy["average_over_groups"], ".3f"),
            number_text(policy["average_over_people"], ".3f"),
            number_text(policy["kl"], ".2f"),
        )
    return table


def _seeds(summary: Mapping[str, Any]) -> str:
    return "1 seed" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds"


def _what_was_done(summary: Mapping[str, Any]) -> str:
    groups = " and ".join(f"{markdown(group['name'])} ({group['share']:.0%})" for group in summary["groups"])
    policies = ", ".join(map(markdown, summary["policies"]))
    wall, judged = summary.get("wall_seconds"), _judge_kinds(summary) & {"endpoint", "comparisons"}
    took = "" if wall is None else f" The whole run took {wall:.0f} s."
    source = "t intervals over seeds with the component of the prompts that they share"
    if len(summary["seeds"]) == 1:
        source = "t intervals over prompts, as there is one seed"
    who = "a group's judge, asked in both orders, prefers" if judged else "a group's own utility prefers"
    return (
        f"Policies ({policies}) were trained with {_seeds(summary)} "
        f"({', '.join(map(str, summary['seeds']))}) for a population of {groups}, and each was sampled on "
        f"the same {summary['num_prompts']} held-out prompts. A win rate is how often {who} the policy's "
        "sample to the sft policy's on the same prompt, over all pairs of samples, ties counting one half. "
        f"Intervals are {summary['confidence']:.0%} {source}.{took}"
    )


def _size_block(summary: Mapping[str, Any]) -> list[str]:
    """Tabulate utility, KL, length, and how far length explains utility."""
    policies = summary["policies"]
    if not all("length_correlation" in policy for policy in policies.values()):
        return []
    names = group_names(summary)
    shown = [markdown(name) for name in names]
    rows: list[list[str]] = []
    reasons: dict[str, None] = {}
    for name, policy in policies.items():
        correlations = [policy["length_correlation"][group] for group in names]
        reasons |= dict.fromkeys(
            markdown(entry["reason"], _SENTENCE) for entry in correlations if entry["mean"] is None
        )
        sizes = [interval_text(policy["kl_interval"], ".2f"), interval_text(policy["length_interval"], ".1f")]
        utility = [interval_text(policy["utility_interval"][group]) for group in names]
        rows.append(
            [markdown(name), *utility, *sizes, *(interval_text(entry, "+.2f") for entry in correlations)]
        )
    header = ["policy", *(f"utility, {group}" for group in shown), "KL (nats)", "length"]
    header += [f"length with utility, {group}" for group in shown]
    text = (
        "## Utility, KL and length\n\nThe last columns are the correlation of length with utility within "
        "prompts: near 1 or -1, length alone earns the utility. Their intervals are the bootstrap's.\n\n"
        + markdown_table(header, rows)
    )
    if reasons:
        text += "\n\nNo correlation: " + "; ".join(reasons) + "."
    return [text]


def _em_block(summary: Mapping[str, Any]) -> str:
    em = summary["em"]
    groups = [group for group in summary["groups"] if group["users"] is not None]
    users = [f"{markdown(group['name'])} {group['users']}" for group in groups]
    worst = em.get("user_accuracy_min")
    lines = [
        "## Groups found",
        "",
        f"- Users assigned to the right group: {number_text(em['user_accuracy'], '.3f')}"
        + (f" (worst seed {worst:.3f})" if worst is not None else ""),
        f"- Number of groups selected: {number_text(em['num_groups_selected'], '.0f')}",
        f"- Held-out log-likelihood, nats a pair: {number_text(em['heldout_log_likelihood'], '.3f')}",
        *([f"- Users: {', '.join(users)}"] if users else []),
    ]
    shown = {"user_accuracy", "num_groups_selected", "heldout_log_likelihood", "per_seed"}
    smallest = {f"{key}_min" for key in (*em, *shown)}
    lines += [
        f"- {markdown(key.replace('_', ' '))}: {_compact(value)}"
        for key, value in em.items()
        if key not in shown | smallest and value is not None
    ]
    return "\n".join(lines)


def _compact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{markdown(key)} {_compact(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_compact, value))
    return "n/a" if value is None else f"{value:.3f}" if isinstance(value, float) else markdown(value)


def _certificate_block(summary: Mapping[str, Any]) -> str:
    certificate = summary["certificate"]
    heading = "## Certificate\n\n"
    if certificate["value"] is None:
        reason = markdown(str(certificate["reason"]).rstrip("."), _SENTENCE)
        return heading + f"No certificate of the distance to the max-min optimum: {reason}."
    several = " (mean; smallest low and largest high over seeds)" if len(summary["seeds"]) > 1 else ""
    return heading + (
        f"The worst group's utility is within {certificate['value']:.3f} "
        f"{ends_text(certificate, '.3f')} of the best that any policy can give its worst group{several}. "
        f"{_rests_on(certificate, several)}"
    )


def _rests_on(certificate: Mapping[str, Any], several: str) -> str:
    if not certificate.get("statement"):  # of an earlier version
        return "Modes that nobody sampled are not certified."
    whose = " (of the seed where it asks most)" if several else ""
    return (
        f"**This rests on what samples cannot show{whose}:** {markdown(certificate['statement'], _SENTENCE)}."
    )


def _calibration_block(summary: Mapping[str, Any]) -> list[str]:
    calibration = summary.get("calibration")
    if not calibration or not calibration["worst_group"]:
        return []
    found = "; ".join(
        f"under {code(convention)} it is "
        + ", ".join(f"{markdown(group)} (in {count})" for group, count in sorted(counts.items()))
        for convention, counts in calibration["worst_group"].items()
    )
    verdict = "The worst group is the same under every convention."
    if calibration["worst_group_changes"]:
        seeds = ", ".join(map(str, calibration["seeds_where_it_changes"]))
        verdict = (
            f"**The worst group changes with the convention** (seeds {seeds}): who is protected is then a "
            "choice of scale, not a finding."
        )
    used = f" Training used {code(calibration['used'])}." if calibration.get("used") else ""
    if calibration.get("used") == "none":
        used += (
            " **Uncalibrated: a constant added to a head, or an offset of its own for every prompt, leaves "
            "the likelihood of all preferences as it is and changes whom this policy was trained for.**"
        )
    return [
        "## Calibration\n\nPreferences fix a reward only up to an offset and a scale, so a minimum over "
        f"groups needs a convention.{used} {verdict} The worst group in the number of seeds named: {found}."
        f"{_offsets_text(calibration.get('offsets'))}"
    ]


def _offsets_text(offsets: Mapping[str, Any] | None) -> str:
    if not offsets or offsets["wrong_worst_group"] is None:
        return ""
    sizes = ", ".join(
        f"{size:.2f} ({markdown(name)})" for name, size in offsets["deviation"].items() if size is not None
    )
    taken = "were taken off" if offsets["by_prompt"] else "stay in the rewards"
    chance = offsets["wrong_worst_group"]
    return (
        f"\n\nOffsets by prompt, which {taken}, deviate by {sizes} within-prompt deviations. What is left of "
        f"them makes a rollout of {offsets['num_prompts']:.0f} prompts name another worst group with "
        f"probability {f'{chance:.3f}' if chance >= 0.001 else 'under .001'} (largest over seeds): "
        "often where groups are level, which costs no more than they are apart."
    )


def _caveats(summary: Mapping[str, Any]) -> str:
    count = len(summary["seeds"])
    seeds = (
        "One seed: intervals hold prompts only, and say nothing about another training run."
        if count == 1
        else f"{count} seeds are few: the bootstrap over few seeds (`bootstrap_low` and `bootstrap_high` in "
        "summary.json) is too narrow: simulated, a nominal 95% covers .86 to .89 with 3 seeds, .92 to .94 "
        "with 6. The t intervals (`low` and `high`), which stand in the tables, cover .95 to .97, for "
        "relative changes .93."
        if count < 10
        else f"{count} seeds: chance in training is measured by these alone."
    )
    noted: dict[str, list[str]] = {}  # policies whose intervals may be too narrow
    for name, policy in summary["policies"].items():
        for note in policy.get("notes", []):
            if "biased low" not in note and "one seed" not in note:
                noted.setdefault(note, []).append(name)
    lines = [
        *_about_the_judge(summary),
        "The minimum over groups of noisy win rates is biased low, most where groups are close. The "
        "interval of the worst group allows for the closeness of the groups.",
        seeds,
        *(
            f"{', '.join(map(markdown, names))}: {markdown(note, _SENTENCE)}."
            for note, names in noted.items()
        ),
    ]
    return "\n- ".join(["## How to read this\n", *lines])


def _judge_kinds(summary: Mapping[str, Any]) -> set[str | None]:
    return {extra.get("judge") for extra in summary.get("extra", [])}


def _about_the_judge(summary: Mapping[str, Any]) -> list[str]:
    kinds = _judge_kinds(summary)
    if kinds == {"world"}:
        return [
            "The world is synthetic and its conflict between groups was chosen. The size of the effect is "
            "a fact about this world, not about people.",
            "Win rates use the groups' true utilities, which training never sees.",
        ]
    if kinds == {"reward heads"}:
        return [
            "The judge is a reward mixture. Where the policies were trained on it, win rates are "
            "optimistic: a policy learns its judge's mistakes too."
        ]
    lines = ["Win rates are what the judge says; they are as good as the judge."]
    for extra in summary.get("extra", []):
        if extra.get("judge_first_place"):
            bias = ", ".join(
                f"{markdown(name)} {value:+.3f}" for name, value in extra["judge_first_place"].items()
            )
            lines.append(
                f"Both orders were asked. What stood first won oftener by (seed {extra['seed']}): {bias}."
            )
    return lines
