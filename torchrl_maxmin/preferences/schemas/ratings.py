"""Scores and ratings of single responses, one row each, as judgements.

All ratings of one user are one scale with one noise a rating. Pairs of them share that noise: taken pair by
pair they are no independent evidence, and carry groups that do not exist. So a user's ratings are dealt into
blocks, each rating into one at most, and each block is one ranking, whose likelihood is Plackett-Luce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import split_prompt
from torchrl_maxmin.preferences.io.columns import (
    Roles,
    cell,
    labels_of,
    read_column,
    rows_of,
    shown,
)
from torchrl_maxmin.preferences.io.table import in_batches
from torchrl_maxmin.preferences.schemas.pairs import (
    Comparison,
    Judgement,
    LoadOptions,
    Origin,
    best_of,
    ranked,
)

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
    import pyarrow.compute as pc
if TYPE_CHECKING:
    from torchrl_maxmin.preferences.io.table import Table

__all__ = ["CHOSEN", "blocks_within", "named", "pairs_within", "rating_notes", "ratings", "scores"]

CHOSEN = "if_chosen"  # a column that marks the one response that was chosen, which is no score

_READ_ROWS = 1_000
_SAFETY = {"no": 1.0, "unsure": 0.5, "yes": 0.0}  # "is the response harmful?"
_UNSURE_MARGIN = 0.5  # an unsure rating ties with both others

Compose = Callable[[dict[str, Any]], tuple[Any, Any]]


def scores(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """One row a response: what a user scored higher over what they scored lower for the same prompt.

    Without prompts, all responses of one user are compared. Ids of items that are numbers are their names.
    """
    values = _numbers(table, roles.verdict[0])
    marked = roles.verdict[0].rpartition(".")[2] == CHOSEN
    if options.lower_is_better:
        if marked:
            raise UserError(f"lower_is_better is about scores, and {CHOSEN} is none; leave it out")
        values = -values
    prompts = labels_of(table, roles.key, "prompt")[0] if roles.key else _hashes(table, roles)
    keys = _in_order(np.stack([users, prompts]))
    (response,) = roles.responses

    def compose(row: dict[str, Any]) -> tuple[Any, Any]:
        return cell(row, roles.prompt[0]) if roles.prompt else "", named(cell(row, response))

    judge = _chosen if marked else _judge_of(options)
    return _within(table, roles, keys, values, options, compose, judge, options.tie_margin)


def named(item: Any) -> Any:
    """A number that stands for an item, as text; anything else as it is."""
    return str(item) if isinstance(item, int) and not isinstance(item, bool) else item


def ratings(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
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

    return _within(table, roles, users, values, options, compose, _judge_of(options), _UNSURE_MARGIN)


def blocks_within(
    values: np.ndarray, margin: float, most: int, generator: np.random.Generator
) -> tuple[list[np.ndarray], int]:
    """Deal items into disjoint blocks of different values, a random item of each value that is left to each.

    Which item of a value a block gets does not depend on the item, so that blocks are independent of each
    other where the ratings are. Takes O(n log n) time.

    Args:
        values: [n].
        margin: values of one block differ by more.
        most: items of a block at most, at least 2; a block with more values is dealt into smaller ones.
        generator: shuffles the items.

    Returns:
        Places of the items of each block of two or more, and how many items are in none.

    Example:
        >>> blocks, alone = blocks_within(np.array([5, 1, 5, 3, 5, 1]), 0.0, 9, np.random.default_rng(0))
        >>> [sorted(np.array([5, 1, 5, 3, 5, 1])[block].tolist()) for block in blocks], alone
        ([[1, 3, 5], [1, 5]], 1)
    """
    shuffled = generator.permutation(len(values))
    order = shuffled[np.argsort(values[shuffled], kind="stable")]
    rising = values[order]
    starts = np.append(0, np.flatnonzero(np.diff(rising)) + 1)
    turn = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    by_turn = np.argsort(turn, kind="stable")  # of one turn: an item of each value, rising
    blocks, alone = [], 0
    for dealt in np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1):
        mine = rising[dealt]
        alike = np.arange(len(mine)) + 1 - np.searchsorted(mine, mine - margin, side="left")
        parts = max(int(alike.max(initial=1)), math.ceil(len(mine) / most))
        for part in range(parts):  # every so-manieth value, so that those of a block are apart
            block = order[dealt[part::parts]]
            if len(block) > 1:
                blocks.append(block)
            else:
                alone += len(block)
    return blocks, alone


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


Found = tuple[np.ndarray, Judgement]  # rows of the table, and a judgement of them without its texts
Judge = Callable[[np.ndarray, np.ndarray, float, LoadOptions, np.random.Generator], Iterator[Found]]


def _judge_of(options: LoadOptions) -> Judge:
    return _pairs if options.ratings == "pairs" else _blocks


def _blocks(
    rows: np.ndarray, values: np.ndarray, margin: float, options: LoadOptions, generator: np.random.Generator
) -> Iterator[Found]:
    """A ranking for every block of one user's ratings."""
    most = (1 + math.isqrt(1 + 8 * options.max_pairs)) // 2  # items that make no more pairs
    blocks, alone = blocks_within(values, margin, most, generator)
    yield rows[:0], Judgement(int(rows[0]), "", (), (), (), alone=alone)
    for block in map(np.sort, blocks):
        yield rows[block], Judgement(int(rows[block[0]]), "", (), *ranked((-values[block]).tolist()))


def _chosen(
    rows: np.ndarray, values: np.ndarray, margin: float, options: LoadOptions, generator: np.random.Generator
) -> Iterator[Found]:
    """The one response that is marked over all others; several make blocks."""
    best = np.flatnonzero(values == values.max())
    if len(best) > 1:
        yield from _blocks(rows, values, margin, options, generator)
    else:
        yield rows, Judgement(int(rows[0]), "", (), *best_of(len(rows), int(best[0])), alone=len(rows) == 1)


def _pairs(
    rows: np.ndarray, values: np.ndarray, margin: float, options: LoadOptions, generator: np.random.Generator
) -> Iterator[Found]:
    """All pairs of one user's ratings up to the cap, as one judgement."""
    keep_ties = options.ties == "halve"
    pairs, total = pairs_within(values, margin, keep_ties, options.max_pairs, generator)
    used = np.unique([place for pair in pairs for place in pair[:2]]).astype(np.int64)
    local = {place: i for i, place in enumerate(used.tolist())}
    pairs = [Comparison(local[pair.better], local[pair.worse], pair.tie) for pair in pairs]
    _, ranks = np.unique(-values[used], return_inverse=True)
    ties = 0 if keep_ties else len(rows) * (len(rows) - 1) // 2 - total
    judgement = Judgement(int(rows[0]), "", (), ranks.tolist(), pairs, ties, total - len(pairs))
    yield rows[used], judgement._replace(pair_by_pair=True)


def _within(
    table: Table,
    roles: Roles,
    keys: np.ndarray,
    values: np.ndarray,
    options: LoadOptions,
    compose: Compose,
    judge: Judge,
    margin: float,
) -> Iterator[Judgement]:
    """The judgements of every key, from the values of its rows."""
    generator = np.random.default_rng(options.seed)
    order = np.argsort(keys, kind="stable")

    def without_texts() -> Iterator[tuple[Found, int]]:
        for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for found in judge(rows, values[rows], margin, options, generator):
                yield found, len(found[0])

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


def _hashes(table: Table, roles: Roles) -> np.ndarray:
    """A number [N] for every prompt, equal for equal prompts; the same for all where there is none."""
    if not roles.prompt:
        return np.zeros(len(table), np.int64)
    cells = rows_of(table, Roles(prompt=roles.prompt))
    return np.fromiter((hash(repr(cell(row, roles.prompt[0]))) for row in cells), np.int64, len(table))


def _numbers(table: Table, path: str) -> np.ndarray:
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


def rating_notes(origin: Origin) -> list[str]:
    """Say what ratings were taken for, where their user has to know."""
    options, left_out = origin.options, origin.beyond_cap
    found = {
        f"{left_out:,} pairs are left out: of one user's ratings (of one prompt) {options.max_pairs} pairs "
        "at most are drawn at random; --max_pairs takes more.": left_out > 0,
        "Pairs of one user's ratings share its noise and are not independent: taken pair by pair they can "
        "carry groups that do not exist; --ratings blocks takes each rating once.": origin.pair_by_pair,
        "Blocks of ratings have no ties, so that --ties halve changes nothing; --ratings pairs takes them.": (
            options.ties,
            options.ratings,
        )
        == ("halve", "blocks"),
    }
    return [note for note, holds in found.items() if holds]
