"""Flags and YAML to a stage's config, and one line for whatever is wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from torchrl_maxmin.core.errors import UserError

__all__ = ["OneLineParser", "closest", "config_from_mapping", "mentions", "parse_config"]


class OneLineParser(argparse.ArgumentParser):
    """The parser of verbs without a config: a mistake is a :class:`UserError` instead of a usage text."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UserError`, with the flag that may have been meant."""
        if unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            known = [word[2:] for action in self._actions for word in action.option_strings]
            near = closest(unknown[1][2:].replace("-", "_"), known, "--")
            message = f"unknown flag {unknown[1]}{near}"
        raise UserError(f"{message}; see {self.prog} --help")


def parse_config(verb: str, line: str, config_class: type, arguments: Sequence[str]) -> Any:
    """Parse a stage's config from its flags and the YAML that ``--config`` names; flags win, wherever.

    Args:
        verb: the stage.
        line: what it does, for ``--help``.
        config_class: dataclass whose fields are the flags, its docstring their help.
        arguments: words after the verb.

    Raises:
        UserError: for an unknown flag or key, a missing one, or a value of the wrong type.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    hint = f"; see torchrl-maxmin {verb} --help"
    words = _join_lists(config_class, arguments)
    known = [*_names(config_class), "config", "help", "print_config"]
    for word in words:
        name = word.partition("=")[0].removeprefix("--").removesuffix("+")
        if word.startswith("--") and name not in known:
            near = closest(name.replace("-", "_"), known, "--")
            raise UserError(f"unknown flag --{name}{near or hint}")
    parser = _make_parser(config_class, prog=f"torchrl-maxmin {verb}", description=line, with_config=True)
    try:
        return _build(config_class, parser.parse_args(_config_first(words)))
    except argparse.ArgumentError as error:
        raise UserError(_one_line(str(error), config_class, "--") + hint) from error
    except UnicodeDecodeError as error:
        files = " or ".join(_config_files(words))
        raise UserError(f"{files} is no text in UTF-8 ({error}); save it so, or write it again") from error


def _config_files(arguments: Sequence[str]) -> list[str]:
    """List the YAML files that ``--config`` names."""
    files = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    return files + [after for word, after in pairwise(arguments) if word == "--config"]


def mentions(arguments: Sequence[str], name: str) -> bool:
    """Say whether the flags, or the YAML files that ``--config`` names, set a field.

    Args:
        arguments: words after the verb.
        name: the field.
    """
    flagged = any(word.partition("=")[0] == f"--{name}" for word in arguments)
    return flagged or any(name in keys for keys in map(_keys_of, _config_files(arguments)))


def _keys_of(path: str) -> set[Any]:
    """Read a YAML file's keys; none where it cannot be read, which the parser words."""
    import yaml  # not where help is asked for

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, Mapping) else set()


def config_from_mapping(config_class: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a config from a mapping, checked as strictly as flags are.

    Args:
        config_class: dataclass to build.
        values: its fields.
        where: whence they come, for the error.

    Raises:
        UserError: for an unknown key, a missing one, or a value of the wrong type.
    """
    try:
        return _build(config_class, _make_parser(config_class).parse_object(dict(values)))
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {_one_line(str(error), config_class, '')}") from error


def _names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _make_parser(config_class: type, with_config: bool = False, **settings: Any) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, **settings)
    if with_config:
        parser.add_argument("--config", action="config", help="YAML file with the same keys as the flags")
    parser.add_class_arguments(config_class)
    return parser


def _build(config_class: type, parsed: Any) -> Any:
    values = parsed.as_dict()
    for field in dataclasses.fields(config_class):
        if values[field.name] is None and "None" not in str(field.type):
            raise argparse.ArgumentError(None, f"argument --{field.name}: expected one argument")
    return config_class(**{name: values[name] for name in _names(config_class)})


def closest(name: str, known: Sequence[str], prefix: str) -> str:
    """Suggest what was meant; empty where nothing is near.

    Args:
        name: what was given.
        known: what there is.
        prefix: dashes before the suggestion.
    """
    close = get_close_matches(name, known, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _config_first(words: list[str]) -> list[str]:
    """``--config`` before all else: the parser lets what comes later win."""
    before = ["", *words]
    chosen = [w.startswith("--config=") or "--config" in (w, b) for w, b in zip(words, before, strict=False)]
    places = sorted(range(len(words)), key=lambda i: not chosen[i])
    return [words[i] for i in places]


def _join_lists(config_class: type, arguments: Sequence[str]) -> list[str]:
    """``--seeds 0 1 2`` as ``--seeds=["0", "1", "2"]`` for every list, and a bare ``--use_peft`` as true."""
    fields = dataclasses.fields(config_class)
    lists = {f"--{f.name}" for f in fields if str(f.type).startswith("list")}
    switches = {f"--{f.name}" for f in fields if str(f.type) == "bool"}
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in lists:
            bare = word in switches and (not rest or rest[0].startswith("--"))
            joined.append(f"{word}=true" if bare else word)
            continue
        values = [value] if equals else []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        whole = " ".join(values)
        joined.append(f"{flag}={whole if whole.startswith('[') else json.dumps(values)}")
    return joined


def _one_line(message: str, config_class: type, prefix: str) -> str:
    """Word what the parser says of one flag or key in a line."""
    if required := re.search(r"arguments are required: (.*)", message):
        return "missing " + ", ".join(prefix + name for name in required[1].split(", "))
    if valueless := re.search(r"argument --(\S+): expected one argument", message):
        return f"{prefix}{valueless[1]} needs a value"
    if stray := re.search(r"unrecognized arguments: (.*)", message):
        return f"{stray[1]!r} belongs to no flag"
    if unknown := re.search(r"Option '(.*)' is not accepted", message):
        return f"unknown key {unknown[1]!r}{closest(unknown[1], _names(config_class), '')}"
    if message.startswith("Unexpected config"):
        return f"{prefix}config must be a YAML file of key: value lines"
    key = re.search(r'Parser key "([^"]+)"', message)
    types = re.findall(r"Expected a <class '(\w+)'>", message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and types and value:
        wanted = " or ".join("null" if name == "NoneType" else name for name in types)
        quotes = " (in YAML, put it in quotes)" if "str" in types else ""
        return f"{prefix}{key[1]} takes {wanted}, not {value[1]!r}{quotes}"
    text = " ".join(message.split())
    return re.sub(r'Parser key "([^"]+)": ', lambda found: f"{prefix}{found[1]}: ", text)
