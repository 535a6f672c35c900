"""Users who choose with more or less noise: likelihoods with every user's scale summed out.

People of one taste differ in how decidedly they choose. A second group of the same taste at another scale
would explain that, too; where the scale is a matter of each user's own, groups explain tastes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices

__all__ = ["SCALES", "log_likelihood_with", "log_prior_of_scales", "scaled_log_likelihood"]

#: Factors on a group's reward that a user's own may have.
SCALES = (0.125, 0.35, 0.7, 1.0, 1.6, 3.0)
_ROUNDS = 30


def scaled_log_likelihood(choices: PairChoices, weight: Tensor) -> Tensor:
    """Log-likelihood [U, K, A] in float64 of every user's choices by heads [K, D] at :data:`SCALES`."""
    return choices.user_log_likelihood(weight.double(), SCALES)


def log_prior_of_scales(scaled: Tensor, log_prior: Tensor) -> Tensor:
    """Fit how often each group, and each scale in any group, is met: log of a table [K, A].

    Args:
        scaled: of the users to fit to [U, K, A].
        log_prior: log mixing weights [K], to begin at.

    Example:
        >>> import torch
        >>> scaled = torch.zeros(4, 1, len(SCALES), dtype=torch.float64)
        >>> scaled[:, 0, 3] = 50.0  # everybody's is 1
        >>> round(log_prior_of_scales(scaled, torch.zeros(1))[0, 3].exp().item(), 2)
        0.98
    """
    num_scales = scaled.shape[-1]
    groups = log_prior.double().log_softmax(-1)
    scales = torch.full_like(scaled[0, 0], 1.0 / num_scales).log()
    for _ in range(_ROUNDS):
        joint = scaled + groups[:, None] + scales
        shares = joint.flatten(1).softmax(-1).view_as(joint).sum(0)
        groups, scales = (_smoothed(mass) for mass in (shares.sum(1), shares.sum(0)))
    return groups[:, None] + scales


def _smoothed(mass: Tensor) -> Tensor:
    """Log shares of masses, with a tenth of a user over them all."""
    mass = mass + 0.1 / len(mass)
    return (mass / mass.sum()).log()


def log_likelihood_with(scaled: Tensor, log_prior: Tensor, known: Tensor | None = None) -> Tensor:
    """Log-likelihood [U] of users' choices, group and scale summed out.

    Args:
        scaled: of the choices [U, K, A].
        log_prior: log of a table [K, A].
        known: that of other choices of the same users [U, K, A], which say more of group and scale.
    """
    before = log_prior.expand_as(scaled) if known is None else log_prior + known
    before = before.flatten(1).log_softmax(-1)
    return torch.logsumexp(before + scaled.flatten(1), -1)
