"""Linear mixtures fitted without some users, and what they say of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from torchrl_maxmin.rewards.choices import PairChoices
from torchrl_maxmin.rewards.linear_em import LinearMixture, fit_linear_mixture

__all__ = [
    "LeftOutUsers",
    "choose_penalty",
    "fit_choices",
    "leave_users_out",
    "match_groups",
    "user_folds",
]


@dataclass(frozen=True)
class LeftOutUsers:
    """Every user as a mixture sees them that was fitted without them.

    Attributes:
        posterior: [U, K] float64; the folds' groups are matched to one another.
        log_likelihood: [U] float64.
    """

    posterior: Tensor
    log_likelihood: Tensor


def user_folds(num_users: int, num_folds: int, seed: int) -> list[Tensor]:
    """Cut the users into random parts of like size: sorted indices, each user in one part."""
    order = np.random.default_rng(seed).permutation(num_users)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, min(num_folds, num_users))]


def fit_choices(choices: PairChoices, num_groups: int, seed: int, **fit: Any) -> LinearMixture:
    """Fit a mixture with starts drawn from ``seed``."""
    return fit_linear_mixture(
        choices.differences,
        choices.user_offsets,
        num_groups,
        row_weights=choices.row_weights,
        generator=torch.Generator().manual_seed(seed),
        **fit,
    )


def leave_users_out(
    choices: PairChoices,
    num_groups: int,
    folds: list[Tensor],
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    **fit: Any,
) -> LeftOutUsers:
    """Fit a mixture without each fold, and score the fold's users with it.

    Args:
        choices: all users.
        num_groups: K.
        folds: indices of the users left out each time; together all users.
        seed: of the starts, the same in every fold.
        advance: called after every fit.
        **fit: passed to :func:`~torchrl_maxmin.rewards.linear.fit_linear_mixture`.
    """
    num_users = len(choices.user_offsets) - 1
    posterior = torch.zeros(num_users, num_groups, dtype=torch.float64)
    log_likelihood = torch.zeros(num_users, dtype=torch.float64)
    reference: Tensor | None = None
    for fold in folds:
        inside = torch.ones(num_users, dtype=torch.bool)
        inside[fold] = False
        mixture = fit_choices(choices.take_users(inside.nonzero().flatten()), num_groups, seed, **fit)
        outside = choices.take_users(fold)
        data = outside.differences, outside.user_offsets, outside.row_weights
        reference = mixture.weight if reference is None else reference
        order = match_groups(mixture.weight, reference)
        posterior[fold] = mixture.posterior(*data)[:, order].double()
        log_likelihood[fold] = mixture.user_log_likelihood(*data).double()
        advance()
    return LeftOutUsers(posterior, log_likelihood)


def choose_penalty(
    choices: PairChoices, num_groups: int, folds: list[Tensor], candidates: Sequence[float], **settings: Any
) -> tuple[float, LeftOutUsers]:
    """The penalty under which left-out users are likeliest, and these users as it sees them.

    Args:
        choices: all users.
        num_groups: K.
        folds: as in :func:`leave_users_out`.
        candidates: penalties to try, in the units of the fit.
        **settings: passed to :func:`leave_users_out`.
    """
    tried = {l2: leave_users_out(choices, num_groups, folds, l2=l2, **settings) for l2 in candidates}
    best = max(tried, key=lambda l2: tried[l2].log_likelihood.sum().item())
    return best, tried[best]


def match_groups(weight: Tensor, reference: Tensor) -> Tensor:
    """The order of the rows of ``weight`` [K, D] that points most where ``reference`` [K, D] does."""
    cosine = (
        torch.nn.functional.normalize(reference.double(), dim=-1)
        @ torch.nn.functional.normalize(weight.double(), dim=-1).T
    )
    return torch.from_numpy(linear_sum_assignment(cosine.numpy(), maximize=True)[1])
