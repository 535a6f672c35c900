"""Max-min on a tabular process as a game: natural policy gradient against the group weights.

The policy climbs ``sum_k w_k J_k``, the weights move against it, both by multiplicative updates and both
optimistic (each steps on a guess of what it will see next). The averages of the two form a pair whose duality
gap closes, where last iterates of such games may cycle (Rakhlin & Sridharan, 2013; for constrained and
max-min processes: Moskovitz et al., ReLOAD, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchrl_maxmin.envs.exact import VectorMDP, solve_weighted

__all__ = ["GameSolution", "play_game"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GameSolution:
    """What the averaged play reached.

    Attributes:
        policy: chance of each action in each state [S, A], that of the averaged occupancies.
        utilities: every group's return under it [K].
        weights: averaged group weights [K].
        gap: ``max_pi sum_k w_k J_k(pi) - min_k J_k``, the distance to the optimum at most; never below 0.
        iterations: how many were played.
    """

    policy: Array
    utilities: Array
    weights: Array
    gap: float
    iterations: int


def play_game(
    mdp: VectorMDP,
    iterations: int = 5000,
    *,
    policy_step: float = 20.0,
    weight_step: float = 10.0,
    relative_gap: float = 0.0,
    check_every: int = 250,
) -> GameSolution:
    """Play max-min on a process whose model is known.

    Steps are on values times ``1 - gamma``, which has the scale of one step's reward. Later iterates count
    more in the averages (weight t), since the first ones are far off.

    Args:
        mdp: the process; ``gamma`` below 1.
        iterations: at most so many.
        policy_step: of the policy's logits, on advantages.
        weight_step: of the weights' logarithms, on utilities.
        relative_gap: stop once the gap is at most this share of the value's size; 0 plays all.
        check_every: iterations between looks at the gap, each a linear programme.

    Raises:
        ValueError: for a process without discount.

    Example:
        >>> mdp = VectorMDP.random(3, 3, 2, seed=1)
        >>> solution = play_game(mdp, 2000)
        >>> 0 <= solution.gap < 1e-2 * solution.utilities.min()
        True
    """
    if mdp.gamma >= 1:
        raise ValueError("the game is played on discounted processes; give a gamma below 1")
    states, actions, groups = mdp.reward.shape
    transition, scale = mdp.moves.toarray().reshape(states, actions, states), 1.0 - mdp.gamma
    logits, log_weights = np.zeros((states, actions)), np.full(groups, -np.log(groups))
    last_ascent: Array | None = None
    last_returns: Array | None = None
    occupancies, total_weights = np.zeros((states, actions)), np.zeros(groups)
    for t in range(1, iterations + 1):
        policy, weights = _softmax(logits), np.exp(log_weights)
        moves = np.einsum("sa,san->sn", policy, transition)
        both = np.linalg.inv(np.eye(states) - mdp.gamma * moves)
        values = scale * both @ np.einsum("sa,sak->sk", policy, mdp.reward)
        returns = mdp.initial @ values
        occupancies += t * (mdp.initial @ both)[:, None] * policy
        total_weights += t * weights
        if t == iterations or (relative_gap and t % check_every == 0):
            solution = _averages(mdp, occupancies, total_weights, t)
            if t == iterations or solution.gap <= relative_gap * abs(solution.utilities.min()):
                return solution
        quality = scale * mdp.reward @ weights + mdp.gamma * transition @ (values @ weights)
        ascent = policy_step * (quality - (policy * quality).sum(1, keepdims=True))
        logits += 2 * ascent - (ascent if last_ascent is None else last_ascent)
        log_weights = log_weights - weight_step * (
            2 * returns - (returns if last_returns is None else last_returns)
        )
        log_weights -= np.logaddexp.reduce(log_weights)
        last_ascent, last_returns = ascent, returns
    raise ValueError(f"iterations must be at least 1, got {iterations}")


def _softmax(logits: Array) -> Array:
    chances = np.exp(logits - logits.max(1, keepdims=True))
    return chances / chances.sum(1, keepdims=True)


def _averages(mdp: VectorMDP, occupancies: Array, weights: Array, iterations: int) -> GameSolution:
    """The averaged pair; its policy has the averaged returns, since returns are linear in occupancies."""
    policy, weights = occupancies / occupancies.sum(1, keepdims=True), weights / weights.sum()
    utilities = mdp.returns(policy)
    gap = solve_weighted(mdp, weights).value - float(utilities.min())
    return GameSolution(policy, utilities, weights, gap, iterations)
