"""Users' choices in which repeats of one count once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.rankings import choices_in_order
from torchrl_maxmin.preferences.judgements import (
    Judgements,
    codes_of_choices,
    codes_of_differences,
    count_once,
)

__all__ = ["judged_choices", "merged_choices"]


def judged_choices(
    differences: Tensor,
    user_offsets: Tensor,
    row_weights: Tensor | None = None,
    judgements: np.ndarray | Tensor | None = None,
    choice_offsets: Tensor | None = None,
) -> tuple[PairChoices, Judgements, np.ndarray]:
    """Make choices of rows of features, one that repeats another of its judgement left out.

    Args:
        differences: features(chosen) - features(rejected) [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        row_weights: how much each pair counts [P].
        judgements: what each pair follows from [P]; without them, equal rows of one user, and rows that are
            opposite, are one judgement. With them, only where they say so.
        choice_offsets: int64 [C + 1], the rows of a choice, which have one chosen item; None makes every pair
            a choice of its own, but for those of rankings that ``judgements`` name, see
            :func:`~torchrl_maxmin.clustering.rankings.choices_in_order`.

    Returns:
        The choices, at most C of them; which of the given ones they stand for; and the rows that they are.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
        >>> choices, found, rows = judged_choices(x, torch.tensor([0, 3, 4]))
        >>> choices.differences.tolist(), choices.user_offsets.tolist(), found.num_repeats
        ([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], [0, 2, 3], 2)
        >>> choices.row_weights
        tensor([0.6667, 0.3333, 1.0000])
    """
    rows = differences.float() if differences.dtype == torch.bfloat16 else differences
    codes = codes_of_differences(rows.detach().cpu().numpy())
    given = None if judgements is None else torch.as_tensor(np.unique(judgements, return_inverse=True)[1])
    choices = PairChoices(differences, user_offsets, row_weights, given, choice_offsets)
    if given is not None and choice_offsets is None:
        choice_offsets = choices_in_order(rows, choices.row_users, given)
        choices = replace(choices, choice_offsets=choice_offsets)
    found = count_once(
        choices.choice_users.numpy(),
        codes if choice_offsets is None else codes_of_choices(codes, choice_offsets.numpy()),
        None if choices.choice_weights is None else choices.choice_weights.numpy(),
        None if choices.choice_judgements is None else choices.choice_judgements.numpy(),
        stated=True,
    )
    kept = found.rows(None if choice_offsets is None else choice_offsets.numpy())
    return merged_choices(choices, found), found, kept


def merged_choices(choices: PairChoices, found: Judgements) -> PairChoices:
    """Leave choices out that say what an earlier one of their judgement says, which counts for them.

    Args:
        choices: C of them.
        found: which of them are one judgement.
    """
    ids = None if found.ids is None else choices.at_rows(torch.from_numpy(np.asarray(found.ids)))
    if len(found.first) == len(choices.choice_users):
        weights = choices.row_weights
        if found.num_repeats:
            weights = choices.at_rows(torch.from_numpy(np.asarray(found.weights, np.float32)))
        return replace(choices, row_weights=weights, judgements=ids)
    kept = torch.zeros(len(choices.choice_users), dtype=torch.bool)
    kept[found.first] = True
    alone = replace(choices, row_weights=None, judgements=ids).keep_rows(choices.at_rows(kept))
    merged = found.merged_weights
    weights = None if merged is None else alone.at_rows(torch.from_numpy(merged).float())
    return replace(alone, row_weights=weights)
