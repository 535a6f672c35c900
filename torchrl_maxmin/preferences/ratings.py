"""Scores of single responses as pairs: those that one user gave, compared with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences.columns import Roles, cell, labels_of, read_column, rows_of, shown
from torchrl_maxmin.preferences.judgements import Comparison, Judgement, LoadOptions
from torchrl_maxmin.preferences.transcripts import split_prompt

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["pairs_within", "ratings", "scores"]

_READ_ROWS = 1_000
_SAFETY = {"no": 1.0, "unsure": 0.5, "yes": 0.0}  # "is the response harmful?"
_UNSURE_MARGIN = 0.5  # an unsure rating ties with both others

Compose = Callable[[dict[str, Any]], tuple[Any, Any]]


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
    waiting: list[tuple[np.ndarray, Judgement]] = []
    size = 0
    for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        mine = values[rows]
        pairs, total = pairs_within(mine, margin, keep_ties, options.max_pairs, generator)
        used = np.unique([place for pair in pairs for place in pair[:2]]).astype(np.int64)
        local = {place: i for i, place in enumerate(used.tolist())}
        pairs = [Comparison(local[pair.better], local[pair.worse], pair.tie) for pair in pairs]
        _, ranks = np.unique(-mine[used], return_inverse=True)
        ties = 0 if keep_ties else len(rows) * (len(rows) - 1) // 2 - total
        judgement = Judgement(int(rows[0]), "", (), ranks.tolist(), pairs, ties, total - len(pairs))
        waiting.append((rows[used], judgement))
        size += len(used)
        if size >= _READ_ROWS:
            yield from _with_texts(table, roles, waiting, compose)
            waiting, size = [], 0
    yield from _with_texts(table, roles, waiting, compose)


def _with_texts(
    table: Dataset, roles: Roles, waiting: list[tuple[np.ndarray, Judgement]], compose: Compose
) -> Iterator[Judgement]:
    """The judgements with the texts of their rows, read in one go."""
    cells = rows_of(table, roles, np.concatenate([rows for rows, _ in waiting]) if waiting else [])
    for rows, judgement in waiting:
        if not len(rows):
            yield judgement
            continue
        composed = [compose(next(cells)) for _ in rows]
        columns = [roles.responses[-1]] * len(rows)
        prompt, responses = split_prompt(
            composed[0][0], [response for _, response in composed], judgement.row, columns
        )
        yield judgement._replace(prompt=prompt, responses=responses)


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
    import pyarrow as pa
    import pyarrow.compute as pc

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
