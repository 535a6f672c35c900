"""Draw group utilities over training, and win rates by policy and group.

Each figure is written as PNG and SVG, with the numbers it shows as CSV beside it. Matplotlib comes with
the ``plot`` extra and is imported only when a figure is drawn; no backend and no global setting changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.core.text_escape import plot

__all__ = [
    "COLOURS",
    "DASHES",
    "FONT",
    "MARKERS",
    "add_legend",
    "figure_parts",
    "figure_text",
    "new_figure",
    "plot_training",
    "plot_win_rates",
    "tidy",
    "write_figure",
]

# Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
FONT = 13

_MEAN_KEY = re.compile(r"^rewards/(\d+)/mean$")

History = Sequence[Mapping[str, float]]


def new_figure(width: float, height: float) -> Any:
    """Make a figure of this size in inches, without global state; an error names the extra of Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need Matplotlib: pip install 'torchrl-maxmin[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """Put one legend above all panels, in as many columns as fit."""
    # A letter is about 0.11 inch wide at this size, handle and gap about 1 inch.
    columns = int(figure.get_size_inches()[0] / (1.0 + 0.11 * max(map(len, labels))))
    columns = min(max(columns, 1), len(labels))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=FONT)


def tidy(axis: Any) -> None:
    """Draw a light horizontal grid behind the marks, no box."""
    axis.tick_params(labelsize=FONT - 1)
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def write_figure(figure: Any, path: str | Path, rows: list[dict[str, Any]]) -> list[Path]:
    """Write .png, .svg and, with the numbers that it shows, .csv; the same numbers give the same files."""
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg, table = (path.with_name(path.name + suffix) for suffix in (".png", ".svg", ".csv"))
    figure.savefig(png, dpi=150)
    # A fixed salt and no date: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "torchrl-maxmin"}):
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg, write_csv(table, rows)]


def figure_parts(draw: Callable[[], list[str]], figures: bool | None, what: str) -> list[str]:
    """Draw a report's figures; returns their paragraphs, or the one that says why there is none.

    Args:
        draw: Draws, and returns the paragraphs.
        figures: None draws where Matplotlib is there.
        what: Word for what is missing without it.
    """
    if figures is None and find_spec("matplotlib") is None:
        return [f"No {what}: Matplotlib is missing (`pip install 'torchrl-maxmin[plot]'`)."]
    return draw() if figures in (None, True) else []


def figure_text(name: str, alt: str, note: str = "") -> str:
    """Make the paragraph that shows ``figures/<name>.png`` and names the file of its numbers."""
    return f"![{alt}](figures/{name}.png)\n\n{note}Numbers: [figures/{name}.csv](figures/{name}.csv)"


def plot_training(
    histories: Mapping[str, History | Sequence[History]],
    path: str | Path,
    *,
    group_names: Sequence[str] | None = None,
) -> list[Path]:
    """Draw group utilities, and the group weights where there are any, over training.

    One column a policy; every seed a thin line, their mean a thick one.

    Args:
        histories: Policy name -> one metric dict an iteration, or a list of such lists, one a seed. Keys
            read: ``rewards/{k}/mean`` and ``maxmin/weights/{k}``; k must be the same group for every policy.
        path: Where to write, without suffix: .png, .svg and .csv are added.
        group_names: Names of the groups 0..K-1.

    Returns:
        The three paths.

    Raises:
        ImportError: If Matplotlib is missing.
        ValueError: If there is nothing to draw.

    Example:
        >>> import tempfile
        >>> history = [{"rewards/0/mean": 0.1 * i, "rewards/1/mean": 0.2 * i} for i in range(5)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [p.suffix for p in plot_training({"maxmin": history}, folder + "/training")]
        ['.png', '.svg', '.csv']
    """
    seeds = {policy: _as_seeds(history) for policy, history in histories.items()}
    keys = {key for runs in seeds.values() for run in runs for row in run for key in row}
    found = [int(match[1]) for match in map(_MEAN_KEY.match, keys) if match]
    if not found:
        raise ValueError("no 'rewards/{k}/mean' in the histories: nothing to draw")
    num_groups = max(found) + 1
    names = [f"group {k}" for k in range(num_groups)] if group_names is None else list(group_names)
    if len(names) != num_groups:
        raise ValueError(f"{len(names)} group names for {num_groups} groups in the histories")
    utility, weight = "rewards/{}/mean", "maxmin/weights/{}"
    weighted = weight.format(0) in keys
    num_rows = 2 if weighted else 1
    figure = new_figure(max(3.6 * len(seeds), 5.0) + 0.6, 3.1 * num_rows + 0.9)
    axes = figure.subplots(num_rows, len(seeds), squeeze=False, sharex="col", sharey="row")
    rows: list[dict[str, Any]] = []
    for column, (policy, runs) in enumerate(seeds.items()):
        drawn = False
        for row, key in enumerate((utility, weight)[:num_rows]):
            axis = axes[row][column]
            for k, name in enumerate(names):
                curves = [np.array([row.get(key.format(k), np.nan) for row in run], float) for run in runs]
                curves = [curve for curve in curves if np.isfinite(curve).any()]
                if not curves:
                    continue
                drawn = drawn or row == 1
                _draw_curves(axis, curves, k, plot(name))
                rows += [
                    {"policy": policy, "seed_index": s, "iteration": i, "metric": key.format(k),
                     "group": name, "value": value}
                    for s, curve in enumerate(curves)
                    for i, value in enumerate(curve)
                    if np.isfinite(value)
                ]  # fmt: skip
            tidy(axis)
        axes[0][column].set_title(plot(policy), fontsize=FONT + 1)
        axes[-1][column].set_xlabel("iteration", fontsize=FONT)
        if weighted:
            axes[1][column].set_ylim(-0.03, 1.03)
            if not drawn:
                axes[1][column].text(
                    0.5, 0.5, "no group weights", ha="center", va="center", color="0.4",
                    fontsize=FONT - 1, transform=axes[1][column].transAxes,
                )  # fmt: skip
    axes[0][0].set_ylabel("group utility", fontsize=FONT)
    if weighted:
        axes[1][0].set_ylabel("group weight", fontsize=FONT)
    add_legend(figure, *axes[0][0].get_legend_handles_labels())
    return write_figure(figure, path, rows)


def plot_win_rates(summary: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Draw win rates against the reference policy by policy and group, with intervals and the line at 1/2.

    Args:
        summary: What :func:`summarise` returned.
        path: Where to write, without suffix: .png, .svg and .csv are added.

    Returns:
        The three paths.

    Raises:
        ImportError: If Matplotlib is missing.
        ValueError: If there is no policy beside the reference.

    Example:
        >>> import tempfile
        >>> rate = {"mean": 0.8, "low": 0.7, "high": 0.9}
        >>> summary = {"groups": [{"name": "all", "share": 1.0}],
        ...            "policies": {"maxmin": {"win_rate_vs_sft": {"all": rate}}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [p.suffix for p in plot_win_rates(summary, folder + "/win_rates")]
        ['.png', '.svg', '.csv']
    """
    policies = [policy for policy in summary["policies"] if policy != "sft"]
    if not policies:
        raise ValueError("no policy to draw beside the reference")
    groups = summary["groups"]
    # Room for one number over every interval, side by side.
    figure = new_figure(max(len(policies) * (0.62 * len(groups) + 0.5) + 1.2, 5.4), 4.4)
    axis = figure.subplots()
    step = 0.8 / (len(groups) + 0.6)
    rows = []
    for k, group in enumerate(groups):
        rates = [summary["policies"][policy]["win_rate_vs_sft"][group["name"]] for policy in policies]
        means = np.array([rate["mean"] for rate in rates])
        ends = np.array([(rate["low"], rate["high"]) for rate in rates], dtype=float).T
        errors = np.clip([means - ends[0], ends[1] - means], 0, None)
        offset = step * (k - (len(groups) - 1) / 2)
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        where = np.arange(len(policies)) + offset
        axis.errorbar(
            where, means, yerr=errors, fmt=marker, color=colour, markersize=6, capsize=7, capthick=2,
            elinewidth=2.2, label=f"{plot(group['name'])} ({group['share']:.0%})",
        )  # fmt: skip
        for policy, x, rate, low, high in zip(policies, where, rates, *ends, strict=True):
            # Numbers stand on the far side of the line at 1/2, so that it does not strike them through.
            end, shift, side = (high, 5, "bottom") if rate["mean"] >= 0.5 else (low, -5, "top")
            axis.annotate(
                f"{rate['mean']:.2f}", (x, end), xytext=(0, shift), textcoords="offset points",
                ha="center", va=side, fontsize=FONT - 1, color="0.2",
            )  # fmt: skip
            row = {"policy": policy, "group": group["name"], "mean": rate["mean"], "low": low, "high": high}
            rows.append(row)
    axis.axhline(0.5, color="0.35", linewidth=1.4, linestyle="--", zorder=0)
    axis.text(
        1.01, 0.5, "as good\nas sft", transform=axis.get_yaxis_transform(), color="0.35", ha="left",
        va="center", fontsize=FONT - 2,
    )  # fmt: skip
    axis.set_xticks(range(len(policies)), map(plot, policies))
    axis.set_xlim(-0.55, len(policies) - 0.45)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_ylim(-0.09, 1.09)
    axis.set_ylabel("win rate against sft", fontsize=FONT)
    tidy(axis)
    axis.tick_params(axis="x", labelsize=FONT)
    add_legend(figure, *axis.get_legend_handles_labels())
    return write_figure(figure, path, rows)


def _as_seeds(history: History | Sequence[History]) -> list[History]:
    runs: list[Any] = list(history)
    return [runs] if runs and isinstance(runs[0], Mapping) else runs


def _draw_curves(axis: Any, curves: list[np.ndarray], k: int, name: str) -> None:
    colour, dash = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
    if len(curves) > 1:
        for curve in curves:
            axis.plot(curve, color=colour, linewidth=1.0, alpha=0.4)
    # Seeds may stop early: the mean goes as far as all of them.
    shortest = min(len(curve) for curve in curves)
    mean = np.mean([curve[:shortest] for curve in curves], axis=0)
    axis.plot(mean, color=colour, linestyle=dash, linewidth=2.8, label=name)
