"""``recipes``: settings of whole jobs to start from, shipped with the package; nothing heavy is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrl_maxmin.cli.parsing import OneLineParser, closest
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.text_escape import terminal

__all__ = ["FIELDS", "RecipeText", "read_recipes", "recipes"]

_FOLDER = Path(__file__).with_name("configs") / "recipes"
#: what the head of every recipe says, in this order
FIELDS = ("verb", "hardware", "time", "command", "expect")


@dataclass(frozen=True)
class RecipeText:
    """A recipe as shipped: its name, title, what its head says by :data:`FIELDS`, and the whole text."""

    name: str
    title: str
    head: dict[str, str]
    text: str


def read_recipes() -> dict[str, RecipeText]:
    """Read the heads of all recipes, by name.

    Example:
        >>> read_recipes()["environment"].head["verb"]
        'ppo'
    """
    return {path.stem: _read(path) for path in sorted(_FOLDER.glob("*.yaml"))}


def _read(path: Path) -> RecipeText:
    text = path.read_text(encoding="utf-8")
    comments: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").removeprefix(" "))
    head: dict[str, str] = {}
    last = ""
    for line in comments[2:]:
        if not line:
            break
        key, colon, value = line.partition(":")
        if colon and key in FIELDS:
            last, head[key] = key, value.strip()
        else:
            head[last] += f" {line.strip()}"
    return RecipeText(path.stem, comments[0], head, text)


def recipes(arguments: Sequence[str]) -> int:
    """``recipes``: list them; ``recipes cp NAME [FILE]``: copy one to change it."""
    parser = OneLineParser(
        prog="torchrl-maxmin recipes",
        description="List the recipes: settings for the paper's experiments and for common jobs, a YAML file "
        "each. cp copies one, to be changed and given to its verb by --config.",
        epilog="examples: torchrl-maxmin recipes; torchrl-maxmin recipes cp environment; "
        "torchrl-maxmin recipes cp own_pairs_ppo mine.yaml",
    )
    parser.add_argument("action", nargs="?", default="ls", help="ls (default), or cp")
    parser.add_argument("name", nargs="?", help="of cp: the recipe")
    parser.add_argument("file", nargs="?", help="of cp: where to (default: NAME.yaml in this folder)")
    given = parser.parse_args(list(arguments))
    shipped = read_recipes()
    if given.action == "ls" and given.name is None:
        _print_list(shipped)
        return 0
    if given.action != "cp":
        word = given.action if given.action != "ls" else given.name
        raise UserError(f"recipes takes ls, or cp NAME [FILE], not {word!r}; see {parser.prog} --help")
    if given.name is None:
        raise UserError("recipes cp needs the name of a recipe; torchrl-maxmin recipes lists them")
    name = given.name.removesuffix(".yaml")
    if name not in shipped:
        near = closest(name, list(shipped), "")
        raise UserError(f"no recipe {given.name!r}{near}; torchrl-maxmin recipes lists them")
    target = Path(given.file or f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(shipped[name].text)
    except FileExistsError as error:
        raise UserError(f"{target} is there already; name another file") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no folder {target.parent}; make it, or name another file") from error
    verb = shipped[name].head["verb"]
    shown = terminal(target)
    sys.stdout.write(f"copied to {shown}; run it with: torchrl-maxmin {verb} --config {shown}\n")
    return 0


def _print_list(shipped: dict[str, RecipeText]) -> None:
    wide = max(map(len, shipped))
    lines = []
    for title, of_paper in (("experiments of the paper", True), ("common jobs", False)):
        lines.append(f"{title}:")
        for name, recipe in shipped.items():
            if name.startswith("paper_") is of_paper:
                lines.append(f"  {name:<{wide}}  {recipe.head['verb']:<9} {recipe.title}")
        lines.append("")
    sys.stdout.write("\n".join([*lines, "copy one with: torchrl-maxmin recipes cp NAME [FILE]", ""]))
