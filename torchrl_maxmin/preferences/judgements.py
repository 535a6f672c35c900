"""Find which pairs are one judgement: pairs of one ranking, and pairs that one user was asked again.

Rows that repeat one another are no evidence of their own: counted each, they carry groups that do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Judgements", "PairCodes", "codes_of_choices", "codes_of_differences", "count_once"]

_BLOCK_ROWS = 8192
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_SIDE = np.uint64(0xD1B54A32D192ED03)


class PairCodes(NamedTuple):
    """Codes by which equal pairs are known.

    Attributes:
        code: int64 [P], the same for a pair and for the pair the other way round.
        side: bool [P], which way round.
    """

    code: np.ndarray
    side: np.ndarray


def codes_of_differences(differences: np.ndarray) -> PairCodes:
    """Code pairs by their features, exactly; rows of zeros, which say nothing of a pair, all differ.

    Args:
        differences: features(chosen) - features(rejected) [P, D] of floats.

    Example:
        >>> codes = codes_of_differences(np.array([[0.0, 1.0], [-0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))
        >>> bool(codes.code[0] == codes.code[1]), codes.side.tolist()[:2], len(set(codes.code))
        (True, [True, False], 3)
    """
    count = len(differences)
    code, side = np.empty(count, np.int64), np.empty(count, bool)
    for start in range(0, count, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        rows = differences[part]
        there = rows != 0
        first = rows[np.arange(len(rows)), there.argmax(1)]
        side[part] = first >= 0
        upright = np.where(side[part, None], rows, -rows) + 0.0  # -0.0 becomes 0.0
        code[part] = [hash(row.tobytes()) for row in upright]
        nothing = np.flatnonzero(~there.any(1))
        code[start + nothing] = start + nothing
    return PairCodes(code, side)


def codes_of_choices(codes: PairCodes, choice_offsets: np.ndarray) -> PairCodes:
    """Code choices among several items by the pairs that they consist of, in any order.

    Args:
        codes: of the pairs [P].
        choice_offsets: int64 [C + 1], the pairs of a choice.

    Returns:
        Codes [C]. A choice of one pair keeps the pair's; one of several has no other way round.
    """
    starts, sizes = choice_offsets[:-1], np.diff(choice_offsets)
    with np.errstate(over="ignore"):
        mixed = (codes.code.view(np.uint64) ^ np.where(codes.side, _SIDE, np.uint64(0))) * _SPREAD
        mixed = np.add.reduceat(mixed ^ (mixed >> np.uint64(29)), starts)
    alone = sizes == 1
    code = np.where(alone, codes.code[starts], mixed.view(np.int64))
    return PairCodes(code, np.where(alone, codes.side[starts], True))


@dataclass(frozen=True, eq=False)
class Judgements:
    """Choices as judgements; a pair is a choice between two.

    Attributes:
        ids: what each choice follows from [C]; choices of one judgement are held out together. None where
            each follows from one of its own.
        weights: how much each choice counts [C] float64, repeats of a judgement together once; None where
            each counts once.
        num_repeats: choices that repeat an earlier one of their user, pairs either way round, and would
            count again.
        num_contradicted: different pairs that their user chose both ways; halved ties are none.
        first: the first choice [R], ascending, that says what each choice [C] says, of the same judgement.
        same: where in ``first`` each choice's is [C].
    """

    ids: np.ndarray | None
    weights: np.ndarray | None
    num_repeats: int
    num_contradicted: int
    first: np.ndarray
    same: np.ndarray

    def rows(self, choice_offsets: np.ndarray | None) -> np.ndarray:
        """Rows [P'] of the choices ``first``.

        Args:
            choice_offsets: int64 [C + 1], the rows of each choice; None where each has one.
        """
        if choice_offsets is None:
            return self.first
        kept = np.zeros(len(choice_offsets) - 1, bool)
        kept[self.first] = True
        return np.flatnonzero(np.repeat(kept, np.diff(choice_offsets)))

    @property
    def merged_weights(self) -> np.ndarray | None:
        """How much each of the choices ``first`` counts for itself and those that say the same [R]."""
        if self.weights is None:
            return None
        total = np.bincount(self.same, self.weights)
        total[np.abs(total - 1) < 1e-9] = 1.0  # m times 1/m
        return None if (total == 1).all() else total


def count_once(
    users: np.ndarray,
    codes: PairCodes,
    weights: np.ndarray | None = None,
    ids: np.ndarray | None = None,
    *,
    stated: bool = False,
) -> Judgements:
    """Find choices that repeat one another, and let them count as one judgement.

    Repeats that agree count as one of them does; where they contradict each other, each way counts by its
    share, as in a tie. Weights that sum to no more than 1 over the repeats stay as they are: the two orders
    of a halved tie, or repeats that were weighted before.

    Args:
        users: user of each choice [C].
        codes: by which equal choices are known.
        weights: how much each choice counts [C]; None counts each once.
        ids: what each choice follows from [C], of its own user.
        stated: whether the data state ``ids``, so that equal choices of two judgements are no repeats.

    Example:
        >>> codes = PairCodes(np.array([5, 5, 5, 6]), np.array([True, True, False, True]))
        >>> found = count_once(np.array([0, 0, 0, 0]), codes)
        >>> found.weights.round(2).tolist(), found.ids.tolist(), found.merged_weights.round(2).tolist()
        ([0.33, 0.33, 0.33, 1.0], [0, 0, 0, 3], [0.67, 0.33, 1.0])
    """
    count = len(users)
    which, first = _distinct([users, codes.code, *([ids] if stated and ids is not None else [])])
    if len(first) == count:
        rows = np.arange(count)
        return Judgements(ids, weights, 0, 0, rows, rows)
    given = np.ones(count) if weights is None else weights.astype(np.float64)
    total, largest = np.bincount(which, given), np.zeros(len(first))
    np.maximum.at(largest, which, given)
    most = np.maximum(1.0, largest)
    too_much = total > most * (1 + 1e-6)  # a margin for weights that were rounded to float32
    scaled = np.where(too_much, most / total, 1.0)[which] * given
    same, earliest = _distinct([which, codes.side])
    both = np.bincount(which[earliest], minlength=len(first)) > 1
    return Judgements(
        ids if stated and ids is not None else _joined(users, which, ids),
        scaled if weights is not None or bool(too_much.any()) else None,
        num_repeats=int((np.bincount(which) - 1)[too_much].sum()),
        num_contradicted=int((both & (largest >= 1)).sum()),
        first=earliest,
        same=same,
    )


def _distinct(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row [P] among the distinct ones, and the first row [R] of each, ascending."""
    order = np.lexsort(keys[::-1])  # stable: the first row of each comes first
    changes = [key[order][1:] != key[order][:-1] for key in keys]
    begins = np.append(True, np.logical_or.reduce(changes))[: len(order)]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.cumsum(begins) - 1
    first = order[begins]
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    return place[rank], np.sort(first)


def _joined(users: np.ndarray, which: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """The smallest id [P] of the judgements that repeats make one with each row's."""
    from scipy.sparse import coo_array  # only where a pair was asked again
    from scipy.sparse.csgraph import connected_components

    count = len(users)
    own = np.arange(count) if ids is None else np.asarray(ids)
    sides = [_distinct(keys) for keys in ([users, own], [which])]
    edges = np.concatenate([first[row] for row, first in sides])
    graph = coo_array((np.ones(2 * count, bool), (np.tile(np.arange(count), 2), edges)), (count, count))
    _, part = connected_components(graph, directed=False)
    smallest = np.full(part.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, part, own)
    return smallest[part]
