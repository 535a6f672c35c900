"""Let the pages link to files of the repository: those that a page names are copied beside the pages."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")
log = logging.getLogger("mkdocs.plugins.source_links")  # strict counts its warnings


def _target(page: str, link: str) -> str | None:
    """The repository's file that a link from a page leads to; None inside the pages."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(page), link))
    return None if path.startswith("docs/") else path


def _place(target: str) -> str:
    """Where the copy stands; Markdown is shown as it is, and is no page."""
    return f"source/{target}" + (".txt" if target.endswith(".md") else "")


def on_files(files: Any, config: Any) -> Any:
    """Add every file that a page links to."""
    targets = {
        (page.src_uri, target)
        for page in files.documentation_pages()
        if page.src_uri.endswith(".md")
        for link in _LINK.findall(Path(page.abs_src_path).read_text())
        if (target := _target(page.src_uri, link))
    }
    for page, target in sorted(targets):
        if not (ROOT / target).is_file():
            log.warning("%s links to %s, which is no file of the repository", page, target)
        elif files.get_file_from_path(_place(target)) is None:
            files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links to the copies."""

    def lead(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[1])
        if target is None:
            return match[0]
        return "](" + os.path.relpath(_place(target), os.path.dirname(page.file.src_uri) or ".")

    return _LINK.sub(lead, markdown)
