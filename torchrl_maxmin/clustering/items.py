"""Items that repeat in the pairs, and the rank that each group gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lsqr

from torchrl_maxmin.clustering.others import others_mean

__all__ = ["ItemPairs", "item_pairs_of_features", "item_pairs_of_texts", "item_ranks"]

#: An item that stands in fewer pairs has no rank.
FEWEST_PAIRS = 10
#: Items that get a rank, those of the most pairs.
MOST_ITEMS = 500
_BLOCK_ROWS = 8192


class ItemPairs(NamedTuple):
    """Pairs between items that repeat.

    Attributes:
        items: What each item is shown as, or where it stands.
        chosen: Item of each pair's chosen side [P], int64.
        rejected: Of its rejected side [P].
        rows: The pairs [P] that these are.
    """

    items: Sequence[Any]
    chosen: np.ndarray
    rejected: np.ndarray
    rows: np.ndarray


def item_pairs_of_features(differences: np.ndarray, names: Sequence[str]) -> ItemPairs | None:
    """Read the features as items where all pairs are between two of them, one-hot; else None.

    Args:
        differences: features(chosen) - features(rejected) [P, D].
        names: Of the D features.

    Example:
        >>> found = item_pairs_of_features(np.array([[1.0, 0, -1], [-1, 1, 0]]), ["tuna", "eel", "egg"])
        >>> found.chosen.tolist(), found.rejected.tolist()
        ([0, 1], [2, 0])
        >>> item_pairs_of_features(np.array([[1.0, 0.5, -1]]), "abc") is None
        True
    """
    sides = np.empty((2, len(differences)), np.int64)
    for start in range(0, len(differences), _BLOCK_ROWS):
        rows = differences[start : start + _BLOCK_ROWS]
        one_each = ((rows > 0).sum(1) == 1) & ((rows < 0).sum(1) == 1)
        if not (one_each & (rows.max(1) == -rows.min(1))).all():
            return None
        sides[:, start : start + len(rows)] = rows.argmax(1), rows.argmin(1)
    return ItemPairs(names, sides[0], sides[1], np.arange(len(differences)))


def item_pairs_of_texts(chosen: Iterable[str], rejected: Iterable[str], rows: np.ndarray) -> ItemPairs | None:
    """Number the texts of pairs; None where no three of them repeat.

    Args:
        chosen: Preferred text of every pair [P].
        rejected: The other one.
        rows: The pairs that count [P'].

    Returns:
        ``items`` are places where each stands first: 2 * pair, and one more for the rejected side.
    """
    numbers: dict[int, int] = {}
    first: list[int] = []
    kept: list[tuple[int, int]] = []
    wanted = np.zeros(int(rows.max()) + 1, bool)
    wanted[rows] = True
    for row, texts in enumerate(zip(chosen, rejected, strict=True)):
        if row >= len(wanted) or not wanted[row]:
            continue
        pair = []
        for side, text in enumerate(texts):
            number = numbers.setdefault(hash(text), len(numbers))
            if number == len(first):
                first.append(2 * row + side)
            pair.append(number)
        kept.append((pair[0], pair[1]))
    sides = np.array(kept)[np.argsort(np.argsort(rows))]
    if (np.bincount(sides.ravel()) >= FEWEST_PAIRS).sum() < 3:
        return None
    return ItemPairs(first, sides[:, 0], sides[:, 1], np.arange(len(rows)))


def item_ranks(margins: np.ndarray, log_prior: np.ndarray, pairs: ItemPairs) -> list[list[dict[str, Any]]]:
    """Rank items by group: scores whose differences fit the margins best (HodgeRank, least squares).

    Items are ranked that are linked by comparisons, and stand in :data:`FEWEST_PAIRS` pairs.

    Args:
        margins: Of every pair by every head [P, K].
        log_prior: Log shares [K].
        pairs: The items of the pairs.

    Returns:
        By group, all its items by rank: ``item``, ``score`` (mean 0), ``rank`` (1 is what it wants most),
        ``rank_by_others`` and ``difference`` (of ranks: positive where the group puts it higher).

    Example:
        >>> pairs = ItemPairs(["a", "b", "c"], np.array([0, 1] * 10), np.array([1, 2] * 10), np.arange(20))
        >>> found = item_ranks(np.array([[1.0, -2.0], [1.0, -2.0]] * 10), np.log([0.5, 0.5]), pairs)
        >>> [(entry["item"], round(entry["score"], 2), entry["difference"]) for entry in found[1]]
        [('c', 2.0, 2), ('b', 0.0, 0), ('a', -2.0, -2)]
    """
    num_items = len(pairs.items)
    counts = np.bincount(np.concatenate([pairs.chosen, pairs.rejected]), minlength=num_items)
    kept = counts >= FEWEST_PAIRS
    if kept.sum() > MOST_ITEMS:
        kept[np.argsort(-counts, kind="stable")[MOST_ITEMS:]] = False
    between = kept[pairs.chosen] & kept[pairs.rejected]
    chosen, rejected = pairs.chosen[between], pairs.rejected[between]
    size = (num_items, num_items)
    _, part = connected_components(coo_array((np.ones(len(chosen)), (chosen, rejected)), shape=size))
    if not len(chosen):
        return [[] for _ in log_prior]
    largest = part == np.bincount(part[chosen]).argmax()
    there = np.unique(chosen[largest[chosen]].tolist() + rejected[largest[chosen]].tolist())
    index = np.full(num_items, -1)
    index[there] = np.arange(len(there))
    inside = largest[chosen]
    sides = index[chosen[inside]], index[rejected[inside]]
    rows, num_pairs = pairs.rows[between][inside], int(inside.sum())
    signs = np.concatenate([np.ones(num_pairs), -np.ones(num_pairs)])
    places = np.tile(np.arange(num_pairs), 2), np.concatenate(sides)
    graph = coo_array((signs, places), shape=(num_pairs, len(there))).tocsr()
    scores = np.stack(
        [lsqr(graph, margins[rows, k], atol=1e-10, btol=1e-10)[0] for k in range(len(log_prior))]
    )
    scores -= scores.mean(1, keepdims=True)
    ranks, others = (_ranks(each) for each in (scores, others_mean(scores, log_prior)))
    return [
        [
            {
                "item": pairs.items[there[j]],
                "score": float(scores[k, j]),
                "rank": int(ranks[k, j]),
                "rank_by_others": int(others[k, j]),
                "difference": int(others[k, j] - ranks[k, j]),
            }
            for j in np.argsort(ranks[k], kind="stable")
        ]
        for k in range(len(log_prior))
    ]


def _ranks(scores: np.ndarray) -> np.ndarray:
    return stats.rankdata(-scores.round(9), method="min", axis=1)
