"""Verdicts on responses: the winner's place, name or letter, and ranks."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.io.columns import read_column, shown

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
    import pyarrow.compute as pc
if TYPE_CHECKING:
    from torchrl_maxmin.preferences.io.table import Table

__all__ = ["TIE", "Verdicts", "rank_values"]

TIE = -1
_TIES = ("tie", "tie (bothbad)", "both", "bothbad", "both_bad", "draw", "equal", "same")
_STEMS = ("response", "completion", "answer", "output", "summary", "conversation", "option", "model")


class Verdicts:
    """Reads the winner from the values of one column.

    A number is a place. Places count from 0 where a 0 occurs or the responses' names end in
    ``_0, _1``; from 1 where the names end in ``_1, _2`` or the number of responses occurs. Beside a -1,
    1 is the first of two responses, -1 the second and 0 a tie; where places count from 0, 0.5 is a tie.
    A word is a letter (``a``), a name (``response_a``, ``model_a``, the column's own) or a tie
    (``tie``, ``both``, ``same``).

    Args:
        table: the data.
        path: the column with the verdicts.
        responses: names of the responses' columns, or letters when they stand in one list.
        count: how many responses a row has.

    Raises:
        UserError: when the numbers could mean two things.
    """

    def __init__(self, table: Table, path: str, responses: Sequence[str], count: int):
        self._path = path
        self._count = count
        self._responses = responses
        self._places: dict[float | str | None, int] = dict.fromkeys(_TIES, TIE)
        for place, (name, letter) in enumerate(zip(responses, string.ascii_lowercase, strict=False)):
            marks = {letter, name.rpartition("_")[2]}
            for word in (name.lower(), letter, *(f"{stem}_{mark}" for stem in _STEMS for mark in marks)):
                self._places[word] = place
        numbers = {value for value in map(_key, _distinct(table, path)) if isinstance(value, float)}
        if numbers:
            self._places |= self._numbered(numbers)

    def place(self, value: Any, count: int, row: int) -> int:
        """Place of the winner among ``count`` responses, or :data:`TIE`.

        Raises:
            UserError: for a missing value and for one that names no response.
        """
        found = self._places.get(_key(value))
        if found is None or found >= count:
            raise UserError(
                f"row {row}: column {self._path!r} holds {shown(value)}, which names none of {count} "
                f"responses; write a place (0 to {count - 1}), a letter (a, b) or tie"
            )
        return found

    def _numbered(self, numbers: set[float]) -> dict[float | str | None, int]:
        count, digit = self._count, self._responses[0][-1]
        places = range(len(self._responses))
        if -1 in numbers and count == 2:
            return {1.0: 0, -1.0: 1, 0.0: TIE}
        if digit == "0" or 0 in numbers:
            if self._path == "y":
                raise UserError(
                    "column 'y' holds 0 and 1, which may be a place or say whether the first response won; "
                    "write 1 (the first) and -1 (the second), or call the column choice if it is a place"
                )
            return {0.5: TIE, **{float(place): place for place in places}}
        if digit == "1" or count in numbers:
            return {place + 1.0: place for place in places}
        raise UserError(
            f"column {self._path!r} never says 0 nor {count}, so its places may count from 0 or from 1; "
            "write letters (a, b) instead"
        )


def rank_values(value: Any, count: int, path: str, row: int) -> Sequence[float]:
    """One number for each response, smaller for a better one.

    Args:
        value: the cell. A column ``rank`` or ``ranks`` gives the number of every response; a column
            ``ranking`` gives places (from 0 or from 1) best first, or letters as in ``"C>A=B"``.
        count: number of responses.
        path: the column.
        row: its row, for messages.

    Raises:
        UserError: for anything else.

    Example:
        >>> rank_values([3, 1, 2], 3, "rank", 0), rank_values([3, 1, 2], 3, "ranking", 0)
        ([3.0, 1.0, 2.0], [1.0, 2.0, 0.0])
        >>> rank_values("C>A=B", 3, "ranking", 0)
        [1.0, 1.0, 0.0]
    """
    by_order = path.rpartition(".")[2] == "ranking"
    values = _ranks_of_order(value, count) if by_order else value
    if isinstance(values, list) and len(values) == count:
        numbers = [number for number in map(_key, values) if isinstance(number, float)]
        if len(numbers) == count:
            return numbers
    what = "their places or letters, best first" if by_order else "a rank for each"
    raise UserError(f"row {row}: column {path!r} holds {shown(value)}; for {count} responses it takes {what}")


def _ranks_of_order(value: Any, count: int) -> list[int] | None:
    if isinstance(value, str):
        levels = [level.split("=") for level in value.replace(" ", "").lower().split(">")]
        ranks = {letter: rank for rank, level in enumerate(levels) for letter in level}
        letters = string.ascii_lowercase[:count]
        once = sum(map(len, levels)) == len(ranks) == len(letters)
        return [ranks[letter] for letter in letters] if once and set(ranks) == set(letters) else None
    for start in (0, 1):
        places = range(start, start + count)
        if isinstance(value, list) and len(value) == count and all(place in value for place in places):
            return [value.index(place) for place in places]
    return None


def _distinct(table: Table, path: str) -> list[Any]:
    column = read_column(table, path)
    if pa.types.is_nested(column.type):
        raise UserError(f"column {path!r} holds {column.type}, not the place or the name of a response")
    return pc.unique(column).to_pylist()


def _key(value: Any) -> float | str | None:
    """A number as float, a word in small letters; None for whatever is neither (also true and false)."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    try:
        return _key(float(value))
    except ValueError:
        return value.strip().lower()
