"""Tables as CSV files and as Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.text_escape import cell, uncell

__all__ = ["markdown_table", "read_csv", "write_csv", "write_paragraphs"]

_EXACT = "_json"


def write_csv(
    path: str | Path, rows: Sequence[Mapping[str, Any]], spec: str = "", exact: Sequence[str] = ()
) -> Path:
    """Write rows as CSV, a column for every key in order of first appearance; returns the path.

    A text that a spreadsheet would compute gets an apostrophe before it, see
    :func:`~torchrl_maxmin.core.text_escape.cell`; :func:`read_csv` takes it off.

    Args:
        path: Where to write.
        rows: One mapping a line; None and keys that a row lacks become empty cells.
        spec: Format of floats, such as ``.6g``; in full if empty.
        exact: Columns of texts that any reader must give back as they are, such as ids of users. Each gets
            another, ``<name>_json``, with the text as a JSON string in ASCII: between its quotes ``null`` is
            no missing value and ``007`` no number, as they are to pandas.
    """
    if exact:
        rows = [row | {name + _EXACT: json.dumps(row[name]) for name in exact} for row in map(dict, rows)]
    columns = dict.fromkeys(key for row in rows for key in row)
    line = csv.writer(_Echo()).writerow
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        for texts in (map(cell, columns), *([_text(row.get(key), spec) for key in columns] for row in rows)):
            # lines end in both marks while they are made, so that a cell with one of them is quoted
            file.write(line(texts).removesuffix("\r\n") + "\n")
    return Path(path)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Read the texts of a table that :func:`write_csv` wrote, as they were.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_csv(write_csv(folder + "/a.csv", [{"user": "=null", "share": 0.5}], exact=["user"]))
        [{'user': '=null', 'share': '0.5'}]
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{uncell(key): uncell(text) for key, text in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        for name in [name for name in row if name + _EXACT in row]:
            row[name] = json.loads(row.pop(name + _EXACT))
    return rows


class _Echo:
    """A file that returns what is written to it."""

    def write(self, line: str) -> str:
        return line


def _text(value: Any, spec: str) -> str:
    if isinstance(value, float):
        return format(value, spec)
    return cell(value) if isinstance(value, str) else "" if value is None else str(value)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "|---:") -> str:
    """Make a Markdown table; ``rule`` aligns all columns but the first.

    Example:
        >>> print(markdown_table(["policy", "rate"], [["maxmin", "0.8"]]))
        | policy | rate |
        |---|---:|
        | maxmin | 0.8 |
    """
    lines = ["| " + " | ".join(header) + " |", "|---" + rule * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_paragraphs(path: Path, parts: Sequence[str]) -> Path:
    """Write paragraphs of Markdown, the folder made if missing; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
