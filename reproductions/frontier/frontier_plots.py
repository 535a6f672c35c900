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
    WIDTH,
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
#: What stands across: one group, and the averages, which may move apart.
_ACROSS = ("majority", "average over groups", "average over people")


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
    """Worst group against majority and both averages, with intervals, and the exact optimum beside them.

    Args:
        points: Policy -> point, all on the same seeds and prompts.
        path: Where to write, without suffix: .png, .svg and .csv are added.
        lines: Label of a sweep -> its policies in order, joined by a line.
        named: Policies with a mark of their own in the legend.
        cost: Draw where the majority has lost this share of the baseline's win rate.
        baseline: That baseline.
        exact: A fourth panel.

    Returns:
        The three paths.

    Raises:
        ImportError: If Matplotlib is missing.
        KeyError: If a line or ``named`` holds a policy that has no point.
    """
    figure = new_figure(WIDTH, 7.4)
    axes = figure.subplots(2, 2).ravel()
    for axis, of in zip(axes, _ACROSS, strict=False):
        for index, (label, names) in enumerate(lines.items()):
            _draw_line(axis, [_place(points[name], of) for name in names], index, label)
        for index, name in enumerate(named):
            _draw_mark(axis, _place(points[name], of), index, name)
        axis.set_xlabel(f"{of}'s win rate" if of == "majority" else of, fontsize=FONT)
        tidy(axis)
    for axis in axes[::2]:
        axis.set_ylabel("worst group's win rate", fontsize=FONT)
    if cost is not None:
        floor = (1 - cost) * points[baseline].majority_rate
        axes[0].axvline(floor, color="0.35", linewidth=1.4, linestyle=":", zorder=0)
        axes[0].annotate(
            f"majority\n-{cost:.0%}", (floor, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0),
            textcoords="offset points", ha="right", va="bottom", fontsize=FONT - 2, color="0.35",
        )  # fmt: skip
    rows = [{"panel": "measured", **row} for row in frontier_rows(points.values())]
    if exact is not None:
        rows += _draw_exact(axes[3], exact, list(named))
    else:
        axes[3].set_visible(False)
    add_legend(figure, *axes[0].get_legend_handles_labels())
    fields = list(dict.fromkeys(key for row in rows for key in row))
    return write_figure(figure, path, [{field: row.get(field, "") for field in fields} for row in rows])


def plot_series(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str,
    x_label: str,
    key: str,
    label: str,
    level: float | None = None,
) -> list[Path]:
    """Numbers with intervals, a line each, those of one value of a variable together.

    Intervals lie one below the other, so that a wide one covers no other.

    Args:
        rows: ``{"series": ..., x: ..., key: mean, key + " low": ..., key + " high": ...}``.
        path: Where to write, without suffix.
        x: Which column is the variable, a share.
        x_label: What it is called.
        key: Which column is drawn.
        label: What it is called.
        level: Where to draw a line down.

    Returns:
        The three paths.
    """
    names = list(dict.fromkeys(row["series"] for row in rows))
    values = sorted({float(row[x]) for row in rows})
    figure = new_figure(WIDTH, 0.29 * len(values) * (len(names) + 1.2) + 0.9)
    axis, places, labels = figure.subplots(), [], []
    height = 0.0
    for value in values:
        axis.text(0.0, height, f"{x_label} {value:.0%}", transform=axis.get_yaxis_transform(), va="center",
                  fontsize=FONT, fontweight="bold", bbox={"color": "white", "pad": 1})  # fmt: skip
        for index, name in enumerate(names):
            for row in (row for row in rows if row["series"] == name and float(row[x]) == value):
                height -= 1
                places.append(height)
                labels.append(name)
                _draw_row(axis, height, row, key, index)
        height -= 1.2
    if level is not None:
        axis.axvline(level, color="0.35", linewidth=1.4, linestyle="--", zorder=0)
    axis.set_yticks(places, labels)
    axis.set_ylim(height + 0.6, 0.7)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel(label, fontsize=FONT)
    tidy(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color="0.9", linewidth=0.8)
    return write_figure(figure, path, [dict(row) for row in rows])


def _draw_row(axis: Any, height: float, row: Mapping[str, Any], key: str, index: int) -> None:
    axis.errorbar(
        [float(row[key])], [height], xerr=_errors([row], key), fmt=MARKERS[index], color=COLOURS[index],
        markersize=7, elinewidth=2.0,
    )  # fmt: skip
    axis.text(1.02, height, f"{float(row[key]):.2f}", transform=axis.get_yaxis_transform(), va="center",
              fontsize=FONT - 1)  # fmt: skip


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
    figure = new_figure(WIDTH, 0.34 * sum(heights) + 0.5 * len(panels) + 1.2)
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
    groups, worst, k = point.rates.groups, point.rates.worst_group, point.majority
    if of == "majority":
        across = groups.mean[k], groups.low[k], groups.high[k]
    else:
        average = getattr(point.rates, of.replace(" ", "_"))
        across = average.mean, average.low, average.high
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
        markersize=5, elinewidth=0.8, label=label,
    )  # fmt: skip


def _draw_mark(axis: Any, place: dict[str, float], index: int, label: str) -> None:
    marker = _NAMED_MARKERS[index % len(_NAMED_MARKERS)]
    axis.errorbar(
        [place["x"]], [place["y"]], xerr=_errors([place], "x"), yerr=_errors([place], "y"),
        color=_NAMED[index % len(_NAMED)], linestyle="none", marker=marker,
        markersize=16 if marker == "*" else 9, markeredgecolor="white", elinewidth=1.8, capsize=3,
        label=label, zorder=3,
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
