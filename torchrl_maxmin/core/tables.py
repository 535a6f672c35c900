"""Tables as CSV files and as Markdown."""

from __future__ import annotations

import csv
import html
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["markdown_table", "markdown_text", "write_csv", "write_paragraphs"]


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], spec: str = "") -> Path:
    """Write rows as CSV, a column for every key in order of first appearance; returns the path.

    Args:
        path: Where to write.
        rows: One mapping a line; None and keys that a row lacks become empty cells.
        spec: Format of floats, such as ``.6g``; in full if empty.
    """
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: format(v, spec) if isinstance(v, float) else v for k, v in row.items()})
    return Path(path)


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


def markdown_text(text: str, most: int = 160) -> str:
    """Make any text safe to show in a line or cell of Markdown: nothing in it is markup, HTML or a link.

    Args:
        text: What somebody wrote.
        most: Characters that are shown, the middle of longer texts left out.

    Example:
        >>> markdown_text("a|b <b>*c*</b>\\n# d")
        'a\\\\|b &lt;b&gt;\\\\*c\\\\*&lt;/b&gt; \\\\# d'
        >>> markdown_text("abcdefgh", most=5)
        'ab ... gh'
    """
    # Control characters, halves of pairs of UTF-16; and those that turn the direction of what follows around.
    kept = (" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text if c not in _BIDI)
    text = " ".join("".join(kept).split())
    if len(text) > most:
        text = f"{text[: most // 2].rstrip()} ... {text[len(text) - most // 2 :].lstrip()}"
    text = re.sub(r"([\\\\`*_\[\]{}|~$#!])", r"\\\1", text)
    text = html.escape(text, quote=False)
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


_BIDI = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def write_paragraphs(path: Path, parts: Sequence[str]) -> Path:
    """Write paragraphs of Markdown, the folder made if missing; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
