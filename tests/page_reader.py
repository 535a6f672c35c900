"""Read a page as a browser's parser does, and hold it against ``summary.json``."""

import json
import re
from html.parser import HTMLParser

#: Elements that a page may have; none of them runs or fetches anything.
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "article",
    ),
    *("p", "h1", "h2", "h3", "ul", "li", "span", "small", "a", "div", "dl", "dt", "dd", "pre"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "line", "circle", "rect", "path", "text", "g"),
}
VOID = {"meta", "link"}
NUMBER = re.compile(r"(?<![\w.#/])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?%?(?![\w/])")


class Page(HTMLParser):
    """A page: its text, the numbers that name their source, and all elements with their attributes.

    Attributes:
        sources: (place in the summary, text) of every number that names one.
        elements: (tag, attributes).
        by_section: Text by the id of the section; the verdict's is under None.
        heading: Text of the first heading.
    """

    def __init__(self, text):
        super().__init__()
        self.sources, self.elements, self.by_section = [], [], {}
        self.stack, self.section, self.heading = [], None, ""
        self.feed(text)
        self.close()
        assert self.stack == [], "elements are not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.stack.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if "data-source" in attributes:
            self.sources.append([attributes["data-source"], ""])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while (
            self.stack
            and self.stack[-1][0] != tag
            and self.stack[-1][0] in ("line", "circle", "rect", "path")
        ):
            self.stack.pop()
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.stack]
        if "style" in tags or "title" in tags:
            return
        if "h1" in tags:
            self.heading += data
        if any("data-source" in attributes for _, attributes in self.stack):
            self.sources[-1][1] += data
        said = any(attributes.get("class") in ("said", "asked") for _, attributes in self.stack)
        if not said and "pre" not in tags:
            self.by_section[self.section] = self.by_section.get(self.section, "") + " " + data


def read_page(folder):
    """Read ``report.html`` of a folder, and see that nothing in it can run or fetch."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200b]", text)
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= TAGS
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")]
        if "href" in attributes:
            place = attributes["href"]
            assert place == "data:," if tag == "link" else place[0] == "#" and place[1:] in ids
        assert re.fullmatch(r"(top:[\d.]+%)?", attributes.get("style", ""))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    return page


def at(summary, source):
    """Find what a place of the page names."""
    for key in source.split("/"):
        if key.startswith("#"):
            summary = list(summary.values())[int(key[1:])]
        else:
            summary = summary[int(key) if isinstance(summary, list) else key]
    return summary


def is_rounding(shown, value):
    """Whether a shown number is a value, rounded to the digits that are shown."""
    text = shown.replace(",", "")
    scale = 0.01 if text.endswith("%") else 1.0
    text = text.rstrip("%")
    digits = len(text.partition("e")[0].partition(".")[2])
    power = int(text.partition("e")[2] or 0)
    return abs(float(text) * scale - value) <= scale * 10**power * (0.5 * 10**-digits + 1e-9)


def check_sources(page, summary):
    """See that every number with a source is the summary's; returns how many there are."""
    for source, text in page.sources:
        value = at(summary, source)
        numbers = NUMBER.findall(text)
        if isinstance(value, dict):
            expected = [value[end] for end in ("mean", "low", "high") if value[end] is not None]
        else:
            expected, numbers = ([] if value is None else [value]), numbers[:1]
        assert len(numbers) == len(expected), (source, text)
        for shown, number in zip(numbers, expected, strict=True):
            assert is_rounding(shown, number), (source, text, number)
    return len(page.sources)


def leaves(value):
    """All numbers of a summary, those in its texts too."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (*leaves(str(key)), *leaves(item))]
    if isinstance(value, list):
        return [len(value), *(leaf for item in value for leaf in leaves(item))]
    if isinstance(value, str):
        return [
            float(n.replace(",", "").rstrip("%")) / (100 if "%" in n else 1) for n in NUMBER.findall(value)
        ]
    return [] if value is None or isinstance(value, bool) else [float(value)]


def strange_numbers(page, summary, known=()):
    """Numbers in the text of a page that are no number of its summary, and not among the known ones."""
    there = leaves(json.loads(json.dumps(summary)))
    found = []
    for section, text in page.by_section.items():
        for shown in NUMBER.findall(text) if section != "words" else ():
            if shown not in known and not any(is_rounding(shown, value) for value in there):
                found.append((section, shown))
    return found
