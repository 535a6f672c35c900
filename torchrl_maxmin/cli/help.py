"""``--help`` of the stages, from the source of their configs alone: nothing heavy is imported."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torchrl_maxmin.cli.fields import REQUIRED, FieldText, read_config
from torchrl_maxmin.cli.flags import CHOICES, COMMON, EXAMPLES, GROUPS

__all__ = ["asks_for_help", "stage_help"]

_OWN = {
    "config": ("FILE", "YAML file with the same keys as the flags, which win over it"),
    "print_config": ("", "print the resolved settings as YAML, and run nothing"),
    "help": ("", "this, and no more than the common flags"),
    "help-all": ("", "this, with all flags"),
}
_INDENT, _MOST = 6, 110


def asks_for_help(arguments: Iterable[str]) -> bool:
    """Say whether the words after a verb ask for help.

    Args:
        arguments: the words.

    Example:
        >>> asks_for_help(["--seed", "1", "--help-all"]), asks_for_help(["--seed", "1"])
        (True, False)
    """
    return not {"-h", "--help", "--help-all", "--help_all"}.isdisjoint(arguments)


def stage_help(form: str, line: str, module: str, config: str, arguments: Sequence[str]) -> str:
    """Write the help of a stage: usage, required flags, the others by group, examples.

    Args:
        form: the verb, or ``ppo --env_id``.
        line: what it does.
        module: where its config is.
        config: the config's class.
        arguments: words after the verb; ``--help-all`` among them lists every flag.
    """
    whole = not {"--help-all", "--help_all"}.isdisjoint(arguments)
    text = read_config(module, config)
    choices = CHOICES.get(form, {})
    required = [name for name, field in text.fields.items() if field.default is REQUIRED]
    verb = form.split()[0]
    lines = [
        *_wrap(f"usage: torchrl-maxmin {verb} " + " ".join(f"--{name} {_kind(text.fields[name], ())}"
               for name in required) + " [--flags]", "         "),
        "",
        *_wrap(f"{line[0].upper()}{line[1:]}.", ""),
        "",
        *(wrapped for part in text.summary.split("\n\n") for wrapped in _wrap(part, "")),
    ]  # fmt: skip
    sections: dict[str, list[str]] = {"required": required} if required else {}
    shown = set(required)
    for group, names in GROUPS.items():
        mine = [name for name in names if name in text.fields and name not in shown]
        sections[group] = mine if whole else [name for name in mine if name in COMMON]
    for title, listed in sections.items():
        if listed:
            lines += ["", f"{title}:"]
            for name in listed:
                lines += _entry(text.fields[name], choices.get(name, ()))
    lines += ["", "settings and help:"]
    for name, (kind, words) in _OWN.items():
        lines += [f"  --{name} {kind}".rstrip(), *_wrap(words, " " * _INDENT)]
    left = len(text.fields) - sum(map(len, sections.values()))
    if left:
        lines += ["", f"{left} more flags: torchrl-maxmin {verb}{form.removeprefix(verb)} --help-all"]
        lines[-1] = lines[-1].replace("--env_id --", "--env_id ID --")
    if form in EXAMPLES:
        lines += ["", "examples:", *(f"  {example}" for example in EXAMPLES[form])]
    return "\n".join(lines)


def _entry(field: FieldText, choices: Sequence[str]) -> list[str]:
    head = f"  --{field.name} {_kind(field, choices)}"
    default = "" if field.default is REQUIRED else f" (default: {_shown(field.default)})"
    wide = len(head) > _width()
    return [
        *(_wrap(head, " " * _INDENT) if wide else [head]),
        *_wrap(f"{field.help}{default}", " " * _INDENT),
    ]


def _kind(field: FieldText, choices: Sequence[str]) -> str:
    """What stands for the value: its choices, or its type in a word."""
    types = field.type.replace(" ", "").replace("|None", "")
    if choices:
        many = "[...]" if types.startswith("list") else ""
        return "{" + ",".join(choices) + "}" + many
    kinds = {
        "str": _NOUNS.get(field.name.rsplit("_")[-1], "TEXT"),
        "int": "N",
        "float": "X",
        "bool": "[true|false]",
        "int|str": "N|auto",
        "bool|str": "true|false|FOLDER",
        "list[str]": "TEXT ...",
        "list[int]": "N ...",
        "list[float]": "X ...",
        "dict[str,Any]": "MAPPING",
    }
    return kinds[types]


_NOUNS = {"dir": "FOLDER", "path": "MODEL", "name": "DATA", "column": "COLUMN", "url": "URL", "id": "ID"}


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "left out"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, list | dict) else f"{value:.12g}"


def _width() -> int:
    return max(40, min(_MOST, int(os.environ.get("COLUMNS") or 0) or shutil.get_terminal_size().columns))


def _wrap(text: str, indent: str) -> list[str]:
    text = text if text.startswith(" ") else indent * (not text.startswith("usage")) + " ".join(text.split())
    return textwrap.wrap(
        text, _width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
