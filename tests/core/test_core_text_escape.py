"""A text that is shown does nothing: on a terminal, in Markdown, in a plot, in a spreadsheet."""

import html
import io
import re

import pytest
from hostile import NAMES, rendered, words
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from torchrl_maxmin.core.progress import PlainConsole, drawn_bars
from torchrl_maxmin.core.tables import markdown_table
from torchrl_maxmin.core.text_escape import (
    cell,
    code,
    fenced,
    markdown,
    plot,
    terminal,
    terminal_lines,
    uncell,
)

MARKS = "\\`*_[]{}()<>|~$#!&;:/.@-+=1 \t\n\r\x1b\x07\x9b\u202e\u200bwabhtps'\""
TEXTS = st.text(max_size=40) | st.text(MARKS, max_size=40) | st.sampled_from(NAMES)
TEXTS |= st.text("[](!:) 01-.x", max_size=20)


def shown(tokens):
    """The words of the first paragraph, as a reader sees them."""
    inline = next(token for token in tokens if token.type == "inline")
    return "".join("\n" if part.type == "softbreak" else part.content for part in inline.children)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_markdown_shows_the_text_and_nothing_acts(text):
    line = markdown(text, most=10_000)
    seen = terminal(text, most=10_000)
    for page in (f"a {line} z", line, f"- {line}", f"### {line}"):
        tokens = rendered(page)
        assert {token.type for token in tokens} <= {
            "paragraph_open", "paragraph_close", "inline", "heading_open", "heading_close",
            "bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close",
        }  # fmt: skip
    assert shown(rendered(f"a {line} z")) == f"a {seen} z"
    table = rendered(markdown_table(["h", line], [[line, "x"], ["y", line]]))
    cells = [token.content for token in table if token.type == "inline"]
    assert len(cells) == 6
    assert [token.type for token in table].count("table_open") == 1


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_code_and_blocks_hold_the_text_whole(text):
    span, block = code(text, most=10_000), fenced(text)
    (inline,) = [token for token in rendered(f"a {span} z") if token.type == "inline"]
    spans = [part.content for part in inline.children if part.type == "code_inline"]
    assert spans == [terminal(text, most=10_000) or " "]
    tokens = rendered(f"a\n\n{block}\n\nz")
    (found,) = [token.content for token in tokens if token.type == "fence"]
    assert found == terminal_lines(text) + "\n"


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_a_terminal_gets_one_line_and_no_sequence(text):
    line = terminal(text)
    assert words(line) == line
    assert "\n" not in line
    assert len(line) <= 10 * 126  # what is hidden is up to ten characters
    assert words(terminal_lines(text)).count("\n") == text.count("\n")


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_a_console_prints_strings_as_they_are(text):
    console = PlainConsole(file=io.StringIO(), width=100_000, force_terminal=True)
    table = Table(text, title=text)
    table.add_row(text)
    for what in (text, table):
        console.print(what)
    out = words(console.file.getvalue())
    for line in terminal_lines(text).split("\n"):
        assert out.count(line.strip()) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_a_bar_shows_a_name(name):
    with drawn_bars(silent=True) as progress:
        progress.live.console = PlainConsole(file=io.StringIO(), width=400, force_terminal=True)
        progress.add_task(name, total=1, note=name)
        table = progress.make_tasks_table(progress.tasks)
    console = PlainConsole(file=io.StringIO(), width=400, force_terminal=True)
    console.print(table)
    assert words(console.file.getvalue()).count(terminal(name, most=60)) == 2


@settings(deadline=None)
@given(st.text(max_size=20) | st.text("=+-@\t\r\n'1.e ＝", max_size=8))
def test_a_cell_is_no_formula_and_comes_back(text):
    made = cell(text)
    assert uncell(made) == text
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", made)
    assert number or not made.startswith(tuple("=+-@\t\r\n＝＋－＠"))
    assert len(made) - len(text) in (0, 1)


@settings(deadline=None)
@given(st.text(max_size=30) | st.text("$\\_^{}a", max_size=12))
def test_a_label_of_a_plot_has_no_formula(text):
    from matplotlib.cbook import is_math_text

    label = plot(text, most=1000)
    assert not is_math_text(label)
    assert not label.startswith("_")
    assert label.replace(r"\$", "$").strip() == terminal(text, most=1000).strip()


def test_long_names_are_cut_in_the_middle():
    assert terminal("a" * 500 + "b" * 500, most=10) == "aaaaa ... bbbbb"
    assert len(plot("x" * 5000)) < 50
    assert len(html.unescape(markdown("<" * 5000))) < 200
