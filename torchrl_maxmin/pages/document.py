"""What a page is made of, and its rendering."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import yaml

from torchrl_maxmin.core.text_escape import terminal, terminal_lines
from torchrl_maxmin.stats.text import interval_text, number_text

__all__ = [
    "KINDS",
    "Answer",
    "Answers",
    "Cell",
    "Code",
    "Figures",
    "Items",
    "Line",
    "Page",
    "Picture",
    "Prompt",
    "Section",
    "Table",
    "Term",
    "Text",
    "Verdict",
    "verdict_markdown",
    "write_page",
]

#: Kinds of a verdict's lines: who gains, who loses, what is not decided, and what else must be known.
KINDS = ("gain", "lose", "unsure", "note")


@dataclass(frozen=True)
class Line:
    """A sentence of a verdict.

    Attributes:
        kind: ``gain``, ``lose``, ``unsure`` or ``note``.
        text: The sentence.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a line of a verdict is one of {', '.join(KINDS)}, not {self.kind!r}")


@dataclass(frozen=True)
class Verdict:
    """What a result says: one sentence, and the lines that carry it.

    Attributes:
        headline: The sentence.
        lines: What it rests on, with numbers and their intervals.
    """

    headline: str
    lines: Sequence[Line] = ()


def verdict_markdown(found: Verdict) -> str:
    """Write a verdict as Markdown; its names must be safe for that already.

    Example:
        >>> print(verdict_markdown(Verdict("A gains.", [Line("gain", "By 0.1.")])))
        **A gains.**
        <BLANKLINE>
        - By 0.1.
    """
    return "\n\n".join(
        [f"**{found.headline}**", "\n".join(f"- {line.text}" for line in found.lines)]
    ).rstrip()


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, and the place in ``summary.json`` that it comes from.

    Attributes:
        text: The number, and its interval where there is one.
        source: Names and places of the keys that lead there, joined by slashes; empty for a word.
    """

    text: str
    source: str = ""

    @property
    def number(self) -> str:
        """The number alone."""
        return self.text.partition(" [")[0]

    @property
    def ends(self) -> str:
        """The interval alone, in its brackets, or nothing."""
        return self.text[len(self.number) :].strip()


class Figures:
    """Numbers of a summary as cells.

    Args:
        summary: What stands in ``summary.json``.

    Example:
        >>> figures = Figures({"kl": 3.14159, "rate": {"mean": 0.5, "low": 0.4, "high": 0.6}})
        >>> figures.number(".2f", "kl"), figures.interval(".2f", "rate").ends
        (Cell(text='3.14', source='kl'), '[0.40, 0.60]')
    """

    def __init__(self, summary: Mapping[str, Any]):
        self.summary = summary

    def number(self, spec: str, *path: str | int) -> Cell:
        """Show a number; ``n/a`` for None."""
        value, source = self._at(path)
        return Cell(number_text(value, spec), source)

    def count(self, *path: str | int) -> Cell:
        """Show a count."""
        value, source = self._at(path)
        return Cell(f"{value:,}", source)

    def interval(self, spec: str, *path: str | int) -> Cell:
        """Show a number with its interval, as far as it is known."""
        value, source = self._at(path)
        return Cell("n/a", source) if value is None else Cell(interval_text(value, spec), source)

    def _at(self, path: Sequence[str | int]) -> tuple[Any, str]:
        value: Any = self.summary
        places = []
        for key in path:
            # a name that somebody else gave is counted, not written: any text may be in it
            plain = isinstance(key, int) or (key.replace("_", "").isalnum() and key.isascii())
            places.append(str(key) if plain else f"#{list(value).index(key)}")
            value = value[key]
        return value, "/".join(places)


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: Its words.
        important: Whether a reader must not miss it.
    """

    kind: ClassVar[str] = "text"
    text: str
    important: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines that stand as a program wrote them."""

    kind: ClassVar[str] = "code"
    text: str
    label: str


@dataclass(frozen=True)
class Term:
    """A heading that the glossary explains.

    Attributes:
        text: The heading.
        term: The glossary's key.
    """

    text: str
    term: str


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        label: What it shows.
        header: Headings, the first column's too.
        rows: Of texts and cells.
        words: Whether its cells are words, which stand at the left.
    """

    kind: ClassVar[str] = "table"
    label: str
    header: Sequence[str | Term]
    rows: Sequence[Sequence[str | Cell]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A chart.

    Attributes:
        charts: Markup that :mod:`~torchrl_maxmin.pages.charts` made, side by side where there is room.
        caption: What is seen, and how to read it.
    """

    kind: ClassVar[str] = "picture"
    charts: Sequence[Any]
    caption: str


@dataclass(frozen=True)
class Answer:
    """One policy's response, with what each group says of it."""

    policy: str
    text: str
    scores: Sequence[tuple[str, Cell]]


@dataclass(frozen=True)
class Prompt:
    """A prompt and the responses to it, side by side."""

    text: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Answers:
    """Prompts with responses, chosen in one way."""

    kind: ClassVar[str] = "answers"
    label: str
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: Its anchor.
        title: Heading.
        meaning: One sentence that says what the section is about.
        blocks: Texts, tables and charts.
        terms: Words of the glossary that a reader may miss.
    """

    key: str
    title: str
    meaning: str
    blocks: Sequence[Text | Items | Code | Table | Picture | Answers]
    terms: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        kicker: What kind of result this is, in a few words.
        verdict: What was found.
        facts: Short facts, such as how many prompts, under the verdict.
        sections: The rest.
    """

    kicker: str
    verdict: Verdict
    facts: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)

    @property
    def terms(self) -> list[str]:
        """Keys of the glossary that the page needs."""
        found = {term for section in self.sections for term in section.terms}
        tables = (block for section in self.sections for block in section.blocks if isinstance(block, Table))
        return sorted(
            found | {head.term for table in tables for head in table.header if isinstance(head, Term)}
        )


@functools.cache
def glossary() -> dict[str, dict[str, str]]:
    """Words that pages explain: by key ``name`` and ``text``."""
    return yaml.safe_load((files("torchrl_maxmin.pages") / "glossary.yaml").read_text(encoding="utf-8"))


@functools.cache
def templates() -> Any:
    """Make the environment of the templates: all that is put into HTML is escaped, hidden characters too."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("torchrl_maxmin.pages", "templates")
    found = Environment(
        loader=loader,
        autoescape=lambda name: name is None or name.endswith((".html", ".svg")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else terminal(value, 4000),
    )
    found.filters["raw"] = Markup  # of Markdown, whose names were made safe before
    found.filters["verbatim"] = lambda text: Markup("{}").format(terminal_lines(text))
    return found


def render(page: Page) -> str:
    """Render a page as one file of HTML."""
    from markupsafe import Markup

    words = [(key, glossary()[key]) for key in page.terms]
    style = Markup((files("torchrl_maxmin.pages") / "templates" / "style.css").read_text(encoding="utf-8"))
    return (
        templates().get_template("page.html").render(page=page, words=words, glossary=glossary(), style=style)
    )


def write_page(path: str | Path, page: Page) -> Path:
    """Write a page, whole or not at all; returns its path.

    Args:
        path: The file; its folder is made if missing.
        page: What to write.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Page("Demo", Verdict("<b>A</b> gains"))
        ...     text = write_page(folder + "/report.html", page).read_text()
        >>> "&lt;b&gt;A&lt;/b&gt; gains" in text, "<script" in text
        (True, False)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(render(page), encoding="utf-8")
    os.replace(partial, path)
    return path
