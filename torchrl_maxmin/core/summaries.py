"""A small table with a heading and notes, for a console and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from torchrl_maxmin.core.text_escape import terminal

__all__ = ["Block", "block_html", "block_text"]

_CELL, _NOTE = 60, 240


@dataclass(frozen=True)
class Block:
    """What an object shows of itself.

    Attributes:
        title: what it is.
        place: where it is.
        header: columns; the first is of names, the others of numbers.
        rows: cells.
        notes: lines below.
    """

    title: str
    place: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def block_text(block: Block) -> str:
    r"""Format a block for a console; nothing in its texts acts there.

    Example:
        >>> print(block_text(Block("Groups", "runs/\x1bx", ["group", "share"], [["a", "90%"]], ["Two."])))
        Groups in runs/\x1bx
        group  share
        a        90%
        Two.
    """
    table = [[terminal(cell, _CELL) for cell in row] for row in (block.header, *block.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{terminal(block.title)} in {terminal(block.place, _NOTE)}"]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(terminal(note, _NOTE) for note in block.notes)])


def block_html(block: Block) -> str:
    """Format a block as HTML for a notebook; no text in it is markup, and it holds no script or style sheet.

    Example:
        >>> block_html(Block("<b>", "x", ["n"], [["&"]])).partition("<table>")[0]
        '<div><p><strong>&lt;b&gt;</strong> in <code>x</code></p>'
    """

    def inert(text: str, most: int) -> str:
        return html.escape(terminal(text, most))

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{inert(cell, _CELL)}</{tag}>" for cell in cells) + "</tr>"

    place = f"in <code>{inert(block.place, _NOTE)}</code>"
    heading = f"<p><strong>{inert(block.title, _NOTE)}</strong> {place}</p>"
    body = "".join(row(cells, "td") for cells in block.rows)
    table = f"<table><thead>{row(block.header, 'th')}</thead><tbody>{body}</tbody></table>"
    notes = "".join(f"<p>{inert(note, _NOTE)}</p>" for note in block.notes)
    return f"<div>{heading}{table}{notes}</div>"
