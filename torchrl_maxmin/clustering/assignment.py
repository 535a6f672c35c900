"""Assignment of new users to groups, from their first choices: pairs, best of several, rankings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrl_maxmin.clustering.em import posterior
from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.clustering.luce import log_choices, sum_by_segment

__all__ = ["UserAssignment", "assign_user", "assign_users"]


@dataclass(frozen=True)
class UserAssignment:
    """Users' posterior over groups, and how it formed.

    Attributes:
        posterior: after all of a user's choices [U, K].
        trajectory: after each choice, of the user's choices up to it [C, K]; C = P where all are pairs.
        log_likelihood: by group, of the user's choices up to each [C, K].
    """

    posterior: Tensor
    trajectory: Tensor
    log_likelihood: Tensor

    @property
    def groups(self) -> Tensor:
        """The likeliest group of every user: int64 [U]."""
        return self.posterior.argmax(-1)


def assign_users(
    mixture: LinearMixture,
    differences: Tensor,
    user_offsets: Tensor,
    *,
    choice_offsets: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> UserAssignment:
    """Assign new users to the groups of a fitted mixture, in float64.

    Args:
        mixture: the fit.
        differences: features(chosen) - features(rejected), scaled as in the fit [P, D].
        user_offsets: int64 [U + 1], rows of a user side by side in the order they were answered.
            A user without pairs gets the mixing weights.
        choice_offsets: int64 [C + 1], the rows of a choice among several items; a ranking of n items is n - 1
            of them (:func:`~torchrl_maxmin.clustering.rankings.choices_of_rankings` makes both). None makes
            every row a choice between two.
        row_weights: how much the choice of each row counts [P]; a tie is both directions at one half.

    Raises:
        ValueError: if a user begins within a choice.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.clustering.rankings import choices_of_rankings
        >>> mixture = LinearMixture(torch.eye(2), torch.zeros(2).log_softmax(0), torch.ones(0, 2), 0.0)
        >>> items = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])  # one user ranks three, best first
        >>> seen = choices_of_rankings(items, torch.tensor([0, 3]), torch.tensor([0, 1]))
        >>> rows = {"choice_offsets": seen.choice_offsets}
        >>> found = assign_users(mixture, seen.differences, seen.user_offsets, **rows)
        >>> [round(p, 2) for p in found.trajectory[:, 1].tolist()]  # after the best one, and the second
        [0.88, 0.95]
    """
    margins = differences.double() @ mixture.weight.double().T
    log_choice = log_choices(margins, choice_offsets)
    log_prior = mixture.log_prior.double()
    if choice_offsets is not None:
        row_offsets, user_offsets = user_offsets, torch.searchsorted(choice_offsets, user_offsets)
        if not torch.equal(choice_offsets[user_offsets], row_offsets):
            raise ValueError("a user's rows begin within a choice: choices are of one user each")
    if row_weights is not None:
        each = row_weights if choice_offsets is None else row_weights[choice_offsets[:-1]]
        log_choice = log_choice * each.double().unsqueeze(1)
    running = torch.cat([torch.zeros(1, log_choice.shape[1]).double(), log_choice.cumsum(0)])
    counts = user_offsets.diff()
    log_likelihood = running[1:] - running[user_offsets[:-1]].repeat_interleave(counts, 0)
    by_user = sum_by_segment(log_choice, user_offsets)
    final, trajectory = (posterior(sums, log_prior).responsibilities for sums in (by_user, log_likelihood))
    return UserAssignment(final, trajectory, log_likelihood)


def assign_user(
    mixture: LinearMixture, differences: Tensor, choice_offsets: Tensor | None = None
) -> UserAssignment:
    """Assign one new user, see :func:`assign_users`; its ``posterior`` is [1, K].

    Args:
        mixture: the fit.
        differences: of their pairs in the order they were answered [n, D].
        choice_offsets: int64 [C + 1], the rows of a choice; None makes every row one.

    Example:
        >>> import torch
        >>> heads = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> mixture = LinearMixture(heads, torch.tensor([0.8, 0.2]).log(), torch.ones(0, 2), 0.0)
        >>> found = assign_user(mixture, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
        >>> [round(p, 2) for p in found.trajectory[:, 1].tolist()]  # 0.2 before the first pair
        [0.65, 0.93]
    """
    offsets = torch.tensor([0, len(differences)])
    return assign_users(mixture, differences, offsets, choice_offsets=choice_offsets)
