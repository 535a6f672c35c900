"""Draw group utilities over training, and win rates by policy and group.

Figures are 7.2 inches wide, so that their letters can be read where a page shows them 560 pixels wide; each
group has a colour, a shape and a dash of its own, and its name stands beside its marks. Each figure is
written as PNG and SVG, with the numbers it shows as CSV beside it. Matplotlib comes with
the ``plot`` extra and is imported only when a figure is drawn; no backend and no global setting changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    "WIDTH",
    "Drawing",
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
#: Inches of every figure.
WIDTH = 7.2

#: Averages that stand beside the groups, and whether they are drawn hollow.
_AVERAGES = {"average_over_groups": "average over groups", "average_over_people": "average over people"}
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


@dataclass(frozen=True)
class Drawing:
    """A figure of a report.

    Attributes:
        name: Of its files in the folder ``figures``.
        alt: What it shows, for those who do not see it.
        note: How to read it.
        draw: Draws it; None where only an earlier one can be shown.
    """

    name: str
    alt: str
    note: str
    draw: Callable[[], Any] | None


def figure_parts(folder: Path, drawings: Sequence[Drawing], figures: bool | None, what: str) -> list[str]:
    """Draw a report's figures; returns the paragraphs of those that are there, drawn now or before.

    Args:
        folder: Of the report.
        drawings: What can be drawn.
        figures: Whether to draw; None draws where Matplotlib is there, and says so where it is not.
        what: Word for what is missing without it.
    """
    missing = figures is None and find_spec("matplotlib") is None
    if figures is not False and not missing:
        for drawing in drawings:
            if drawing.draw is not None:
                drawing.draw()
    there = [one for one in drawings if (folder / "figures" / f"{one.name}.png").is_file()]
    parts = [figure_text(one.name, one.alt, one.note) for one in there]
    if missing:
        said = "The figures are those that were there" if there else f"No {what}"
        parts.append(f"{said}: Matplotlib is missing (`pip install 'torchrl-maxmin[plot]'`).")
    return parts


def figure_text(name: str, alt: str, note: str = "") -> str:
    """Make the paragraph that shows ``figures/<name>.png`` and names the file of its numbers."""
    return f"![{alt}](figures/{name}.png)\n\n{note}Numbers: [figures/{name}.csv](figures/{name}.csv)"


def plot_training(
    histories: Mapping[str, History | Sequence[History]],
    path: str | Path,
    *,
    group_names: Sequence[str] | None = None,
    reference: Sequence[float] | None = None,
) -> list[Path]:
    """Draw group utilities, and the group weights where there are any, over training.

    One row a policy; every seed a thin line, their mean a thick one, its group's name at its end.

    Args:
        histories: Policy name -> one metric dict an iteration, or a list of such lists, one a seed. Keys
            read: ``rewards/{k}/mean`` and ``maxmin/weights/{k}``; k must be the same group for every policy.
        path: Where to write, without suffix: .png, .svg and .csv are added.
        group_names: Names of the groups 0..K-1.
        reference: The reference policy's utility by group, in the same unit: a dotted line each.

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
    seeds = {policy: as_seeds(history) for policy, history in histories.items()}
    keys = {key for runs in seeds.values() for run in runs for row in run for key in row}
    found = [int(match[1]) for match in map(_MEAN_KEY.match, keys) if match]
    if not found:
        raise ValueError("no 'rewards/{k}/mean' in the histories: nothing to draw")
    num_groups = max(found) + 1
    names = [f"group {k}" for k in range(num_groups)] if group_names is None else list(group_names)
    if len(names) != num_groups:
        raise ValueError(f"{len(names)} group names for {num_groups} groups in the histories")
    metrics = {"rewards/{}/mean": "utility"}
    if any(key.startswith("maxmin/weights/") for key in keys):
        metrics["maxmin/weights/{}"] = "weight of the group"
    figure = new_figure(WIDTH, 2.3 * len(seeds) + 0.5)
    axes = figure.subplots(len(seeds), len(metrics), squeeze=False, sharex="row", sharey="col")
    rows: list[dict[str, Any]] = []
    for line, (policy, runs) in enumerate(seeds.items()):
        for axis, (key, title) in zip(axes[line], metrics.items(), strict=True):
            curves = group_curves(runs, key, num_groups)
            ends = [_draw_curves(axis, of_group, k) for k, of_group in enumerate(curves)]
            for k, name in enumerate(names):
                if reference is not None and title == "utility":
                    axis.axhline(reference[k], color=COLOURS[k % len(COLOURS)], linewidth=1.2, linestyle=":")
                rows += [
                    {"policy": policy, "seed_index": s, "iteration": i, "metric": key.format(k),
                     "group": name, "value": value}
                    for s, curve in enumerate(curves[k])
                    for i, value in enumerate(curve)
                    if np.isfinite(value)
                ]  # fmt: skip
            tidy(axis)
            axis.set_title(f"{plot(policy)}: {title}", fontsize=FONT, loc="left")
            if title != "utility":
                axis.set_ylim(-0.04, 1.04)
            _label_ends(axis, ends, names)
            if not any(curves):
                axis.text(0.5, 0.5, "one reward for all:\nno weights", ha="center", va="center", color="0.35",
                          fontsize=FONT - 1, transform=axis.transAxes)  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("iteration", fontsize=FONT)
    return write_figure(figure, path, rows)


def group_curves(runs: Sequence[History], key: str, num_groups: int) -> list[list[np.ndarray]]:
    """Read a metric over training by group, then seed.

    Args:
        runs: One list of metrics a seed.
        key: Of the metric, with a place for the group.
        num_groups: K. A policy with one weight alone was trained on one reward, and has none.
    """
    found = []
    for k in range(num_groups):
        curves = [np.array([row.get(key.format(k), np.nan) for row in run], float) for run in runs]
        found.append([curve for curve in curves if np.isfinite(curve).any()])
    alone = key.startswith("maxmin/weights") and num_groups > 1 and not any(found[1:])
    return [[] for _ in found] if alone else found


def plot_win_rates(summary: Mapping[str, Any], path: str | Path) -> list[Path]:
    """Draw win rates against the reference policy by policy and group, with intervals and the line at 1/2.

    Under the groups of each policy stand both averages; small rings are seeds.

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
    policies = {policy: entry for policy, entry in summary["policies"].items() if policy != "sft"}
    if not policies:
        raise ValueError("no policy to draw beside the reference")
    rows: list[dict[str, Any]] = []
    labels, headings, y = [], [], 0.0
    drawn = []
    for policy, entry in policies.items():
        headings.append((y, plot(policy)))
        for label, marker, rate, seeds in _rates_of(summary, entry):
            y -= 1
            low, high = (np.nan if rate[end] is None else rate[end] for end in ("low", "high"))
            drawn.append((y, marker, rate["mean"], low, high, seeds))
            labels.append((y, label))
            rows.append({"policy": policy, "group": label[0], "mean": rate["mean"], "low": low, "high": high})
        y -= 1.4
    figure = new_figure(WIDTH, 0.27 * -y + 0.7)
    axis = figure.subplots()
    for y_mark, style, mean, low, high, seeds in drawn:
        colour = "0.25" if style is None else COLOURS[style % len(COLOURS)]
        marker = "|" if style is None else MARKERS[style % len(MARKERS)]
        axis.plot([low, high], [y_mark, y_mark], color=colour, linewidth=2.6, solid_capstyle="butt")
        axis.plot(seeds, [y_mark - 0.3] * len(seeds), "o", color=colour, markersize=3.6, fillstyle="none",
                  markeredgewidth=1)  # fmt: skip
        axis.plot(mean, y_mark, marker, color=colour, markersize=8 if style is not None else 12,
                  markeredgewidth=2.4 if style is None else 0.8)  # fmt: skip
        axis.text(1.03, y_mark, f"{mean:.2f}", transform=axis.get_yaxis_transform(), va="center",
                  fontsize=FONT - 1)  # fmt: skip
    for y_heading, name in headings:
        axis.text(-0.02, y_heading, name, transform=axis.get_yaxis_transform(), ha="right", va="center",
                  fontsize=FONT, fontweight="bold")  # fmt: skip
    axis.axvline(0.5, color="0.35", linewidth=1.4, linestyle="--", zorder=0)
    axis.set_yticks([place for place, _ in labels], [plot(name) + note for _, (name, note) in labels])
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(y + 0.7, 0.8)
    axis.set_xticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5\nas good as sft", "0.75", "1"])
    axis.set_xlabel("win rate against sft", fontsize=FONT)
    tidy(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color="0.9", linewidth=0.8)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    for row in rows:
        row["low"], row["high"] = (None if np.isnan(row[end]) else row[end] for end in ("low", "high"))
    return write_figure(figure, path, rows)


def _rates_of(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Labels, style, rate and seeds of a policy's groups, and of its averages where it has them."""
    per_seed = entry.get("per_seed", [])
    several = len(per_seed) > 1
    found: list[tuple[Any, ...]] = []
    for k, group in enumerate(summary["groups"]):
        name = group["name"]
        seeds = [row["win_rate_vs_sft"][name] for row in per_seed] if several else []
        found.append(((name, f" ({group['share']:.0%})"), k, entry["win_rate_vs_sft"][name], seeds))
    for key, label in _AVERAGES.items():
        if f"{key}_interval" in entry:
            seeds = [row[key] for row in per_seed if key in row] if several else []
            found.append(((label, ""), None, entry[f"{key}_interval"], seeds))
    return found


def as_seeds(history: History | Sequence[History]) -> list[History]:
    """Return a list of seeds' metrics, whether one seed or several were given."""
    runs: list[Any] = list(history)
    return [runs] if runs and isinstance(runs[0], Mapping) else runs


def _draw_curves(axis: Any, curves: list[np.ndarray], k: int) -> tuple[float, float] | None:
    """Draw one group's curves; returns where their mean ends."""
    if not curves:
        return None
    colour, dash = COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)]
    if len(curves) > 1:
        for curve in curves:
            axis.plot(curve, color=colour, linewidth=1.0, alpha=0.4)
    # Seeds may stop early: the mean goes as far as all of them.
    shortest = min(len(curve) for curve in curves)
    mean = np.mean([curve[:shortest] for curve in curves], axis=0)
    axis.plot(mean, color=colour, linestyle=dash, linewidth=2.6)
    return shortest - 1, float(mean[-1])


def _label_ends(axis: Any, ends: Sequence[tuple[float, float] | None], names: Sequence[str]) -> None:
    """Write the groups' names at the ends of their curves, apart from one another."""
    low, high = axis.get_ylim()
    least, last = 0.13 * (high - low), -np.inf
    there = sorted((end[1], k) for k, end in enumerate(ends) if end is not None and np.isfinite(end[1]))
    for height, k in there:
        last = max(height, last + least)
        axis.annotate(
            plot(names[k], 18), (1.0, last), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=COLOURS[k % len(COLOURS)], fontsize=FONT - 2,
        )  # fmt: skip
