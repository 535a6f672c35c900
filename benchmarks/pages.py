"""Look at pages in Chromium: no request, no error, no sideways scroll, nothing serious that axe-core finds.

    python benchmarks/pages.py PAGE.html ... --output_dir shots [--axe axe.min.js]

Needs Chromium (``apt-get install chromium``), ``pip install playwright`` and ``npm install axe-core``. Every
page is opened at 1280 and 390 pixels, light and dark; pictures of it and an A4 print are written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

SIZES = {"wide": 1280, "phone": 390}
SCHEMES = ("light", "dark")
#: Impacts that axe-core gives to what keeps somebody from reading.
SERIOUS = ("serious", "critical")


def find_chromium() -> str | None:
    """Path of a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def look_at(pages: list[Path], shots: Path | None, axe: Path | None, chromium: str) -> dict[str, list[str]]:
    """Open every page in every way; returns what is wrong, by page and way."""
    from playwright.sync_api import sync_playwright

    wrong: dict[str, list[str]] = {}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for page in pages:
            for size, width in SIZES.items():
                for scheme in SCHEMES:
                    context = browser.new_context(
                        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
                    )
                    key = f"{page.parent.name}-{page.stem}-{size}-{scheme}"
                    wrong[key] = _one(context.new_page(), page, shots and shots / key, axe)
                    context.close()
        browser.close()
    return wrong


def _one(tab: Any, page: Path, shot: Path | None, axe: Path | None) -> list[str]:
    found: list[str] = []
    own = page.resolve().as_uri()
    tab.on("console", lambda message: found.append(f"console {message.type}: {message.text}"))
    tab.on("pageerror", lambda error: found.append(f"error: {error}"))
    tab.on("dialog", lambda dialog: (found.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    tab.on(
        "request",
        lambda request: None if request.url in (own, "data:,") else found.append(f"request: {request.url}"),
    )
    tab.goto(own)
    tab.wait_for_load_state("networkidle")
    sideways = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if sideways > 0:
        found.append(f"scrolls sideways by {sideways} pixels")
    for what in ("script", "iframe", "img", "object", "form"):
        if count := tab.locator(what).count():
            found.append(f"{count} elements {what}")
    if shot is not None:
        shot.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=f"{shot}.png", full_page=True)
        if "wide-light" in shot.name:
            tab.pdf(path=f"{shot}.pdf", prefer_css_page_size=True)
    if axe is not None:
        tab.evaluate(axe.read_text())
        faults = tab.evaluate("axe.run().then(found => found.violations)")
        for fault in faults:
            where = ", ".join(" ".join(map(str, node["target"])) for node in fault["nodes"][:3])
            line = f"axe {fault['impact']}: {fault['help']} ({where})"
            if fault["impact"] in SERIOUS:
                found.append(line)
            else:
                print(f"{shot and shot.name}: {line}", file=sys.stderr)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--output_dir", type=Path, help="where pictures go; none without it")
    parser.add_argument("--axe", type=Path, default=Path("node_modules/axe-core/axe.min.js"))
    given = parser.parse_args(arguments)
    chromium = find_chromium()
    if chromium is None:
        print("no Chromium here: apt-get install chromium", file=sys.stderr)
        return 2
    axe = given.axe if given.axe.is_file() else None
    if axe is None:
        print(f"no {given.axe}: looked at without axe-core", file=sys.stderr)
    wrong = look_at(given.pages, given.output_dir, axe, chromium)
    print(json.dumps(wrong, indent=2))
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
