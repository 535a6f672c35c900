"""Files of preflib.org: strict orders, complete (.soc) or not (.soi), with how many voters gave each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchrl_maxmin.core.errors import UserError

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa

__all__ = ["read_preflib"]

_BATCH_ROWS = 5_000
_MOST_VOTERS = 1_000_000
_NAME = re.compile(r"#\s*ALTERNATIVE NAME (\d+):\s*(.*)")
_WANTED = "write its orders as 'COUNT: 2,1,3', best first, after lines '# ALTERNATIVE NAME 1: name'"

Order = tuple[int, int, list[int]]  # line, voters, alternatives best first


def read_preflib(path: Path, reach: Callable[[int], None], mixed: dict[str, str]) -> Iterator[pa.Table]:
    """The orders of a file, a row a voter: ``user_id`` and ``ranked_responses``, the names best first.

    Voters are nobody known: each is a user of its own. Both formats are read, that with lines of ``#`` and
    the older one.

    Args:
        path: the file.
        reach: told how far the file is read.
        mixed: gets the number of voters that ordered one alternative alone, who are left out.

    Raises:
        UserError: naming the line that is no order.
    """
    lines = list(_lines(path))
    names, orders = _parts(path, lines)
    rows: list[dict[str, Any]] = []
    voter = lone = 0
    for number, voters, order in orders:
        _check(path, number, voters, order, names)
        if voter + voters > _MOST_VOTERS:
            raise UserError(
                f"{path}, line {number}: there are more than {_MOST_VOTERS:,} voters; take a part"
            )
        ranked = [names[place] for place in order]
        lone += voters if len(ranked) == 1 else 0
        for _ in range(voters):
            voter += 1
            if len(ranked) > 1:
                rows.append({"user_id": f"{path.stem}:{voter}", "ranked_responses": ranked})
            if len(rows) == _BATCH_ROWS:
                yield pa.Table.from_pylist(rows)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows)
    reach(path.stat().st_size)
    if lone:
        mixed[f"voters of {path.name}"] = f"{path}: {lone:,} voters order one alternative alone"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number} is not UTF-8 text ({error.reason})") from error
        if text:
            yield number, text


def _parts(path: Path, lines: list[tuple[int, str]]) -> tuple[dict[int, str], Iterator[Order]]:
    """The names of the alternatives, and the orders."""
    if lines and lines[0][1].isdecimal():
        return _old_parts(path, lines)
    named = (_NAME.match(line) for _, line in lines)
    names = {int(found[1]): found[2] or found[1] for found in named if found}
    return names, (_order(path, n, *line.partition(":")) for n, line in lines if not line.startswith("#"))


def _old_parts(path: Path, lines: list[tuple[int, str]]) -> tuple[dict[int, str], Iterator[Order]]:
    """The older format: how many alternatives, their names, a line of totals, and the orders."""
    count, names = int(lines[0][1]), {}
    for number, line in lines[1 : count + 1]:
        place, _, name = line.partition(",")
        if not place.strip().isdecimal():
            raise UserError(f"{path}, line {number} does not name an alternative; {_WANTED}")
        names[int(place)] = name.strip() or place
    return names, (_order(path, n, *line.partition(",")) for n, line in lines[count + 2 :])


def _order(path: Path, number: int, voters: str, _: str, order: str) -> Order:
    places = [place.strip() for place in order.split(",")]
    if "{" in order:
        raise UserError(f"{path}, line {number} holds a tie, and these are not read; leave such orders out")
    if not all(text.isdecimal() and len(text) < 10 for text in (voters.strip(), *places)):
        raise UserError(f"{path}, line {number} is no order; {_WANTED}")
    return number, int(voters), list(map(int, places))


def _check(path: Path, number: int, voters: int, order: list[int], names: dict[int, str]) -> None:
    unknown = [place for place in order if place not in names]
    if unknown:
        raise UserError(f"{path}, line {number} orders {unknown[0]}, which no line names; {_WANTED}")
    if len(set(order)) < len(order) or voters < 1:
        why = "orders an alternative twice" if voters else "has no voter"
        raise UserError(f"{path}, line {number} {why}; mend the line")
