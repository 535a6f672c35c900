"""Write ``report.md``, ``report.html`` and the terminal table from a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.core.tables import markdown_table, write_paragraphs
from torchrl_maxmin.core.text_escape import markdown, terminal
from torchrl_maxmin.evaluation.page import write_evaluation_page
from torchrl_maxmin.evaluation.plots import Drawing, figure_parts, plot_training, plot_win_rates
from torchrl_maxmin.evaluation.tables import (
    comparison_block,
    group_names,
    interval_text,
    number_text,
    pairs_block,
    policy_table,
)
from torchrl_maxmin.evaluation.texts import calibration_texts, caveats, certificate_texts, description
from torchrl_maxmin.evaluation.verdict import seeds_text, verdict
from torchrl_maxmin.pages import Text, add_results, verdict_markdown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["interval_text", "number_text", "rich_table", "write_cards", "write_report"]

_SENTENCE = 2000  # characters shown of what is longer than a name


def write_report(
    folder: str | Path,
    summary: Mapping[str, Any],
    *,
    histories: Mapping[str, Any] | None = None,
    title: str = "Results by group",
    figures: bool | None = None,
) -> Path:
    """Write ``report.md`` with its figures, and ``report.html``, into ``folder``.

    Args:
        folder: Output folder (made if missing); figures go to ``folder/figures``.
        summary: What :func:`summarise` returned.
        histories: Training metrics for :func:`plot_training`; without them a figure that is there stays.
        title: First heading.
        figures: Draw figures; None draws them if Matplotlib is there. Figures that are there are shown in any
            case.

    Returns:
        Path of ``report.md``.

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
    folder = Path(folder)
    place = folder / "figures"
    drawings = [
        Drawing(
            "win_rates",
            "Win rates against sft by policy and group, with intervals",
            "Bars are the intervals of the table, small rings are seeds. ",
            lambda: plot_win_rates(summary, place / "win_rates"),
        ),
        Drawing(
            "training",
            "Group utilities and weights over training",
            "Thin lines are seeds, thick lines their mean, dotted lines the utilities of sft. ",
            None
            if not histories
            else lambda: plot_training(histories, place / "training", **training_labels(summary)),
        ),
    ]
    write_evaluation_page(folder / "report.html", summary, histories)
    calibration = calibration_texts(summary, markdown)
    parts = [
        f"# {title}",
        verdict_markdown(verdict(summary, markdown)),
        "## What was done\n\n" + description(summary, markdown),
        "## Win rates by group\n\n" + policy_table(summary),
        comparison_block(summary),
        *pairs_block(summary),
        *_size_block(summary),
        *figure_parts(folder, drawings, figures, "figures"),
        _em_block(summary),
        "## Certificate\n\n" + _paragraphs(certificate_texts(summary, markdown)),
        *(["## Calibration\n\n" + _paragraphs(calibration)] if calibration else []),
        "\n- ".join(["## How to read this\n", *caveats(summary, markdown)]),
    ]
    return write_paragraphs(folder / "report.md", parts)


def write_cards(folders: Mapping[str, str], summary: Mapping[str, Any]) -> None:
    """Add verdict and table to the model cards of policies, where their folders have one of ours.

    Args:
        folders: Folders by the names that the evaluation has for the policies.
        summary: What :func:`summarise` returned.
    """
    found = verdict(summary, markdown)
    for name, folder in folders.items():
        add_results(folder, name, found, policy_table(summary))


def training_labels(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Name the curves of training, and give the reference's utilities, in the unit of the tables."""
    levels = list(summary["policies"]["sft"]["utility"].values())
    return {"group_names": group_names(summary), "reference": None if None in levels else levels}


def _paragraphs(texts: Sequence[Text]) -> str:
    return "\n\n".join(_bold(text.text) if text.important else text.text for text in texts)


def _bold(text: str) -> str:
    head, colon, rest = text.partition(": ")
    return f"**{head}:** {rest}" if colon else f"**{text}**"


def rich_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of policies and groups for a terminal, and under it the verdict.

    Args:
        summary: What :func:`summarise` returned.

    Returns:
        A ``rich.table.Table``; print it with ``rich.console.Console().print``.

    Example:
        >>> rate = {"mean": 0.8, "low": 0.7, "high": 0.9}
        >>> policy = {"win_rate_vs_sft": {"all": rate}, "worst_group_win_rate": 0.8, "kl": 3.0,
        ...           "average_over_groups": 0.8, "average_over_groups_interval": rate,
        ...           "average_over_people": 0.8, "average_over_people_interval": rate}
        >>> policies = {"sft": policy, "maxmin": policy}
        >>> table = rich_table({"groups": [{"name": "all", "share": 1.0}], "policies": policies,
        ...             "seeds": [0], "confidence": 0.95, "comparison": {}, "shares_are": "given"})
        >>> table.row_count, str(table.caption)
        (2, 'With maxmin in place of sft, all (100% of people) gains; over all people, win rates rise.')
    """
    from rich.table import Table
    from rich.text import Text as Shown

    table = Table(title=f"Win rate against sft, {seeds_text(summary)}", title_justify="left")
    table.caption, table.caption_justify = Shown(verdict(summary, terminal).headline, "bold"), "left"
    table.add_column("policy", style="bold")
    for group in summary["groups"]:
        table.add_column(Shown(f"{terminal(group['name'], 40)} ({group['share']:.0%})"), justify="right")
    for column in ("worst group", "average over groups", "average over people", "KL"):
        table.add_column(column, justify="right")
    for name, policy in summary["policies"].items():
        table.add_row(
            Shown(terminal(name, 40)),
            *(interval_text(policy["win_rate_vs_sft"][group["name"]]) for group in summary["groups"]),
            number_text(policy["worst_group_win_rate"], ".3f"),
            number_text(policy["average_over_groups"], ".3f"),
            number_text(policy["average_over_people"], ".3f"),
            number_text(policy["kl"], ".2f"),
        )
    return table


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
