"""Exact values where responses can be enumerated: policies, utilities, the single reward, the optimum.

A prompt has n responses and a reference that is uniform over them unless ``log_reference`` says otherwise.
Pairs are the smallest case: two responses, one bandit a pair.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, log_softmax

from torchrl_maxmin.evaluation.gap import AlignmentGap, alignment_gap
from torchrl_maxmin.welfare.dual import solve_dual

__all__ = [
    "ExactOutcome",
    "exact_outcome",
    "pair_probabilities",
    "policy_utilities",
    "single_reward",
    "tilted_policy",
]

_NEWTON_STEPS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class ExactOutcome:
    """Utilities that the single reward and MaxMin leave each group, exactly.

    Attributes:
        single: F_u of the policy of the single reward, by group [K]; KL inside.
        maxmin: F_u of the max-min policy [K].
        best: F_u of the group's own best policy [K].
        single_gap: What each group loses under the single reward against its own best policy.
        maxmin_gap: The same under MaxMin.
        weights: Group weights of the max-min policy [K].
        dual_value: The dual's optimum, the best worst-group utility that there is.
        smallest_probability: c, the smallest probability that the single and the groups' own policies give
            a response.
    """

    single: np.ndarray
    maxmin: np.ndarray
    best: np.ndarray
    single_gap: AlignmentGap
    maxmin_gap: AlignmentGap
    weights: np.ndarray
    dual_value: float
    smallest_probability: float


def tilted_policy(rewards: ArrayLike, beta: float, log_reference: ArrayLike | None = None) -> np.ndarray:
    """Solve for one reward's best policy, log pi = log pi_ref + r / beta - log Z (arXiv 2402.08925, eq. 3).

    Args:
        rewards: [X, n].
        beta: KL weight, positive.
        log_reference: log pi_ref [X, n]; uniform if None.

    Returns:
        log pi [X, n] float64.

    Example:
        >>> import numpy as np
        >>> np.exp(tilted_policy([[np.log(3.0), 0.0]], beta=1.0)).round(2).tolist()
        [[0.75, 0.25]]
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    values = np.asarray(rewards, dtype=np.float64)
    return log_softmax(_log_reference(values, log_reference) + values / beta, axis=1)


def policy_utilities(
    log_policy: np.ndarray, rewards: ArrayLike, beta: float, log_reference: ArrayLike | None = None
) -> np.ndarray:
    """Compute F_u of a policy, prompt by prompt: E[r_u] - beta KL(pi || pi_ref) (arXiv 2402.08925, eq. 11).

    Args:
        log_policy: log pi [X, n].
        rewards: [X, n, K].
        beta: KL weight.
        log_reference: log pi_ref [X, n]; uniform if None.

    Returns:
        [X, K] float64.

    Example:
        >>> import numpy as np
        >>> policy_utilities(np.log([[0.5, 0.5]]), [[[1.0, 0.0], [0.0, 1.0]]], beta=0.1).tolist()
        [[0.5, 0.5]]
    """
    values = np.asarray(rewards, dtype=np.float64)
    policy = np.exp(log_policy)
    kl = (policy * (log_policy - _log_reference(values[..., 0], log_reference))).sum(axis=1)
    return np.einsum("xn,xnk->xk", policy, values) - beta * kl[:, None]


def pair_probabilities(rewards: ArrayLike) -> np.ndarray:
    """Compute how each group chooses between all pairs of a prompt's responses, by Bradley-Terry.

    Args:
        rewards: [X, n, K].

    Returns:
        P(first preferred) [X, n (n - 1) / 2, K].

    Example:
        >>> pair_probabilities([[[0.0], [0.0], [0.0]]]).shape
        (1, 3, 1)
    """
    values = np.asarray(rewards, dtype=np.float64)
    first, second = np.triu_indices(values.shape[1], 1)
    return expit(values[:, first] - values[:, second])


def single_reward(rewards: ArrayLike, shares: ArrayLike) -> np.ndarray:
    """Solve for the one reward that Bradley-Terry learns from a mixture of groups, with unlimited data.

    The minimiser of the negative log-likelihood of all pairs of a prompt's responses, each as often, chosen
    with the mixture's probability sum_u share_u sigmoid(r_u(a) - r_u(b)). A mixture of Bradley-Terry models
    is in general none itself, so this is its projection.

    Args:
        rewards: [X, n, K].
        shares: Population shares [K].

    Returns:
        [X, n] float64, zero mean a prompt.

    Example:
        >>> single_reward([[[1.0, -1.0], [0.0, 0.0]]], [0.5, 0.5]).round(6).tolist()
        [[0.0, 0.0]]
    """
    values = np.asarray(rewards, dtype=np.float64)
    share = np.asarray(shares, dtype=np.float64)
    num_responses = values.shape[1]
    first, second = np.triu_indices(num_responses, 1)
    target = pair_probabilities(values) @ share  # [X, pairs]
    sides = np.eye(num_responses)[first] - np.eye(num_responses)[second]
    reward = (values - values.mean(axis=1, keepdims=True)) @ share
    gauge = np.full((num_responses, num_responses), 1 / num_responses)  # no pair fixes the mean

    def loss(r: np.ndarray) -> np.ndarray:
        margin = r @ sides.T
        return -(target * log_expit(margin) + (1 - target) * log_expit(-margin)).sum(axis=1)

    now = loss(reward)
    for _ in range(_NEWTON_STEPS):
        probability = expit(reward @ sides.T)
        gradient = (probability - target) @ sides
        if np.abs(gradient).max() < 1e-12:
            break
        curvature = probability * (1 - probability)
        hessian = np.einsum("xp,pn,pm->xnm", curvature, sides, sides) + gauge
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones((len(reward), 1))
        for _ in range(50):  # halve where a whole Newton step overshoots
            after = loss(reward - size * step)
            worse = after > now + 1e-15
            if not worse.any():
                break
            size[worse] /= 2
        reward, now = reward - size * step, after
    return reward - reward.mean(axis=1, keepdims=True)


def exact_outcome(rewards: ArrayLike, single: ArrayLike, beta: float) -> ExactOutcome:
    """Compute utilities and alignment gaps of the single reward's policy and of MaxMin's, reference uniform.

    Args:
        rewards: The groups' rewards [X, n, K], on scales that may be compared.
        single: The single reward [X, n].
        beta: KL weight, positive.

    Returns:
        :class:`ExactOutcome`.

    Example:
        >>> rewards = [[[1.0, 0.0], [0.0, 1.0], [0.3, 0.3]]]
        >>> outcome = exact_outcome(rewards, [[0.8, 0.2, 0.3]], beta=0.1)
        >>> bool(outcome.maxmin.min() > outcome.single.min())
        True
    """
    values = np.asarray(rewards, dtype=np.float64)
    solution = solve_dual(torch.from_numpy(values), beta)
    weights = solution.weights.numpy()
    log_single, log_maxmin, *own = (
        tilted_policy(reward, beta) for reward in (single, values @ weights, *np.moveaxis(values, -1, 0))
    )
    of_single, of_maxmin = (policy_utilities(policy, values, beta) for policy in (log_single, log_maxmin))
    of_best = np.concatenate(
        [policy_utilities(policy, values[..., k : k + 1], beta) for k, policy in enumerate(own)], axis=1
    )
    return ExactOutcome(
        single=of_single.mean(axis=0),
        maxmin=of_maxmin.mean(axis=0),
        best=of_best.mean(axis=0),
        single_gap=alignment_gap(of_single, of_best),
        maxmin_gap=alignment_gap(of_maxmin, of_best),
        weights=weights,
        dual_value=solution.value,
        smallest_probability=float(np.exp(min(policy.min() for policy in (log_single, *own)))),
    )


def _log_reference(values: np.ndarray, log_reference: ArrayLike | None) -> np.ndarray:
    if log_reference is None:
        return np.full(values.shape, -np.log(values.shape[1]))
    logs = np.asarray(log_reference, dtype=np.float64)
    if logs.shape != values.shape:
        raise ValueError(f"log_reference must be {list(values.shape)}, got {list(logs.shape)}")
    return logs
