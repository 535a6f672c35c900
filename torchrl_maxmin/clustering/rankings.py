"""Rankings of several items in place of pairs: a Plackett-Luce mixture over users.

Pairs alone say little of which kinds of people there are: without features, comparisons of two do
not identify the types, rankings of three do (Chidambaram et al., arXiv 2405.15065).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.distinct import ranges
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.luce import log_choices, offsets_of, sum_by_segment

__all__ = ["choices_in_order", "choices_of_rankings", "fit_ranking_mixture", "ranking_log_likelihood"]


def _stages(ranking_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take rankings apart: every item but the last was chosen over each of those after it.

    Returns:
        The chosen and the other item of every row [P], and the rows of a choice [C + 1].
    """
    sizes = ranking_offsets.diff()
    if (sizes < 1).any():
        raise ValueError("a ranking needs at least one item; drop empty rankings")
    last = torch.zeros(int(ranking_offsets[-1]), dtype=torch.bool)
    last[ranking_offsets[1:] - 1] = True
    chosen = (~last).nonzero().flatten()
    others = ranking_offsets[1:].repeat_interleave(sizes)[chosen] - chosen - 1
    return chosen.repeat_interleave(others), ranges(chosen + 1, others), offsets_of(others)


def choices_of_rankings(item_features: Tensor, ranking_offsets: Tensor, user_offsets: Tensor) -> PairChoices:
    """Choices that rankings consist of, n - 1 for n items (Plackett, 1975).

    Args:
        item_features: [N, D], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1], the items of a ranking.
        user_offsets: int64 [U + 1], the rankings of a user.

    Raises:
        ValueError: for a ranking without items.

    Example:
        >>> import torch
        >>> items = torch.tensor([[3.0], [2.0], [0.0]])
        >>> choices = choices_of_rankings(items, torch.tensor([0, 3]), torch.tensor([0, 1]))
        >>> choices.differences.flatten().tolist(), choices.choice_offsets.tolist()
        ([1.0, 3.0, 2.0], [0, 2, 3])
    """
    chosen, others, choice_offsets = _stages(ranking_offsets)
    sizes = ranking_offsets.diff()
    rankings = torch.arange(len(sizes)).repeat_interleave(sizes * (sizes - 1) // 2)
    rows = offsets_of(sizes * (sizes - 1) // 2)[user_offsets]
    differences = item_features[chosen] - item_features[others]
    return PairChoices(differences, rows, None, rankings, choice_offsets)


def choices_in_order(differences: Tensor, users: Tensor, judgements: Tensor) -> Tensor | None:
    """Find rankings among rows that say what they follow from, and the choices that they consist of.

    The rows of a ranking of n items are all its n (n - 1) / 2 pairs: the best item over each after it, then
    the second one over each after it, and so on. That they are is read off the features: the difference of
    two items' rows must be the row of these two.

    Args:
        differences: features(chosen) - features(other) [P, D].
        users: of every row [P], rising.
        judgements: what each row follows from [P].

    Returns:
        Rows of a choice, int64 [C + 1], and every row that is in no ranking a choice of its own; None where
        there is no ranking of three items or more.

    Example:
        >>> import torch
        >>> items = torch.tensor([[3.0, 1.0], [2.0, 0.0], [0.0, 5.0]])
        >>> rows = torch.stack([items[0] - items[1], items[0] - items[2], items[1] - items[2]])
        >>> choices_in_order(rows, torch.zeros(3), torch.tensor([7, 7, 7])).tolist()
        [0, 2, 3]
    """
    change = torch.ones(len(users), dtype=torch.bool)
    change[1:] = (users[1:] != users[:-1]) | (judgements[1:] != judgements[:-1])
    starts = change.nonzero().flatten()
    sizes = torch.cat([starts[1:], starts.new_tensor([len(users)])]) - starts
    begins = torch.ones(len(users), dtype=torch.bool)
    for size in sizes.unique().tolist():
        n = round((1 + (1 + 8 * size) ** 0.5) / 2)
        if size < 3 or n * (n - 1) // 2 != size:
            continue
        rows = ranges(starts[sizes == size], sizes[sizes == size]).view(-1, size)
        first, second = torch.triu_indices(n, n, 1)
        x = torch.cat([torch.zeros_like(differences[rows[:, :1]]), differences[rows[:, : n - 1]]], 1).double()
        expected = x[:, second] - x[:, first]
        error = (differences[rows].double() - expected).abs().amax((1, 2))
        ranked = rows[error <= 1e-4 * x.abs().amax((1, 2)) + 1e-9]
        begins[ranked] = False
        begins[ranked[:, (second == first + 1).nonzero().flatten()]] = True
    if begins.all():
        return None
    return torch.cat([begins.nonzero().flatten(), torch.tensor([len(users)])])


def ranking_log_likelihood(scores: Tensor, ranking_offsets: Tensor) -> Tensor:
    """Plackett-Luce log-likelihood of rankings: [R, K], differentiable in the scores.

    log p = sum_i (s_i - log sum_{j >= i} exp s_j), items from best to worst (Plackett, 1975).

    Args:
        scores: rewards of items [N, K], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1].

    Raises:
        ValueError: for a ranking without items.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0], [0.0]])  # two items: Bradley-Terry
        >>> round(ranking_log_likelihood(scores, torch.tensor([0, 2])).exp().item(), 4)  # sigmoid(1)
        0.7311
    """
    chosen, others, choice_offsets = _stages(ranking_offsets)
    log_choice = log_choices(scores[chosen] - scores[others], choice_offsets)
    return sum_by_segment(log_choice, offsets_of(ranking_offsets.diff() - 1))


def fit_ranking_mixture(
    item_features: Tensor, ranking_offsets: Tensor, user_offsets: Tensor, num_groups: int, **settings: Any
) -> LinearMixture:
    """Fit K linear rewards to rankings by EM with exact M-steps; the best of several starts wins.

    With rankings of two items this is :func:`~torchrl_maxmin.clustering.fit_linear_mixture` with
    ``m_step="exact"`` on the differences of their features.

    Args:
        item_features: standardised [N, D], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1], the items of a ranking.
        user_offsets: int64 [U + 1], the rankings of a user.
        num_groups: K.
        **settings: of :func:`~torchrl_maxmin.clustering.fit_choices`, a choice being one of the n - 1 that a
            ranking of n consists of; by default EM stops once its objective rises by less than 1e-5.

    Returns:
        The fit; its heads score items, so it takes pairs of new users too.

    Raises:
        ValueError: for an unknown assignment, or a ranking without items.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> items = torch.randn(120, 3, 2, generator=generator)  # 20 users rank 6 times 3 items
        >>> utility = torch.cat([items[:60, :, 0], items[60:, :, 1]])  # two tastes
        >>> best_first = utility.argsort(1, descending=True).unsqueeze(2).expand(-1, -1, 2)
        >>> items = items.gather(1, best_first).flatten(0, 1)
        >>> rankings, users = torch.arange(121) * 3, torch.arange(21) * 6
        >>> groups = fit_ranking_mixture(items, rankings, users, 2, generator=generator).assignments
        >>> bool((groups[:10] == groups[0]).all() and (groups[10:] == groups[10]).all())
        True
    """
    choices = choices_of_rankings(item_features, ranking_offsets, user_offsets)
    return fit_choices(choices, num_groups, **({"convergence_tolerance": 1e-5} | settings), m_step="exact")
