"""Assignment of new users to groups, from their first pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrl_maxmin.clustering.em import posterior
from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.clustering.luce import sum_by_segment

__all__ = ["UserAssignment", "assign_user", "assign_users"]


@dataclass(frozen=True)
class UserAssignment:
    """Users' posterior over groups, and how it formed.

    Attributes:
        posterior: after all of a user's pairs [U, K].
        trajectory: after each pair, of the user's pairs up to it [P, K].
        log_likelihood: by group, of the user's pairs up to each [P, K].
    """

    posterior: Tensor
    trajectory: Tensor
    log_likelihood: Tensor

    @property
    def groups(self) -> Tensor:
        """The likeliest group of every user: int64 [U]."""
        return self.posterior.argmax(-1)


def assign_users(mixture: LinearMixture, differences: Tensor, user_offsets: Tensor) -> UserAssignment:
    """Assign new users to the groups of a fitted mixture, in float64.

    Args:
        mixture: the fit.
        differences: features(chosen) - features(rejected), scaled as in the fit [P, D].
        user_offsets: int64 [U + 1], rows of a user side by side in the order they were answered.
            A user without pairs gets the mixing weights.
    """
    margins = differences.double() @ mixture.weight.double().T
    log_choice = torch.nn.functional.logsigmoid(margins)
    log_prior = mixture.log_prior.double()
    counts = user_offsets.diff()
    running = torch.cat([torch.zeros(1, log_choice.shape[1]).double(), log_choice.cumsum(0)])
    log_likelihood = running[1:] - running[user_offsets[:-1]].repeat_interleave(counts, 0)
    by_user = sum_by_segment(log_choice, user_offsets)
    final, each = (posterior(sums, log_prior).responsibilities for sums in (by_user, log_likelihood))
    return UserAssignment(final, each, log_likelihood)


def assign_user(mixture: LinearMixture, differences: Tensor) -> UserAssignment:
    """Assign one new user, see :func:`assign_users`; its ``posterior`` is [1, K].

    Args:
        mixture: the fit.
        differences: of their pairs in the order they were answered [n, D].

    Example:
        >>> import torch
        >>> heads = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> mixture = LinearMixture(heads, torch.tensor([0.8, 0.2]).log(), torch.ones(0, 2), 0.0)
        >>> found = assign_user(mixture, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
        >>> [round(p, 2) for p in found.trajectory[:, 1].tolist()]  # 0.2 before the first pair
        [0.65, 0.93]
    """
    return assign_users(mixture, differences, torch.tensor([0, len(differences)]))
