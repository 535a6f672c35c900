"""Names and texts of others, made safe for where they are shown: one function a place.

Whoever names a policy, a group, a user, a column or a file, or writes a prompt or a response, may put markup,
formulas or control characters there. None of it acts: :func:`terminal`, :func:`markdown`, :func:`plot` and
:func:`cell` are called where a text is shown, and nowhere before, so that files of data hold it as it is.
"""

from __future__ import annotations

import html
import re

__all__ = ["cell", "code", "fenced", "markdown", "plot", "terminal", "terminal_lines", "uncell"]

# Control characters, those that turn the direction of what follows around or take no room, halves of pairs
# of UTF-16. Joiners (U+200C, U+200D) belong to words of several alphabets, and stay.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
# An interval after a word, such as [0.1, 0.2], is no link where no address follows, and stays legible.
_INTERVAL = r"(?<=\S )\[[-+.,% \d]*\d[-+.,% \d]*\](?![(\[])"
_MARKUP = re.compile(rf"({_INTERVAL})|([\\`*_\[\]{{}}|~$#!])")
_LIST_MARK = re.compile(r"^(?:(\d{1,9})(?=[.)](?:\s|$))|(?=[-+](?:\s|$)|-[- ]|=))")
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_QUOTE = "'"


def terminal(text: object, most: int = 120) -> str:
    r"""Make one line of a text for a terminal: what is hidden is written out, white space is one space.

    Args:
        text: what is shown.
        most: characters that are shown, the middle of longer texts left out.

    Returns:
        Plain text; for rich it goes into a ``rich.text.Text``, which reads no markup.

    Example:
        >>> terminal("red \x1b[31m\n name")
        'red \\x1b[31m name'
    """
    return _visible(_one_line(str(text), most))


def terminal_lines(text: str) -> str:
    r"""Write out what is hidden in a message of several lines, whole.

    Example:
        >>> terminal_lines("a\x1b[2J\nb")
        'a\\x1b[2J\nb'
    """
    return "\n".join(_visible(line.replace("\t", "    ")) for line in text.split("\n"))


def markdown(text: object, most: int = 160) -> str:
    r"""Make one line or cell of Markdown that shows a text: nothing in it is markup, HTML or a link.

    Args:
        text: what somebody wrote.
        most: characters that are shown, the middle of longer texts left out.

    Example:
        >>> markdown("a|b <b>*c*</b>\n# d")
        'a\\|b &lt;b&gt;\\*c\\*&lt;/b&gt; \\# d'
        >>> markdown("abcdefgh", most=5), markdown("is [0.1, 0.2] [1](2)")
        ('ab ... gh', 'is [0.1, 0.2] \\[1\\](2)')
    """
    line = _MARKUP.sub(lambda mark: mark[1] or "\\" + mark[2], terminal(text, most))
    line = html.escape(_LIST_MARK.sub(r"\1\\", line), quote=False)
    return line.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")


def code(text: object, most: int = 80) -> str:
    r"""Make a code span of Markdown, for a paragraph.

    Example:
        >>> code("sft_std"), code("a`b")
        ('`sft_std`', '`` a`b ``')
    """
    line = terminal(text, most)
    if "`" not in line:
        return f"`{line or ' '}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", line))))
    return f"{fence} {line} {fence}"


def fenced(text: str) -> str:
    r"""Make a code block of Markdown that holds a text of several lines, whatever is in it.

    Example:
        >>> print(fenced("K  nats"))
        ```
        K  nats
        ```
    """
    runs = re.findall("`{3,}", text)
    fence = "`" * max((len(run) + 1 for run in runs), default=3)
    return f"{fence}\n{terminal_lines(text)}\n{fence}"


def plot(text: object, most: int = 40) -> str:
    r"""Make a label for Matplotlib: no dollar starts a formula, no underscore hides it from the legend.

    Args:
        text: what is shown.
        most: characters that are shown, the middle of longer texts left out.

    Example:
        >>> plot("$\\frac$"), plot("_hidden")
        ('\\$\\frac\\$', ' _hidden')
    """
    label = terminal(text, most).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def cell(text: str) -> str:
    """Make a cell of CSV that no spreadsheet computes: an apostrophe goes before what it might.

    Texts that begin with ``=``, ``+``, ``-``, ``@``, tab or a line's end get it, but for plain numbers; and
    those that begin with an apostrophe, so that :func:`uncell` gives back every text as it was.

    Example:
        >>> cell("=1+1"), cell("-1.5"), cell("'quoted'"), cell("ann")
        ("'=1+1", '-1.5', "''quoted'", 'ann')
    """
    formula = text.startswith(_FORMULA) and not _NUMBER.fullmatch(text)
    return _QUOTE + text if formula or text.startswith(_QUOTE) else text


def uncell(text: str) -> str:
    """Return what :func:`cell` was given: one apostrophe at the start goes.

    Example:
        >>> uncell("'=1+1"), uncell("ann")
        ('=1+1', 'ann')
    """
    return text.removeprefix(_QUOTE)


def _one_line(text: str, most: int) -> str:
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    half = most // 2
    return f"{line[:half].rstrip()} ... {line[len(line) - half :].lstrip()}"


def _visible(text: str) -> str:
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
