"""Exact answers for tabular Markov decision processes with a vector reward, by linear programming.

A stationary stochastic policy is a point of the occupancy polytope: ``mu(s, a)``, the discounted number of
visits, with ``sum_a mu(s, a) = rho(s) + gamma sum_{s', a'} P(s | s', a') mu(s', a')``. Every group's return
``J_k = sum mu r_k`` is linear in it, so max-min, utilitarian and leximin optima are linear programmes
(Puterman, Markov Decision Processes, section 6.9; general utilities: Zhang et al., arXiv 2007.02151).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

__all__ = ["ExactPolicy", "VectorMDP", "best_responses", "solve_leximin", "solve_max_min", "solve_weighted"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class VectorMDP:
    """A tabular decision process whose reward has a column for every group.

    Attributes:
        transition: [S, A, S], the chance of each next state.
        reward: [S, A, K].
        initial: [S], the chance of each first state.
        gamma: discount, in [0, 1).

    Raises:
        ValueError: on shapes that do not fit, rows that are no probabilities, or a discount of 1.
    """

    transition: Array
    reward: Array
    initial: Array
    gamma: float

    def __post_init__(self) -> None:
        for name in ("transition", "reward", "initial"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        states, actions = self.reward.shape[:2] if self.reward.ndim == 3 else (0, 0)
        if self.transition.shape != (states, actions, states) or self.initial.shape != (states,):
            raise ValueError(
                "a decision process needs transition [S, A, S], reward [S, A, K] and initial [S]; got "
                f"{self.transition.shape}, {self.reward.shape} and {self.initial.shape}"
            )
        for name, rows in (("transition", self.transition), ("initial", self.initial)):
            if (rows < 0).any() or not np.allclose(rows.sum(-1), 1.0, atol=1e-8):
                raise ValueError(f"{name} must hold probabilities that sum to 1 over its last dimension")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"gamma must be at least 0 and below 1, got {self.gamma}")

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

    def flow(self) -> csr_array:
        """The constraints' matrix [S, S * A] on the occupancy, which equals ``initial``."""
        states, actions = self.reward.shape[:2]
        stay = np.repeat(np.eye(states), actions, axis=1)
        return csr_array(stay - self.gamma * self.transition.reshape(-1, states).T)

    def returns(self, policy: ArrayLike) -> Array:
        """Every group's expected discounted return [K] under a policy [S, A]."""
        chance = np.asarray(policy, dtype=np.float64)
        moves = np.einsum("sa,san->sn", chance, self.transition)
        rewards = np.einsum("sa,sak->sk", chance, self.reward)
        values = np.linalg.solve(np.eye(len(moves)) - self.gamma * moves, rewards)
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
    """The best policy for fixed group weights: ``max_pi sum_k w_k J_k``.

    Shares make it the utilitarian optimum, a one-hot vector a group's own best.
    """
    point = np.asarray(weights, dtype=np.float64)
    if point.shape != (mdp.num_groups,):
        raise ValueError(f"expected {mdp.num_groups} group weights, got shape {point.shape}")
    found = linprog(-(mdp.reward @ point).ravel(), A_eq=mdp.flow(), b_eq=mdp.initial, method="highs")
    return _solution(mdp, found, -found.fun, point)


def best_responses(mdp: VectorMDP) -> list[ExactPolicy]:
    """Every group's own best policy."""
    return [solve_weighted(mdp, one) for one in np.eye(mdp.num_groups)]


def solve_max_min(mdp: VectorMDP) -> ExactPolicy:
    """``max_pi min_k J_k`` over stationary stochastic policies.

    Example:
        >>> import numpy as np
        >>> rewards = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # one state, an arm for each of two groups
        >>> arms = VectorMDP(np.ones((1, 2, 1)), rewards, np.ones(1), gamma=0.0)
        >>> solution = solve_max_min(arms)
        >>> solution.value, solution.policy.tolist(), solution.weights.tolist()
        (0.5, [[0.5, 0.5]], [0.5, 0.5])
    """
    return _raise_floor(mdp, np.arange(mdp.num_groups), {})[0]


def solve_leximin(mdp: VectorMDP, tolerance: float = 1e-9) -> ExactPolicy:
    """The max-min policy that, among those, raises the second worst group most, and so on.

    Args:
        mdp: the process.
        tolerance: what counts as standing at the floor.

    Returns:
        The policy; ``value`` is the smallest utility, ``weights`` those of the first programme.
    """
    free, floors = np.arange(mdp.num_groups), dict[int, float]()
    first: ExactPolicy | None = None
    while len(free):
        solution, pushed = _raise_floor(mdp, free, floors)
        first = solution if first is None else first
        # a group whose constraint carries weight cannot do better while the others hold
        stuck = free[pushed > tolerance]
        if not len(stuck):
            stuck = free[[int(solution.utilities[free].argmin())]]
        floors |= {int(k): solution.value for k in stuck}
        free = np.setdiff1d(free, stuck)
    assert first is not None
    return ExactPolicy(first.value, solution.utilities, solution.policy, first.weights)


def _raise_floor(mdp: VectorMDP, free: NDArray[Any], floors: dict[int, float]) -> tuple[ExactPolicy, Array]:
    """Maximise the least return of the free groups, the others held at their floors; and the multipliers."""
    rewards = mdp.reward.reshape(-1, mdp.num_groups)
    size = len(rewards)
    objective = np.append(np.zeros(size), -1.0)
    above = [np.append(-rewards[:, k], 1.0) for k in free]
    held = [np.append(-rewards[:, k], 0.0) for k in floors]
    slack = 1e-10
    bounds = np.array(
        [0.0] * len(above) + [-floor + slack * max(1.0, abs(floor)) for floor in floors.values()]
    )
    flow = csr_array(np.hstack([mdp.flow().toarray(), np.zeros((len(mdp.initial), 1))]))
    found = linprog(
        objective,
        A_ub=np.array(above + held),
        b_ub=bounds,
        A_eq=flow,
        b_eq=mdp.initial,
        bounds=[(0, None)] * size + [(None, None)],
        method="highs",
    )
    multipliers = -found.ineqlin.marginals[: len(above)]
    weights = np.zeros(mdp.num_groups)
    weights[free] = multipliers / multipliers.sum()
    return _solution(mdp, found, -found.fun, weights), multipliers


def _solution(mdp: VectorMDP, found: object, value: float, weights: Array) -> ExactPolicy:
    if not found.success:  # type: ignore[attr-defined]
        raise RuntimeError(f"the linear programme failed: {found.message}")  # type: ignore[attr-defined]
    states, actions = mdp.reward.shape[:2]
    occupancy = found.x[: states * actions].reshape(states, actions).clip(0)  # type: ignore[attr-defined]
    visits = occupancy.sum(1, keepdims=True)
    policy = np.where(visits > 1e-12, occupancy / np.where(visits > 1e-12, visits, 1.0), 1.0 / actions)
    return ExactPolicy(float(value), mdp.returns(policy), policy, weights)
