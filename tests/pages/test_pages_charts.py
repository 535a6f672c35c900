"""Charts put marks where their numbers are, at any width, and tell nothing by colour alone."""

import doctest
import importlib
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.pages import Cell, Curve, Mark, Strip, curve_panel, strip_chart
from torchrl_maxmin.pages.charts import NUM_STYLES, _apart, nice_ticks
from torchrl_maxmin.pages.document import glossary, templates


@pytest.mark.parametrize("name", ["pages.document", "pages.charts", "pages.card", "stats.text"])
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"torchrl_maxmin.{name}")).failed == 0


def test_a_mark_stands_where_its_number_is():
    mark = Mark(0.25, 0.0, 0.5, seeds=[0.75])
    chart = strip_chart("rates", [Strip("a", mark=mark, cell=Cell("0.25"))], limits=(0.0, 1.0), line=0.5)
    assert '<svg x="25.00%"' in chart
    assert 'class="bar" x1="0.00%" x2="50.00%"' in chart
    assert 'class="seed" cx="75.00%"' in chart
    assert 'class="level" x1="50.00%"' in chart


def test_what_has_no_ends_has_no_bar_and_what_is_off_the_scale_stays_on_it():
    chart = strip_chart("rates", [Strip("a", mark=Mark(3.0), cell=Cell("3"))], limits=(0.0, 1.0))
    assert 'class="bar"' not in chart
    assert '<svg x="100.00%"' in chart


def test_every_style_has_a_shape_and_a_dash_of_its_own():
    marks = [Strip("a", mark=Mark(0.5, style=k), cell=Cell("0.5")) for k in range(NUM_STYLES)]
    shapes = re.findall(r'<(?:circle|rect|path) class="mark" ([^>]*)/>', strip_chart("x", marks))
    assert len(set(shapes)) == NUM_STYLES
    style = templates().loader.get_source(templates(), "style.css")[0]
    dashes = [re.search(rf"\.s{k} {{ --c: var\(--s{k}\); --d: ([^;]+);", style)[1] for k in range(NUM_STYLES)]
    assert len(set(dashes)) == NUM_STYLES


def test_names_in_charts_are_text():
    hostile = "<script>alert(1)</script>\x1b[31m"
    chart = strip_chart(
        hostile, [Strip(hostile, hostile, Mark(0.1), Cell(hostile, '"><b>'))], at_line=hostile
    )
    chart += curve_panel(
        hostile, [Curve(hostile, [[0.0, 1.0]])], unit=hostile, limits=(0, 1), levels=[(hostile, 0.5)]
    )
    assert "<script" not in chart
    assert "<b>" not in chart
    assert "\x1b" not in chart


def test_seeds_are_thin_their_mean_is_thick_and_gaps_are_left_out():
    runs = [[0.0, 0.5, None], [1.0, 0.5, 0.5]]
    panel = curve_panel("x", [Curve("a", runs)], unit="u", limits=(0.0, 1.0))
    assert panel.count('class="run"') == 2
    assert 'd="M0.00,50.00 L50.00,50.00"' in panel
    empty = curve_panel("x", [], unit="u", limits=(0.0, 1.0), empty="no weights")
    assert "no weights" in empty
    assert "<path" not in empty


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6), most=st.integers(2, 9))
def test_ticks_are_few_even_and_inside(low, size, most):
    high = low + size
    ticks = nice_ticks(low, high, most)
    assert 1 <= len(ticks) <= most + 1
    assert all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3, abs_tol=1e-8) for step in steps)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=7))
def test_labels_at_the_ends_do_not_cover_one_another(heights):
    found = _apart(heights)
    ordered = sorted(found)
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(ordered))
    assert max(found) <= 100
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    assert sorted(range(len(found)), key=lambda i: found[i]) == order


def test_every_word_of_the_glossary_is_said_plainly():
    for key, word in glossary().items():
        assert word["text"].endswith("."), key
        assert word["name"], key
    for key in ("nats", "convention", "biased_low", "heldout", "head_accuracy", "win_rate", "duality_gap"):
        assert key in glossary()
