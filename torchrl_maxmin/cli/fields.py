"""Read what a config dataclass says of its fields from its source, without importing it or torch."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["REQUIRED", "ConfigText", "FieldText", "read_config"]

_ROOT = Path(__file__).resolve().parents[2]
#: the default of a field that must be given
REQUIRED = "(required)"


class FieldText(NamedTuple):
    """A field: its name, its type and default as the source has them, its words in the docstring."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class ConfigText:
    """A config: what stands before its arguments, and its fields by name, in their order."""

    summary: str
    fields: dict[str, FieldText]


@dataclass(frozen=True)
class _Module:
    """Top-level names of a source file: assigned values, classes, and where imported names come from."""

    values: dict[str, ast.expr]
    classes: dict[str, ast.ClassDef]
    imports: dict[str, tuple[str, str]]


def read_config(module: str, name: str) -> ConfigText:
    """Read a config dataclass and those that it extends, as Python would.

    Args:
        module: dotted name of the module that defines or imports it.
        name: the class.

    Raises:
        LookupError: where the package has no such class.
        ValueError: for a default that only running the code would tell.

    Example:
        >>> read_config("torchrl_maxmin.trainers.sft", "SFTConfig").fields["warmup_steps"].default
        0
    """
    found = _find(module, name)
    if found is None:
        raise LookupError(f"{module} has no class {name}")
    fields: dict[str, FieldText] = {}
    for where, node in reversed(_ancestry(*found)):
        words = _arguments(node)
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                own, earlier = line.target.id, fields.get(line.target.id)
                text = words.get(own) or (earlier.help if earlier else "")
                fields[own] = FieldText(own, ast.unparse(line.annotation), _default(where, line.value), text)
        for own in words.keys() & fields.keys():  # a docstring may say of an inherited field what is its own
            fields[own] = fields[own]._replace(help=words[own])
    summary = (ast.get_docstring(found[1]) or "").partition("\nArgs:")[0].strip()
    return ConfigText(summary, fields)


@cache
def _read(module: str) -> _Module | None:
    base = _ROOT.joinpath(*module.split("."))
    path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if path is None:
        return None
    values: dict[str, ast.expr] = {}
    classes: dict[str, ast.ClassDef] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            values[node.target.id] = node.value
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return _Module(values, classes, imports)


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Where a class is defined; None for one of another package."""
    source = _read(module)
    if source is None:
        return None
    if name in source.classes:
        return module, source.classes[name]
    return _find(*source.imports[name]) if name in source.imports else None


def _ancestry(module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
    """A class and what it extends: each after all that extend it, as in Python's order of resolution."""
    order = [(module, node)]
    for base in node.bases:
        found = _find(module, ast.unparse(base))
        for ancestor in _ancestry(*found) if found else []:
            if ancestor in order:  # what two of them extend comes after both
                order.remove(ancestor)
            order.append(ancestor)
    return order


def _default(module: str, node: ast.expr | None) -> Any:
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Name):
        source = _read(module)
        assert source is not None
        if node.id in source.values:
            return _default(module, source.values[node.id])
        if node.id in source.imports:
            other, name = source.imports[node.id]
            return _default(other, ast.Name(name))
        return {"list": list, "dict": dict}[node.id]()
    if isinstance(node, ast.Lambda):
        return _default(module, node.body)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "list":
            return list(_default(module, node.args[0]))
        if node.func.id == "field":
            given = [key.value for key in node.keywords if key.arg in ("default", "default_factory")]
            return _default(module, given[0] if given else None)
    return ast.literal_eval(node)


def _arguments(node: ast.ClassDef) -> dict[str, str]:
    """Words of the docstring's section Args by argument."""
    _, _, section = inspect.cleandoc(ast.get_docstring(node) or "").partition("\nArgs:\n")
    entries = re.split(r"^ {4}(\w+): ", section.partition("\n\n")[0], flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
