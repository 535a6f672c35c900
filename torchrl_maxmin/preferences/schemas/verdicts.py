"""Verdicts on responses: the winner's place, name or letter, ranks, and scores of single responses."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import split_prompt
from torchrl_maxmin.preferences.io.columns import (
    Roles,
    cell,
    in_batches,
    labels_of,
    read_column,
    rows_of,
    shown,
)
from torchrl_maxmin.preferences.schemas.pairs import Comparison, Judgement, LoadOptions

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
    import pyarrow.compute as pc
if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TIE", "Verdicts", "pairs_within", "rank_values", "ratings", "scores"]

TIE = -1
_TIES = ("tie", "tie (bothbad)", "both", "bothbad", "both_bad", "draw", "equal", "same")
_STEMS = ("response", "completion", "answer", "output", "summary", "conversation", "option", "model")
_READ_ROWS = 1_000
_SAFETY = {"no": 1.0, "unsure": 0.5, "yes": 0.0}  # "is the response harmful?"
_UNSURE_MARGIN = 0.5  # an unsure rating ties with both others

Compose = Callable[[dict[str, Any]], tuple[Any, Any]]


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

    def __init__(self, table: Dataset, path: str, responses: Sequence[str], count: int):
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


def _distinct(table: Dataset, path: str) -> list[Any]:
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


# -- scores of single responses --------------------------------------------------------------------


def scores(table: Dataset, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """One row a response: what a user scored higher over what they scored lower for the same prompt."""
    values = _numbers(table, roles.verdict[0])
    prompts = labels_of(table, roles.key, "prompt")[0] if roles.key else _hashes(table, roles)
    keys = _in_order(np.stack([users, prompts]))
    (response,) = roles.responses

    def compose(row: dict[str, Any]) -> tuple[Any, Any]:
        return cell(row, roles.prompt[0]), cell(row, response)

    return _within(table, roles, keys, values, options.tie_margin, options, compose)


def ratings(table: Dataset, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """One row a rating of a conversation as harmful: what a rater found safe over what they found harmful.

    The conversations differ, so each is a response as a whole, to an empty prompt.
    """
    (path,) = roles.verdict
    words = read_column(table, path).to_pylist()
    values = np.array([_SAFETY.get(str(word).strip().lower(), np.nan) for word in words])
    odd = np.flatnonzero(np.isnan(values))
    if len(odd):
        raise UserError(f"row {odd[0]}: column {path!r} holds {shown(words[odd[0]])}, not Yes, No or Unsure")

    def compose(row: dict[str, Any]) -> tuple[Any, Any]:
        parts = [cell(row, column) for column in roles.responses]
        return "", "\n".join(parts) if all(isinstance(part, str) for part in parts) else None

    return _within(table, roles, users, values, _UNSURE_MARGIN, options, compose)


def pairs_within(
    values: np.ndarray, margin: float, keep_ties: bool, most: int, generator: np.random.Generator
) -> tuple[list[Comparison], int]:
    """Pairs of higher over lower values, a uniform choice of them where there are more than ``most``.

    Takes O(n log n + most) time: pairs are counted and drawn by number, never listed.

    Args:
        values: [n].
        margin: values that differ by no more are a tie.
        keep_ties: whether ties are pairs, too.
        most: largest number of pairs.
        generator: draws the choice.

    Returns:
        The pairs, and how many there were to choose from.

    Example:
        >>> pairs_within(np.array([3.0, 1.0, 3.0]), 0.0, False, 9, np.random.default_rng(0))
        ([Comparison(better=0, worse=1, tie=False), Comparison(better=2, worse=1, tie=False)], 2)
    """
    order = np.argsort(values, kind="stable")
    rising = values[order]
    strictly_below = np.searchsorted(rising, rising - margin, side="left")
    below = np.arange(len(values)) if keep_ties else strictly_below
    ends = np.cumsum(below)
    total = int(ends[-1])
    picks = np.arange(total) if total <= most else np.sort(generator.choice(total, most, replace=False))
    upper = np.searchsorted(ends, picks, side="right")
    lower = picks - (ends[upper] - below[upper])
    ties = lower >= strictly_below[upper]
    found = zip(order[upper].tolist(), order[lower].tolist(), ties.tolist(), strict=True)
    return [Comparison(better, worse, tie) for better, worse, tie in found], total


def _within(
    table: Dataset,
    roles: Roles,
    keys: np.ndarray,
    values: np.ndarray,
    margin: float,
    options: LoadOptions,
    compose: Compose,
) -> Iterator[Judgement]:
    """One judgement for every key, from the values of its rows."""
    generator = np.random.default_rng(options.seed)
    keep_ties = options.ties == "halve"
    order = np.argsort(keys, kind="stable")

    def without_texts() -> Iterator[tuple[tuple[np.ndarray, Judgement], int]]:
        for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            mine = values[rows]
            pairs, total = pairs_within(mine, margin, keep_ties, options.max_pairs, generator)
            used = np.unique([place for pair in pairs for place in pair[:2]]).astype(np.int64)
            local = {place: i for i, place in enumerate(used.tolist())}
            pairs = [Comparison(local[pair.better], local[pair.worse], pair.tie) for pair in pairs]
            _, ranks = np.unique(-mine[used], return_inverse=True)
            ties = 0 if keep_ties else len(rows) * (len(rows) - 1) // 2 - total
            judgement = Judgement(int(rows[0]), "", (), ranks.tolist(), pairs, ties, total - len(pairs))
            yield (rows[used], judgement), len(used)

    for batch in in_batches(without_texts(), len(keys), _READ_ROWS - 1):  # texts of a batch in one go
        cells = rows_of(table, roles, np.concatenate([rows for rows, _ in batch]))
        for rows, judgement in batch:
            if len(rows):
                prompts, texts = zip(*(compose(next(cells)) for _ in rows), strict=True)
                columns = [roles.responses[-1]] * len(rows)
                prompt, responses = split_prompt(prompts[0], texts, judgement.row, columns)
                judgement = judgement._replace(prompt=prompt, responses=responses)
            yield judgement


def _in_order(columns: np.ndarray) -> np.ndarray:
    """A code [N] for every distinct column of a matrix [.., N], numbered by first appearance."""
    _, first, codes = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]


def _hashes(table: Dataset, roles: Roles) -> np.ndarray:
    """A number [N] for every prompt, equal for equal prompts."""
    cells = rows_of(table, Roles(prompt=roles.prompt))
    return np.fromiter((hash(repr(cell(row, roles.prompt[0]))) for row in cells), np.int64, len(table))


def _numbers(table: Dataset, path: str) -> np.ndarray:
    """A column of numbers as float64 [N]; text that spells a number is one."""
    column = read_column(table, path)
    if not pa.types.is_nested(column.type):
        try:
            values = pc.cast(column, pa.float64()).to_numpy()
        except pa.ArrowException:
            values = np.array([_number(value) for value in column.to_pylist()])
        odd = np.flatnonzero(~np.isfinite(values))
        if not len(odd):
            return values
        held = shown(column[int(odd[0])].as_py())
        raise UserError(f"row {odd[0]}: column {path!r} holds {held}, not a number; drop the row or mend it")
    raise UserError(f"column {path!r} holds {column.type}, not numbers")


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")
