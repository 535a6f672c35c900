"""Charts as inline SVG that keeps its letters' size at any width: places are shares of the width, in percent.

Nothing is told by colour alone: each mark has a shape of its own, each curve a dash, and both have their
names and numbers in words beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrl_maxmin.pages.document import Cell, templates

__all__ = ["Curve", "Mark", "Strip", "curve_panel", "strip_chart"]

#: As many shapes, dashes and colours as there are; further ones begin again.
NUM_STYLES = 6
_HEIGHT = 100.0  # of a panel's own units
_APART = 13.0  # least distance of two labels in them


@dataclass(frozen=True)
class Mark:
    """A number with its interval on a strip.

    Attributes:
        mean: The number; None draws nothing.
        low: Lower end, or None.
        high: Upper end, or None.
        seeds: The number of every seed.
        style: Which of the shapes and colours.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    style: int = 0


@dataclass(frozen=True)
class Strip:
    """A line of a chart: a name, a mark and the number in words.

    Attributes:
        label: Name.
        note: What is said of it in small letters.
        mark: Where it stands; None makes the line a heading.
        cell: The number in words.
    """

    label: str
    note: str = ""
    mark: Mark | None = None
    cell: Cell | None = None


def strip_chart(
    label: str,
    strips: Sequence[Strip],
    *,
    limits: tuple[float, float] | None = None,
    line: float = 0.0,
    at_line: str = "",
) -> Any:
    """Draw numbers with intervals, one below the other.

    Args:
        label: What is drawn, for those who hear it.
        strips: From top to bottom.
        limits: Ends of the scale; what is drawn decides where there are none.
        line: Where a reference line stands.
        at_line: What the line means.

    Returns:
        Markup.

    Example:
        >>> chart = strip_chart("change", [Strip("a", mark=Mark(0.2, 0.1, 0.3), cell=Cell("+0.2"))])
        >>> chart.count("<svg"), "<text" in chart
        (3, True)
    """
    numbers = [line]
    for strip in strips:
        if strip.mark is not None:
            given = (strip.mark.mean, strip.mark.low, strip.mark.high, *strip.mark.seeds)
            numbers += [number for number in given if number is not None]
    low, high = limits or _padded(min(numbers), max(numbers))

    def place(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    shown = [(value, place(value)) for value in nice_ticks(low, high)]
    template = templates().get_template("strips.html")
    return _markup(template, label=label, strips=strips, place=place, ticks=shown, line=line, at_line=at_line)


@dataclass(frozen=True)
class Curve:
    """A number over training.

    Attributes:
        label: Name, at its end.
        runs: One list of numbers a seed; None where there is none.
        style: Which of the dashes and colours.
    """

    label: str
    runs: Sequence[Sequence[float | None]]
    style: int = 0


def curve_panel(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str,
    limits: tuple[float, float],
    levels: Sequence[tuple[str, float]] = (),
    empty: str = "",
) -> Any:
    """Draw curves over the iterations of training: seeds thin, their mean thick, names at the ends.

    Args:
        title: What the panel is of.
        curves: What is drawn.
        unit: Of the vertical scale.
        limits: Its ends; panels side by side share them.
        levels: Names and heights of horizontal lines.
        empty: What is said where there is no curve.

    Returns:
        Markup.

    Example:
        >>> panel = curve_panel("maxmin", [Curve("a", [[0.0, 0.5]])], unit="weight", limits=(0, 1))
        >>> "M0.00,100.00 L100.00,50.00" in panel
        True
    """
    low, high = limits
    longest = max((len(run) for curve in curves for run in curve.runs), default=1)

    def height(value: float) -> float:
        return _HEIGHT * (high - min(max(value, low), high)) / (high - low)

    def path(run: Sequence[float | None]) -> str:
        points = [
            f"{100 * i / max(longest - 1, 1):.2f},{height(value):.2f}"
            for i, value in enumerate(run)
            if value is not None and math.isfinite(value)
        ]
        return "M" + " L".join(points) if points else ""

    drawn: list[dict[str, Any]] = []
    for curve in curves:
        mean = _mean_of(curve.runs)
        seeds = [path(run) for run in curve.runs] if len(curve.runs) > 1 else []
        last = next((value for value in reversed(mean) if value is not None), None)
        drawn.append({"curve": curve, "mean": path(mean), "seeds": seeds, "last": last})
    ends = _apart([(_HEIGHT if d["last"] is None else height(d["last"])) for d in drawn])
    ticks = [(value, height(value)) for value in nice_ticks(low, high, 4)]
    lines = [(name, height(value)) for name, value in levels if low <= value <= high]
    template = templates().get_template("curves.html")
    entries = list(zip(drawn, ends, strict=True))
    shown = {"ticks": ticks, "levels": lines, "count": longest, "empty": empty}
    return _markup(template, title=title, drawn=entries, unit=unit, **shown)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two ends, at most so many.

    Example:
        >>> nice_ticks(-0.3, 0.7)
        [-0.2, 0.0, 0.2, 0.4, 0.6]
    """
    size = (high - low) / most
    power = 10 ** math.floor(math.log10(size))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= size * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _mean_of(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average over seeds as far as all of them go."""
    columns = zip(*runs, strict=False)
    return [None if None in column else sum(column) / len(column) for column in map(list, columns)]  # type: ignore[arg-type]


def _apart(heights: Sequence[float]) -> list[float]:
    """Move labels apart that would cover one another, their order kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    found, least = list(heights), 0.0
    for i in order:
        found[i] = least = max(found[i], least)
        least += _APART
    most = _HEIGHT
    for i in reversed(order):
        found[i] = most = min(found[i], most)
        most -= _APART
    return found


def _markup(template: Any, **given: Any) -> Any:
    from markupsafe import Markup

    return Markup(template.render(num_styles=NUM_STYLES, **given))
