"""Names and texts that try to act where they are shown, and what a reader of the output looks at."""

import re

from markdown_it import MarkdownIt

#: ids of users, as people have them and as nobody would wish
USER_IDS = [
    *("ann", "007", "7", "1e5", "1.0", "-3", "+4", "0x1F", "1_000", "inf", "-inf", "true", "False"),
    *("null", "None", "NaN", "nan", "NA", "N/A", "n/a", "<NA>", "#N/A", "", "NULL", "-nan"),
    *(" x ", "\tx", "x\n", "a,b", 'a"b', "'a", "''a", "a\rb", "a\r\nb", "a\nb", '"a"', "a;b", "\r"),
    *("=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "=1", "＝1+1", "\n=1"),
    *("für", "用户", "👩‍👩‍👧", "\u202egnp", "\x1b[31mred", "a\x00b", "\ufeffx", "a\u2028b", "x" * 999),
]

#: one for every place that reads a text
NAMES = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a|b||c",
    "[click](javascript:alert(1)) ![x](http://e.org/x.png) <http://e.org> http://e.org www.e.org a@e.org",
    "[/] [bold red]x[/bold red] :bomb:",
    "$\\frac$ $x_1$ \\$",
    "_hidden",
    "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\u200b",
    "# head\n- item\n1. one\n```\n> quote",
    "- item",
    "1. one",
    "=cmd|' /C calc'!A0",
    "*b* _i_ `c` ~~s~~ &lt; &#60; \\",
    "x" * 3000,
]


def words(rich_output):
    """What is on a terminal less rich's own colours: nothing that a terminal acts on is left."""
    text = re.sub("\x1b\\[[0-9;]*m", "", rich_output)
    acts = sorted(
        {c for c in text if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c in "\u202e\u200b"}
    )
    assert acts == []
    return text


def rendered(report):
    """The tokens of Markdown that has no HTML, no link or image but our own, and rows of equal cells."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(report)
    every = [inner for token in tokens for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in every}
    assert not kinds & {"html_block", "html_inline", "em_open", "s_open", "blockquote_open"}
    links = [token.attrs["href"] for token in every if token.type == "link_open"]
    images = [token.attrs["src"] for token in every if token.type == "image"]
    assert all(re.fullmatch(r"figures/\w+\.(csv|png)", place) for place in (*links, *images))
    lines, count = report.splitlines(), 0
    for token in tokens:
        if token.type == "table_open":  # parsers drop cells that a row has too many, so that bars are counted
            table = lines[slice(*token.map)]
            assert len({re.sub(r"\\.", "", line).count("|") for line in table}) == 1, table
            count += len(table) - 1
    # a line of a table that became text of a paragraph has lost its cells
    for token in tokens:
        if token.type == "fence":
            lines[slice(*token.map)] = [""] * (token.map[1] - token.map[0])
    rows = [line for line in lines if line.startswith("|") and not re.fullmatch(r"[|:-]+", line)]
    assert count == len(rows)
    return tokens
