"""The model card of a policy's folder: ``README.md`` with the metadata of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from torchrl_maxmin.core.manifest import CARD
from torchrl_maxmin.core.text_escape import markdown
from torchrl_maxmin.pages.document import Verdict, templates, verdict_markdown

__all__ = ["add_results", "model_card"]

_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"
_NOT_MEASURED = "Not measured yet: `torchrl-maxmin evaluate` writes here what it finds."


def model_card(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    """Write the card of a policy; results that an evaluation had added stay.

    Args:
        folder: Of the policy.
        settings: ``base_model``; ``adapter``, whether the folder holds an adapter alone; ``title``; ``data``,
            the prompts; ``rows``, what it was trained with, by name.

    Returns:
        Path of the card.
    """
    path = Path(folder) / CARD
    base, local = str(settings["base_model"]), Path(str(settings["base_model"]))
    metadata: dict[str, Any] = (
        {} if local.exists() else {"base_model": base}
    )  # the hub knows no folder of ours
    metadata |= {
        "library_name": "peft" if settings["adapter"] else "transformers",
        "pipeline_tag": "text-generation",
        "license": "unknown",  # that of the base model and of the data, which nothing here knows
        "tags": ["torchrl-maxmin", "maxmin-rlhf", "rlhf", "ppo"],
    }
    results = _results(path) or _NOT_MEASURED
    shown = {markdown(name): markdown(value) for name, value in settings["rows"].items()}
    given = {
        "metadata": yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "title": markdown(settings["title"]),
        "base": markdown(local.name if local.exists() else base),
        "data": markdown(settings["data"]),
        "rows": shown,
        "adapter": settings["adapter"],
    }
    template = templates().get_template("card.md")
    text = template.render(begin=_BEGIN, end=_END, results=results, **given) + "\n"
    return _write(path, text)


def add_results(folder: str | Path, name: str, found: Verdict, table: str) -> bool:
    """Put what an evaluation found into the card of a policy's folder, in place of what stood there.

    Args:
        folder: Of the policy. A folder without a card of ours, or that cannot be written, stays as it is.
        name: Of the policy in the evaluation.
        found: The verdict, its names safe for Markdown.
        table: The table by group, as Markdown.

    Returns:
        Whether the card was written.
    """
    path = Path(folder) / CARD
    if _results(path) is None:
        return False
    results = f"Evaluated as {markdown(name)}.\n\n{verdict_markdown(found)}\n\n{table}"
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(_BEGIN)], text[text.index(_END) :]
    with suppress(OSError):
        _write(path, f"{before}{_BEGIN}\n{results}\n{after}")
        return True
    return False


def _results(path: Path) -> str | None:
    """Return what stands between the marks of a card; None without a card that has them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    begin, end = text.find(_BEGIN), text.find(_END)
    return text[begin + len(_BEGIN) : end].strip() if 0 <= begin < end else None


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path
