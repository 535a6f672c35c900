"""What groups want, as blocks of a page: features, items and pairs on which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchrl_maxmin.pages.document import Cell, Figures, Table, Text

__all__ = ["wants_blocks"]

_SHOWN = 8
_SHOWN_CHARACTERS = 300


def wants_blocks(
    figures: Figures, groups: Sequence[tuple[str, Mapping[str, Any]]], paths: Sequence[Sequence[str | int]]
) -> list[Table | Text]:
    """Make the tables of what each group wants beside the others.

    Args:
        figures: Of the summary.
        groups: Name of each group, and its ``features``, ``items`` and ``pairs``, as far as there are any.
        paths: Where these stand in the summary.
    """
    blocks: list[Table | Text] = []
    for (name, wants), path in zip(groups, paths, strict=True):
        made = [make(figures, name, wants, path) for make in (_features, _items, _pairs)]
        blocks += [block for block in made if block is not None]
    return blocks or [Text("Nothing was found that sets the groups apart.")]


def _features(
    figures: Figures, name: str, wants: Mapping[str, Any], path: Sequence[str | int]
) -> Table | None:
    rows = []
    for n, entry in enumerate((wants["features"] or [])[:_SHOWN]):
        at = (*path, "features", n)
        sure = {True: "yes", False: "no", None: "not known"}[entry["told_apart"]]
        numbers = [figures.number(".3f", *at, key) for key in ("weight", "others", "difference")]
        rows.append([entry["feature"], *numbers, sure])
    header = ["feature", "weight", "of the others", "difference", "told apart"]
    return (
        Table(f"{name}: features that it weighs otherwise, the surest first", header, rows) if rows else None
    )


def _items(figures: Figures, name: str, wants: Mapping[str, Any], path: Sequence[str | int]) -> Table | None:
    items = wants["items"] or []
    apart = sorted(range(len(items)), key=lambda n: -abs(items[n]["difference"]))[:_SHOWN]
    rows = [
        [
            items[n]["item"],
            *(figures.number(spec, *path, "items", n, key) for key, spec in _ITEM_NUMBERS.items()),
        ]
        for n in sorted(apart, key=lambda n: items[n]["rank"])
    ]
    header = ["item", "rank", "rank by the others", "higher by", "score"]
    return Table(f"{name}: items that the others rank most otherwise", header, rows) if rows else None


_ITEM_NUMBERS = {"rank": ".0f", "rank_by_others": ".0f", "difference": "+.0f", "score": ".3f"}


def _pairs(figures: Figures, name: str, wants: Mapping[str, Any], path: Sequence[str | int]) -> Table | None:
    rows: list[list[str | Cell]] = []
    for n, entry in enumerate(wants["pairs"] or []):
        asked = "" if entry["prompt"] is None else entry["prompt"]
        texts = [_short(entry[key]) for key in ("preferred", "other")]
        chances = [figures.number(".2f", *path, "pairs", n, key) for key in ("group", "others")]
        rows.append([_short(asked) or f"pair {n + 1}", *texts, *chances])
    header = ["prompt", "is preferred", "to", "this group", "the others"]
    label = f"{name}: pairs on which it differs most, by the fitted probability of the preference"
    return Table(label, header, rows, words=True) if rows else None


def _short(text: object) -> str:
    line = str(text)
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " ..."
