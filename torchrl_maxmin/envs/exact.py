"""Exact answers for tabular Markov decision processes with a vector reward, by linear programming.

A stationary stochastic policy is a point of the occupancy polytope: ``mu(s, a)``, the discounted number of
visits, with ``sum_a mu(s, a) = rho(s) + gamma sum_{s', a'} P(s | s', a') mu(s', a')``. Every group's return
``J_k = sum mu r_k`` is linear in it, so max-min and utilitarian optima are linear programmes
(Puterman, Markov Decision Processes, section 6.9; general utilities: Zhang et al., arXiv 2007.02151).
The same holds without a discount where every episode ends: ``mu`` is then the expected number of visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import csc_array, csr_array, eye_array, hstack, issparse, kron
from scipy.sparse.linalg import splu

__all__ = ["ExactPolicy", "VectorMDP", "best_responses", "solve_max_min", "solve_weighted"]

Array = NDArray[np.float64]
ROUNDING = 1e-8  # of a sum of probabilities


@dataclass(frozen=True, eq=False)
class VectorMDP:
    """A tabular decision process whose reward has a column for every group.

    Attributes:
        transition: [S, A, S], the chance of each next state; or, for many states, a scipy sparse matrix
            [S * A, S] of the same rows. A row may sum to less than 1: the rest ends the episode.
        reward: [S, A, K].
        initial: [S], the chance of each first state.
        gamma: discount, in [0, 1]; 1 where every policy's episode ends with probability 1.

    Raises:
        ValueError: on shapes that do not fit, rows that are no probabilities, or a discount of 1 where
            an episode may go on for ever.

    Example:
        >>> import numpy as np
        >>> coin = VectorMDP(np.full((1, 1, 1), 0.5), np.ones((1, 1, 2)), np.ones(1), gamma=1.0)
        >>> coin.returns([[1.0]]).tolist()  # two steps on average
        [2.0, 2.0]
    """

    transition: Any
    reward: Array
    initial: Array
    gamma: float

    def __post_init__(self) -> None:
        for name in (
            ("reward", "initial") if issparse(self.transition) else ("transition", "reward", "initial")
        ):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        states, actions = self.reward.shape[:2] if self.reward.ndim == 3 else (0, 0)
        fitting = (states * actions, states) if issparse(self.transition) else (states, actions, states)
        if self.transition.shape != fitting or self.initial.shape != (states,):
            raise ValueError(
                "a decision process needs transition [S, A, S] (sparse: [S * A, S]), reward [S, A, K] and "
                f"initial [S]; got {self.transition.shape}, {self.reward.shape} and {self.initial.shape}"
            )
        totals = self.moves.sum(1)
        if not np.isfinite(totals).all() or (self.moves.data < 0).any() or (totals > 1 + ROUNDING).any():
            raise ValueError("transition must hold probabilities that sum to at most 1 over the next states")
        if (self.initial < 0).any() or not np.isclose(self.initial.sum(), 1.0, atol=ROUNDING):
            raise ValueError("initial must hold probabilities that sum to 1")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be at least 0 and at most 1, got {self.gamma}")
        if self.gamma == 1 and len(endless := self._endless()):
            raise ValueError(
                "gamma 1 needs every episode to end, whatever the policy; from "
                f"state {endless[0]} ({len(endless)} such states) some actions go on for ever. Give a gamma "
                "below 1, or add the time to the state and end the episode at a horizon"
            )

    @cached_property
    def moves(self) -> csr_array:
        """The transitions [S * A, S], row ``s * A + a``."""
        if issparse(self.transition):
            return csr_array(self.transition, dtype=np.float64)
        return csr_array(self.transition.reshape(-1, self.transition.shape[-1]))

    @property
    def num_groups(self) -> int:
        """K."""
        return self.reward.shape[-1]

    @classmethod
    def random(cls, states: int, actions: int, groups: int, gamma: float = 0.95, seed: int = 0) -> VectorMDP:
        """Dense random transitions and rewards in [0, 1]."""
        rng = np.random.default_rng(seed)
        return cls(
            rng.dirichlet(np.ones(states), size=(states, actions)),
            rng.random((states, actions, groups)),
            rng.dirichlet(np.ones(states)),
            gamma,
        )

    @classmethod
    def with_horizon(
        cls,
        transition: ArrayLike,
        reward: ArrayLike,
        initial: ArrayLike,
        horizon: int,
        gamma: float = 1.0,
    ) -> VectorMDP:
        """Make the process that ends after ``horizon`` steps, with the time in its state.

        Args:
            transition: of one step [S, A, S].
            reward: [S, A, K].
            initial: [S].
            horizon: steps of an episode, T.
            gamma: discount.

        Returns:
            A process of T * S states; state ``t * S + s`` is state s after t steps.
        """
        reward = np.asarray(reward, dtype=np.float64)
        states = reward.shape[0]
        rows = csr_array(np.asarray(transition, dtype=np.float64).reshape(-1, states))
        first = np.concatenate([np.asarray(initial, dtype=np.float64), np.zeros((horizon - 1) * states)])
        later = kron(eye_array(horizon, k=1), rows, format="csr")
        return cls(later, np.tile(reward, (horizon, 1, 1)), first, gamma)

    def _endless(self) -> NDArray[Any]:
        """The largest set of states in each of which some action keeps all its mass in the set."""
        inside = np.ones(len(self.initial), dtype=bool)
        while True:
            kept = (self.moves @ inside.astype(np.float64)).reshape(self.reward.shape[:2])
            following = inside & (kept >= 1 - ROUNDING).any(1)
            if following.sum() == inside.sum():
                return np.flatnonzero(inside)
            inside = following

    def flow(self) -> csr_array:
        """The constraints' matrix [S, S * A] on the occupancy, which equals ``initial``."""
        states, actions = self.reward.shape[:2]
        return csr_array(kron(eye_array(states), np.ones((1, actions))) - self.gamma * self.moves.T)

    def returns(self, policy: ArrayLike) -> Array:
        """Compute every group's expected discounted return [K] under a policy [S, A]."""
        chance = np.asarray(policy, dtype=np.float64)
        states, actions = self.reward.shape[:2]
        if chance.shape != (states, actions):
            raise ValueError(f"expected a policy [{states}, {actions}], got shape {chance.shape}")
        starts = np.arange(states + 1) * actions
        choose = csr_array((chance.ravel(), np.arange(chance.size), starts), shape=(states, chance.size))
        rewards = np.einsum("sa,sak->sk", chance, self.reward)
        values = splu(csc_array(eye_array(states) - self.gamma * (choose @ self.moves))).solve(rewards)
        return self.initial @ values


@dataclass(frozen=True, eq=False)
class ExactPolicy:
    """An optimum.

    Attributes:
        value: of what was maximised.
        utilities: every group's return [K].
        policy: chance of each action in each state [S, A]; uniform where it never comes.
        weights: group weights [K] under which the policy is a best response.
    """

    value: float
    utilities: Array
    policy: Array
    weights: Array


def solve_weighted(mdp: VectorMDP, weights: Sequence[float] | Array) -> ExactPolicy:
    """Solve for the best policy for fixed group weights: ``max_pi sum_k w_k J_k``.

    Shares make it the utilitarian optimum, a one-hot vector a group's own best.
    """
    point = np.asarray(weights, dtype=np.float64)
    if point.shape != (mdp.num_groups,):
        raise ValueError(f"expected {mdp.num_groups} group weights, got shape {point.shape}")
    found = linprog(-(mdp.reward @ point).ravel(), A_eq=mdp.flow(), b_eq=mdp.initial, method="highs")
    _check(found)
    return _solution(mdp, found, -found.fun, point)


def best_responses(mdp: VectorMDP) -> list[ExactPolicy]:
    """Solve for every group's own best policy."""
    return [solve_weighted(mdp, one) for one in np.eye(mdp.num_groups)]


def solve_max_min(mdp: VectorMDP) -> ExactPolicy:
    """Solve ``max_pi min_k J_k`` over stationary stochastic policies.

    Example:
        >>> import numpy as np
        >>> rewards = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # one state, an arm for each of two groups
        >>> arms = VectorMDP(np.ones((1, 2, 1)), rewards, np.ones(1), gamma=0.0)
        >>> solution = solve_max_min(arms)
        >>> solution.value, solution.policy.tolist(), solution.weights.tolist()
        (0.5, [[0.5, 0.5]], [0.5, 0.5])
    """
    rewards = mdp.reward.reshape(-1, mdp.num_groups)
    size = len(rewards)
    found = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.array([np.append(-column, 1.0) for column in rewards.T]),
        b_ub=np.zeros(mdp.num_groups),
        A_eq=hstack([mdp.flow(), csr_array((len(mdp.initial), 1))], format="csr"),
        b_eq=mdp.initial,
        bounds=[(0, None)] * size + [(None, None)],
        method="highs",
    )
    _check(found)
    multipliers = -found.ineqlin.marginals
    return _solution(mdp, found, -found.fun, multipliers / multipliers.sum())


def _check(found: Any) -> None:
    if not found.success:
        raise RuntimeError(f"the linear programme failed: {found.message}")


def _solution(mdp: VectorMDP, found: Any, value: float, weights: Array) -> ExactPolicy:
    states, actions = mdp.reward.shape[:2]
    occupancy = found.x[: states * actions].reshape(states, actions).clip(0)
    visits = occupancy.sum(1, keepdims=True)
    policy = np.where(visits > 1e-12, occupancy / np.where(visits > 1e-12, visits, 1.0), 1.0 / actions)
    return ExactPolicy(float(value), mdp.returns(policy), policy, weights)
