"""How far a policy and its adversary are from the saddle point, cheap enough to log every iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DualityGap", "duality_gap"]


class DualityGap(NamedTuple):
    """A bound on the distance to the max-min optimum, and whose part of it is what.

    Attributes:
        total: ``g(w) - min_u F_u(pi)``, at least the policy's distance from the optimum.
        policy: ``g(w) - sum_u w_u F_u(pi)``: how much a best response to ``w`` would gain.
        adversary: ``sum_u w_u F_u(pi) - min_u F_u(pi)``: how far the weights are from the worst group.
    """

    total: Tensor
    policy: Tensor
    adversary: Tensor


@torch.no_grad()
def duality_gap(
    weights: Tensor,
    rewards: Tensor,
    beta: float,
    utilities: Tensor,
    kl: float | Tensor,
    log_weights: Tensor | None = None,
) -> DualityGap:
    """The duality gap of a policy and the weights that it trains under, without solving for the best ones.

    ``g(w) = beta mean_x log sum_i exp(log_weights_i + w . r_i / beta)`` bounds every policy's worst group
    at *any* weights, so the adversary's current ones serve: one product and one log-sum-exp, on the device
    of the rewards. Both parts go to 0 at the saddle point, so the log shows who lags.

    Exact where the responses are enumerated. From samples it is an estimate, biased low by the logarithm
    (and blind to responses that nobody sampled): watch its course, and leave claims to
    :func:`~torchrl_maxmin.welfare.certify`.

    Args:
        weights: ``[K]``, group weights on the simplex, the adversary's current or average ones.
        rewards: ``[X, n, K]``, of n responses to each of X prompts; drawn once from the reference policy
            they serve the whole run.
        beta: the KL coefficient, positive.
        utilities: ``[K]``, the policy's ``E[r_u]`` *without* the KL term, over the same prompts.
        kl: the policy's ``E_x KL(pi || pi_ref)`` in nats.
        log_weights: ``[X, n]`` such that ``sum_i exp(log_weights_i) f(y_i)`` is ``E_ref f``; None means
            ``-log n``, for samples of the reference or a uniform one.

    Returns:
        Three scalars, in float64 if the rewards are and in float32 otherwise.

    Raises:
        ValueError: if shapes do not fit or ``beta <= 0``.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import duality_gap
        >>> arms = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.3, 0.3]]])  # one prompt, two groups
        >>> gap = duality_gap(torch.tensor([0.5, 0.5]), arms, 0.1, arms[0].mean(0), kl=0.0)
        >>> round(gap.total.item(), 3), round(gap.adversary.item(), 3)
        (0.033, 0.0)
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(f"rewards must be [prompts, responses, groups], got {tuple(rewards.shape)}.")
    num_responses, num_groups = rewards.shape[1:]
    if weights.shape != (num_groups,) or utilities.shape != (num_groups,):
        raise ValueError(
            f"weights and utilities must be [{num_groups}], one entry per group of the rewards, got "
            f"{tuple(weights.shape)} and {tuple(utilities.shape)}."
        )
    if log_weights is not None and log_weights.shape != rewards.shape[:2]:
        raise ValueError(
            f"log_weights must be [prompts, responses] = {tuple(rewards.shape[:2])}, got "
            f"{tuple(log_weights.shape)}."
        )
    values = rewards if rewards.dtype == torch.float64 else rewards.float()
    point, means = weights.to(values), utilities.to(values)
    tilted = values @ point / beta
    if log_weights is None:
        log_z = tilted.logsumexp(-1) - math.log(num_responses)
    else:
        log_z = (tilted + log_weights.to(values)).logsumexp(-1)
    # The KL is the same in every F, so the adversary's part is free of it.
    policy = beta * log_z.mean() - (point @ means - beta * torch.as_tensor(kl).to(values))
    adversary = point @ means - means.min()
    return DualityGap(policy + adversary, policy, adversary)
