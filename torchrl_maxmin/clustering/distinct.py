"""Choices that stand many times in the data: items that repeat, ratings, one-hot features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.luce import offsets_of

__all__ = ["DistinctChoices", "distinct_choices", "ranges"]

#: Choices that stand less often than this on average are worked on one by one: nothing is gained.
WORTHWHILE = 2.0
_BLOCK_ROWS = 8192
_MIX = 0x9E3779B97F4A7C15


class DistinctChoices(NamedTuple):
    """Choices, each once, whoever made them.

    Attributes:
        differences: their rows [P', D].
        choice_offsets: int64 [C' + 1], the rows of each; None where each has one.
        index: which of them every choice of the data is [C].
    """

    differences: Tensor
    choice_offsets: Tensor | None
    index: Tensor

    def sum_by_choice(self, shares: Tensor) -> Tensor:
        """Sum shares of the data's choices [C, K] by what was chosen [C', K]."""
        count = len(self.differences) if self.choice_offsets is None else len(self.choice_offsets) - 1
        return shares.new_zeros(count, shares.shape[1]).index_add_(0, self.index, shares)


def distinct_choices(differences: Tensor, choice_offsets: Tensor | None = None) -> DistinctChoices | None:
    """Find the distinct choices; None where they hardly repeat.

    Args:
        differences: [P, D].
        choice_offsets: int64 [C + 1]; None makes every row a choice of its own. Rows of a choice may stand in
            any order.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        >>> found = distinct_choices(x)
        >>> found.differences.tolist(), found.index.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1, 0, 0])
    """
    codes = _row_codes(differences)
    if choice_offsets is not None:
        codes = np.add.reduceat(codes, choice_offsets[:-1].numpy())
    _, first, index = np.unique(codes, return_index=True, return_inverse=True)
    if len(first) * WORTHWHILE > len(codes):
        return None
    order = np.argsort(first)  # as they appear in the data
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    kept = torch.from_numpy(first[order])
    where = torch.from_numpy(place[index])
    if choice_offsets is None:
        return DistinctChoices(differences[kept], None, where)
    sizes = choice_offsets.diff()[kept]
    return DistinctChoices(differences[ranges(choice_offsets[kept], sizes)], offsets_of(sizes), where)


def ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """Whole numbers from each start [S], so many as it counts [S], side by side."""
    offsets = offsets_of(counts)
    each = torch.arange(int(offsets[-1]), device=starts.device)
    return each + (starts - offsets[:-1]).repeat_interleave(counts)


def _row_codes(differences: Tensor) -> np.ndarray:
    """A number [P] for every row, equal for equal rows; sums of them tell sets of rows apart."""
    codes = np.empty(len(differences), np.uint64)
    for start in range(0, len(differences), _BLOCK_ROWS):
        block = (differences[start : start + _BLOCK_ROWS].float() + 0.0).numpy()  # -0.0 becomes 0.0
        codes[start : start + len(block)] = [hash(row.tobytes()) & 0xFFFFFFFFFFFFFFFF for row in block]
    with np.errstate(over="ignore"):  # mixed, so that sums do not cancel (splitmix64)
        codes += np.uint64(_MIX)
        codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return codes ^ (codes >> np.uint64(31))
