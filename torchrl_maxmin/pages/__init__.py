"""One page a result: a file of HTML that asks for nothing, runs nothing, and says first what was found.

A page is plain data (:class:`Page`: a verdict, then sections of text, tables and charts), which the rooms
that have results put together and :func:`write_page` renders. :func:`model_card` is the README of a
policy's folder.
"""

from torchrl_maxmin.pages.card import add_results, model_card
from torchrl_maxmin.pages.charts import Curve, Mark, Strip, curve_panel, strip_chart
from torchrl_maxmin.pages.document import (
    KINDS,
    Answer,
    Answers,
    Cell,
    Code,
    Figures,
    Items,
    Line,
    Page,
    Picture,
    Prompt,
    Section,
    Table,
    Term,
    Text,
    Verdict,
    verdict_markdown,
    write_page,
)

__all__ = [
    "KINDS",
    "Answer",
    "Answers",
    "Cell",
    "Code",
    "Curve",
    "Figures",
    "Items",
    "Line",
    "Mark",
    "Page",
    "Picture",
    "Prompt",
    "Section",
    "Strip",
    "Table",
    "Term",
    "Text",
    "Verdict",
    "add_results",
    "curve_panel",
    "model_card",
    "strip_chart",
    "verdict_markdown",
    "write_page",
]
