"""Figures of the frontier: worst group against majority and average, by share, and change by change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frontier import FrontierPoint, frontier_rows

from torchrl_maxmin.evaluation.plots import (
    COLOURS,
    DASHES,
    FONT,
    MARKERS,
    add_legend,
    new_figure,
    tidy,
    write_figure,
)

__all__ = ["ExactPanel", "plot_changes", "plot_frontier", "plot_series"]


# Sweeps are thin and cool, policies of their own large and warm; the last of these is the one to find.
_SWEEPS = (COLOURS[0], COLOURS[4], "0.45")
_NAMED = (COLOURS[1], COLOURS[5], COLOURS[3], COLOURS[2], COLOURS[6])
_NAMED_MARKERS = ("s", "D", "^", "v", "*")


@dataclasses.dataclass(frozen=True, eq=False)
class ExactPanel:
    """An enumerable world beside the measured one: utilities less the KL, by group, majority first.

    Attributes:
        curve: The best policies of fixed weights [S seeds, W, K].
        optimum: Each seed's optimum of the dual [S], the largest worst-group value that there is.
        trained: Policy -> what it is worth [S, K].
    """

    curve: np.ndarray
    optimum: np.ndarray
    trained: Mapping[str, np.ndarray]


def plot_frontier(
    points: Mapping[str, FrontierPoint],
    path: str | Path,
    *,
    lines: Mapping[str, Sequence[str]],
    named: Sequence[str],
    cost: float | None = None,
    baseline: str = "single",
    exact: ExactPanel | None = None,
) -> list[Path]:
    """Worst group against majority and against average, with intervals, and the exact optimum beside it.

    Args:
        points: Policy -> point, all on the same seeds and prompts.
        path: Where to write, without suffix: .png, .svg and .csv are added.
        lines: Label of a sweep -> its policies in order, joined by a line.
        named: Policies with a mark of their own in the legend.
        cost: Draw where the majority has lost this share of the baseline's win rate.
        baseline: That baseline.
        exact: A third panel.

    Returns:
        The three paths.

    Raises:
        ImportError: If Matplotlib is missing.
        KeyError: If a line or ``named`` holds a policy that has no point.
    """
    panels = 2 if exact is None else 3
    figure = new_figure(5.2 * panels, 6.0)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, of in zip(axes, ("majority", "average"), strict=False):
        for index, (label, names) in enumerate(lines.items()):
            _draw_line(axis, [_place(points[name], of) for name in names], index, label)
        for index, name in enumerate(named):
            _draw_mark(axis, _place(points[name], of), index, name)
        axis.set_xlabel(
            f"{of}'s win rate" if of == "majority" else "win rate, average over groups", fontsize=FONT
        )
        tidy(axis)
    axes[0].set_ylabel("worst group's win rate against sft", fontsize=FONT)
    if cost is not None:
        floor = (1 - cost) * points[baseline].majority_rate
        axes[0].axvline(floor, color="0.35", linewidth=1.4, linestyle=":", zorder=0)
        axes[0].annotate(
            f"majority\n-{cost:.0%}", (floor, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="bottom", fontsize=FONT - 2, color="0.35",
        )  # fmt: skip
    rows = [{"panel": "measured", **row} for row in frontier_rows(points.values())]
    if exact is not None:
        rows += _draw_exact(axes[2], exact, list(named))
    add_legend(figure, *axes[0].get_legend_handles_labels())
    fields = list(dict.fromkeys(key for row in rows for key in row))
    return write_figure(figure, path, [{field: row.get(field, "") for field in fields} for row in rows])


def plot_series(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str,
    x_label: str,
    panels: Mapping[str, str],
    level: Mapping[str, float] | None = None,
) -> list[Path]:
    """Numbers with intervals against one variable, a line a series, on a logarithmic axis.

    Args:
        rows: ``{"series": ..., x: ..., key: mean, key + " low": ..., key + " high": ...}``.
        path: Where to write, without suffix.
        x: Which column is the variable.
        x_label: What it is called.
        panels: Column -> label of its panel's y axis.
        level: Column -> where to draw a line across.

    Returns:
        The three paths.
    """
    figure = new_figure(5.6 * len(panels), 5.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(row["series"] for row in rows))
    ticks = sorted({float(row[x]) for row in rows})
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate(names):
            mine = sorted((row for row in rows if row["series"] == name), key=lambda row: row[x])
            # Side by side, so that intervals at one share do not cover each other.
            shift = 1.06 ** (index - (len(names) - 1) / 2)
            places = np.array([row[x] for row in mine]) * shift
            _draw_errors(axis, places, mine, key, index, name)
        if level and key in level:
            axis.axhline(level[key], color="0.35", linewidth=1.4, linestyle="--", zorder=1)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(x_label, fontsize=FONT)
        axis.set_ylabel(label, fontsize=FONT)
        tidy(axis)
    add_legend(figure, *axes[0].get_legend_handles_labels())
    return write_figure(figure, path, [dict(row) for row in rows])


def plot_changes(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    policies: Sequence[str],
    panels: Mapping[str, str],
    x_label: str,
    level: float | None = None,
) -> list[Path]:
    """Policies side by side, condition by condition, with intervals.

    Args:
        rows: ``{"condition": ..., "measure": ...}``, and for every policy its mean under its name, the ends
            of its interval under ``name + " low"`` and ``name + " high"``.
        path: Where to write, without suffix.
        policies: The policies to draw.
        panels: Measure -> title of its panel; conditions without that measure are left out of it.
        x_label: What the numbers are; rates, as the axis goes from 0 to 1.
        level: Where to draw a line down.

    Returns:
        The three paths.
    """
    conditions = {measure: [row for row in rows if row["measure"] == measure] for measure in panels}
    # One above the other on one axis, a condition as high as another: narrow enough for a page.
    heights = [len(found) + 0.5 for found in conditions.values()]
    figure = new_figure(9.0, 0.38 * sum(heights) + 0.5 * len(panels) + 1.2)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        mine = conditions[measure]
        for index, policy in enumerate(policies):
            places = np.arange(len(mine)) + 0.24 * (index - (len(policies) - 1) / 2)
            means = np.array([row[policy] for row in mine])
            axis.errorbar(
                means, places, xerr=_errors(mine, policy), fmt=MARKERS[index], color=COLOURS[index],
                markersize=7, capsize=4, capthick=1.8, elinewidth=2.0, label=policy,
            )  # fmt: skip
        if level is not None:
            axis.axvline(level, color="0.35", linewidth=1.4, linestyle="--", zorder=0)
        axis.set_yticks(range(len(mine)), [row["condition"] for row in mine])
        axis.set_ylim(len(mine) - 0.4, -0.6)
        axis.set_xlim(-0.03, 1.03)
        axis.set_title(title, fontsize=FONT + 1)
        tidy(axis)
        axis.grid(axis="x", color="0.9", linewidth=0.8)
    axes[-1].set_xlabel(x_label, fontsize=FONT)
    add_legend(figure, *axes[0].get_legend_handles_labels())
    return write_figure(figure, path, [dict(row) for row in rows])


def _place(point: FrontierPoint, of: str) -> dict[str, float]:
    """Where a point stands in a panel, with the ends of both intervals."""
    average = point.rates.average_over_groups
    assert average is not None
    groups, worst = point.rates.groups, point.rates.worst_group
    k = point.majority
    across = (
        (groups.mean[k], groups.low[k], groups.high[k])
        if of == "majority"
        else (average.mean, average.low, average.high)
    )
    upward = (worst.mean, worst.low, worst.high)
    keys = ("x", "x low", "x high", "y", "y low", "y high")
    return dict(zip(keys, map(float, across + upward), strict=True))


def _errors(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    low, mean, high = (np.array([float(row[key + end]) for row in rows]) for end in (" low", "", " high"))
    return np.clip([mean - low, high - mean], 0, None)


def _draw_line(axis: Any, places: list[dict[str, float]], index: int, label: str) -> None:
    axis.errorbar(
        [place["x"] for place in places], [place["y"] for place in places],
        xerr=_errors(places, "x"), yerr=_errors(places, "y"), color=_SWEEPS[index % len(_SWEEPS)],
        linestyle=DASHES[index % len(DASHES)], linewidth=2.2, marker=MARKERS[index % len(MARKERS)],
        markersize=5, elinewidth=1.2, label=label,
    )  # fmt: skip


def _draw_mark(axis: Any, place: dict[str, float], index: int, label: str) -> None:
    marker = _NAMED_MARKERS[index % len(_NAMED_MARKERS)]
    axis.errorbar(
        [place["x"]], [place["y"]], xerr=_errors([place], "x"), yerr=_errors([place], "y"),
        color=_NAMED[index % len(_NAMED)], linestyle="none", marker=marker,
        markersize=17 if marker == "*" else 10, markeredgecolor="white", elinewidth=2.0, capsize=4,
        label=label, zorder=3,
    )  # fmt: skip


def _draw_errors(
    axis: Any, places: np.ndarray, rows: Sequence[Mapping[str, Any]], key: str, index: int, label: str
) -> None:
    axis.errorbar(
        places, [float(row[key]) for row in rows], yerr=_errors(rows, key), color=COLOURS[index],
        linestyle=DASHES[index % len(DASHES)], linewidth=2.2, marker=MARKERS[index], markersize=7,
        elinewidth=1.8, capsize=4, label=label,
    )  # fmt: skip


def _draw_exact(axis: Any, exact: ExactPanel, named: list[str]) -> list[dict[str, Any]]:
    """The enumerable world's panel; its rows for the CSV.

    Means over seeds. A policy stands as far below the optimum as it fell short of each seed's own; its bar
    goes from the smallest to the largest shortfall.
    """
    curve, optimum = np.asarray(exact.curve).mean(axis=0), float(np.mean(exact.optimum))
    worst = np.asarray(exact.curve).min(axis=2).mean(axis=0)
    axis.plot(curve[:, 0], worst, color=_SWEEPS[0], linewidth=2.2)
    axis.axhline(optimum, color="0.35", linewidth=1.4, linestyle="--", zorder=1)
    axis.annotate(
        "exact optimum", (0.02, optimum), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", ha="left", va="bottom", fontsize=FONT - 2, color="0.35",
    )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"panel": "exact", "policy": "best of fixed weights", "majority value": x, "worst value": y}
        for x, y in zip(curve[:, 0], worst, strict=True)
    ]
    rows.append({"panel": "exact", "policy": "optimum", "worst value": optimum})
    places = []
    for name, values in exact.trained.items():
        across, short = values[:, 0], exact.optimum - values.min(axis=1)
        place = {
            "x": across.mean(), "x low": across.mean(), "x high": across.mean(),
            "y": optimum - short.mean(), "y low": optimum - short.max(), "y high": optimum - short.min(),
        }  # fmt: skip
        if name in named:
            _draw_mark(axis, place, named.index(name), name)
        else:
            _draw_line(axis, [place], 0, name)
            axis.annotate(
                name, (place["x"], place["y"]), xytext=(8, -4), textcoords="offset points", ha="left",
                va="top", fontsize=FONT - 2, color="0.35",
            )  # fmt: skip
        keys = {
            "majority value": "x",
            "worst value": "y",
            "worst value low": "y low",
            "worst value high": "y high",
        }
        rows.append({"panel": "exact", "policy": name} | {key: place[end] for key, end in keys.items()})
        places.append(place)
    # The curve's far ends, one group alone, would flatten the rest.
    bottom = min(place["y low"] for place in places)
    margin = 0.12 * (optimum - bottom)
    shown = worst >= bottom - margin
    left = min(curve[shown, 0].min(), *(place["x"] for place in places))
    right = max(curve[shown, 0].max(), *(place["x"] for place in places))
    axis.set_ylim(bottom - margin, optimum + 2 * margin)
    axis.set_xlim(left - 0.06 * (right - left), right + 0.06 * (right - left))
    axis.set_xlabel("majority's utility less KL", fontsize=FONT)
    axis.set_ylabel("worst group's utility less KL", fontsize=FONT)
    axis.set_title("an enumerable world", fontsize=FONT + 1)
    tidy(axis)
    return rows
