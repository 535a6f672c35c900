"""Pages in a real browser: the check of ``benchmarks/pages.py`` finds nothing, and finds what is wrong."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hostile import NAMES

from torchrl_maxmin.pages import (
    Answer,
    Answers,
    Cell,
    Code,
    Curve,
    Items,
    Line,
    Mark,
    Page,
    Picture,
    Prompt,
    Section,
    Strip,
    Table,
    Term,
    Text,
    Verdict,
    curve_panel,
    strip_chart,
    write_page,
)

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("AXE", ROOT / "node_modules/axe-core/axe.min.js"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("playwright", reason="pip install playwright")
    spec = importlib.util.spec_from_file_location("pages_in_a_browser", ROOT / "benchmarks/pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if module.find_chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return module


def look_at(script, path):
    axe = AXE if AXE.is_file() else None  # npm install axe-core, or its path in AXE
    found = script.look_at([path], None, axe, script.find_chromium())
    assert len(found) == 4
    return found


def test_a_page_of_every_block_with_hostile_texts(script, tmp_path):
    verdict = Verdict(
        NAMES[0], [Line(kind, name) for kind, name in zip(("gain", "lose"), NAMES, strict=False)]
    )
    marks = [
        Strip(name, name, Mark(0.1 * k, -0.1, 0.9, [0.2], k), Cell(f"0.{k}")) for k, name in enumerate(NAMES)
    ]
    curves = [Curve(name, [[0.1 * k, 0.5]], k) for k, name in enumerate(NAMES[:4])]
    panel = curve_panel(NAMES[2], curves, unit=NAMES[3], limits=(0.0, 1.0), levels=[(NAMES[0], 0.5)])
    answers = [Answer(name, name, [(name, Cell("0.5"))]) for name in NAMES[:4]]
    blocks = [
        Text(NAMES[0], important=True),
        Items(NAMES),
        Code("\n".join(NAMES), NAMES[0]),
        Table(NAMES[1], [Term("KL", "kl"), *NAMES], [[name, *map(Cell, NAMES)] for name in NAMES]),
        Picture([strip_chart(NAMES[0], marks, at_line=NAMES[0]), panel], NAMES[6]),
        Answers(NAMES[0], [Prompt(NAMES[0], answers), Prompt("", answers)]),
    ]
    page = Page(NAMES[0], verdict, NAMES, [Section("all", NAMES[0], NAMES[6], blocks, ("kl",))])
    assert not any(look_at(script, write_page(tmp_path / "report.html", page)).values())


@pytest.mark.parametrize("demo", ["demo-10-1", "demo-80-20"])
def test_the_pages_of_the_demos(script, demo):
    assert not any(look_at(script, ROOT / "reproductions" / demo / "report.html").values())


def test_what_is_wrong_is_found(script, tmp_path):
    path = tmp_path / "wrong.html"
    path.write_text(
        "<!doctype html><html lang=en><title>t</title><p style='width:3000px'>wide</p>"
        "<img alt='' src='missing.png'><script>alert(1)</script>"
    )
    for found in look_at(script, path).values():
        text = " ".join(found)
        for what in ("sideways", "elements script", "elements img", "request: file", "dialog: 1"):
            assert what in text
