"""Users' choices in which repeats of a pair count once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.linear import PairChoices
from torchrl_maxmin.preferences.judgements import Judgements, codes_of_differences, count_once

__all__ = ["judged_choices", "merged_choices"]


def judged_choices(
    differences: Tensor,
    user_offsets: Tensor,
    row_weights: Tensor | None = None,
    judgements: np.ndarray | Tensor | None = None,
) -> tuple[PairChoices, Judgements]:
    """Make choices of rows of features, a row that repeats another of its judgement left out.

    Args:
        differences: features(chosen) - features(rejected) [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        row_weights: how much each pair counts [P].
        judgements: what each pair follows from [P]; without them, equal rows of one user, and rows that are
            opposite, are one judgement. With them, only where they say so.

    Returns:
        The choices, at most P of them, and which rows they stand for.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
        >>> choices, found = judged_choices(x, torch.tensor([0, 3, 4]))
        >>> choices.differences.tolist(), choices.user_offsets.tolist(), found.num_repeats
        ([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], [0, 2, 3], 2)
        >>> choices.row_weights
        tensor([0.6667, 0.3333, 1.0000])
    """
    rows = differences.float() if differences.dtype == torch.bfloat16 else differences
    ids = None if judgements is None else np.unique(np.asarray(judgements), return_inverse=True)[1]
    found = count_once(
        torch.repeat_interleave(user_offsets.diff()).numpy(),
        codes_of_differences(rows.detach().cpu().numpy()),
        None if row_weights is None else row_weights.numpy(),
        ids,
        stated=True,
    )
    return merged_choices(PairChoices(differences, user_offsets, row_weights), found), found


def merged_choices(choices: PairChoices, found: Judgements) -> PairChoices:
    """Leave rows out that say what an earlier one of their judgement says, which counts for them.

    Args:
        choices: P rows.
        found: which of them are one judgement.
    """
    ids = None if found.ids is None else torch.from_numpy(np.asarray(found.ids))
    if len(found.first) == len(choices.differences):
        weights = choices.row_weights
        if found.num_repeats:
            weights = torch.from_numpy(np.asarray(found.weights, np.float32))
        return PairChoices(choices.differences, choices.user_offsets, weights, ids)
    kept = torch.zeros(len(choices.differences), dtype=torch.bool)
    kept[found.first] = True
    merged = found.merged_weights
    alone = PairChoices(choices.differences, choices.user_offsets, None, ids).keep_rows(kept)
    weights = None if merged is None else torch.from_numpy(merged).float()
    return PairChoices(alone.differences, alone.user_offsets, weights, alone.judgements)
