"""Imports go one way: a room knows those below it, and nothing knows the command line."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"torchrl_maxmin": ROOT / "torchrl_maxmin", "maxmin_kernels": ROOT / "kernels" / "maxmin_kernels"}
#: from the ground floor to the roof
FLOORS = (
    "core",
    "stats",
    "pages",
    "preferences",
    "models",
    "world",
    "clustering",
    "rewards",
    "welfare",
    "envs",
    "collectors",
    "objectives",
    "rollouts",
    "trainers",
    "evaluation",
    "diagnosis",
    "api",
    "cli",
)


def name_of(path, package, folder):
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    """Every module of the two packages by its dotted name."""
    return {
        name_of(path, package, folder): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


def imported(path):
    """Modules of ours that a file imports, anywhere in it, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in whole}
    return {name for name in found if name in modules()}


@cache
def graph():
    return {name: imported(path) - {name} for name, path in modules().items()}


def room(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "torchrl_maxmin" and len(parts) > 1 else ""


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGES["torchrl_maxmin"].iterdir() if (path / "__init__.py").is_file()}
    assert rooms | {"api"} == set(FLOORS)  # one file
    assert (PACKAGES["torchrl_maxmin"] / "api.py").is_file()


def test_what_is_imported_is_there():
    """Also in functions, which no other test may have called; earlier import paths are for users alone."""
    missing = []
    for folder in ("torchrl_maxmin", "kernels", "reproductions", "benchmarks", "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                missing += [
                    f"{path.relative_to(ROOT)}: {name}"
                    for name in names
                    if name.split(".")[0] in PACKAGES and name not in modules()
                ]
    assert missing == []


def test_no_room_imports_from_above():
    upward = [
        f"{name} -> {other}"
        for name, others in graph().items()
        for other in others
        if room(name) in FLOORS
        and room(other) in FLOORS
        and FLOORS.index(room(other)) > FLOORS.index(room(name))
    ]
    assert upward == []


def test_the_kernels_know_nothing_of_the_package():
    assert [
        name for name in graph() if name.startswith("maxmin_kernels") and any(map(room, graph()[name]))
    ] == []


def test_no_two_files_import_each_other():
    visited, path = set(), []

    def visit(name):
        if name in path:
            pytest.fail("a circle of imports: " + " -> ".join([*path[path.index(name) :], name]))
        if name not in visited:
            path.append(name)
            for other in sorted(graph()[name]):
                visit(other)
            path.pop()
            visited.add(name)

    for name in graph():
        visit(name)


def test_nothing_but_the_command_line_imports_it():
    others = [*(ROOT / "reproductions").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    files = [path for name, path in modules().items() if room(name) != "cli"]
    allowed = ROOT / "torchrl_maxmin" / "__main__.py"
    guests = [path for path in [*files, *others] if any(room(name) == "cli" for name in imported(path))]
    assert [path.relative_to(ROOT) for path in guests if path != allowed] == []
