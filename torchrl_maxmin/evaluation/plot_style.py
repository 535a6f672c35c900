"""The one style of all figures: colours, marks, sizes, and how a figure is written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

__all__ = ["COLOURS", "DASHES", "FONT", "MARKERS", "add_legend", "new_figure", "tidy", "write_figure"]

# Okabe and Ito's colours, told apart by colour-blind readers; yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
FONT = 13


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, without global state; names the extra where Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need Matplotlib: pip install 'torchrl-maxmin[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """One legend above all panels, in as many columns as fit."""
    # A letter is about 0.11 inch wide at this size, handle and gap about 1 inch.
    columns = int(figure.get_size_inches()[0] / (1.0 + 0.11 * max(map(len, labels))))
    columns = min(max(columns, 1), len(labels))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=FONT)


def tidy(axis: Any) -> None:
    """Light horizontal grid behind the marks, no box."""
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
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [png, svg, table]
