"""Exact answers for tabular processes, against policy iteration, cutting planes and brute force."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from torchrl_maxmin.envs.exact import (
    VectorMDP,
    best_responses,
    solve_max_min,
    solve_weighted,
)

SIZES = [(2, 2, 2), (3, 2, 3), (4, 3, 2), (5, 4, 4), (6, 6, 6), (2, 6, 3)]


def policy_iteration(mdp, weights):
    """The best deterministic policy for a scalar reward; no linear programme in it."""
    states = len(mdp.initial)
    reward, choice = mdp.reward @ weights, np.zeros(states, dtype=int)
    while True:
        rows = np.arange(states)
        moves = mdp.transition[rows, choice]
        value = np.linalg.solve(np.eye(states) - mdp.gamma * moves, reward[rows, choice])
        quality = reward + mdp.gamma * mdp.transition @ value
        better = quality.argmax(1)
        improved = quality[rows, better] > quality[rows, choice] + 1e-11
        if not improved.any():
            return choice
        choice = np.where(improved, better, choice)


def returns_of(mdp, choice):
    rows = np.arange(len(choice))
    moves = mdp.transition[rows, choice]
    return mdp.initial @ np.linalg.solve(np.eye(len(rows)) - mdp.gamma * moves, mdp.reward[rows, choice])


def dual_by_cutting_planes(mdp):
    """``min_w max_pi w . J(pi)``: the largest of the planes found is minimised until no policy lies above."""
    planes = [returns_of(mdp, policy_iteration(mdp, np.full(mdp.num_groups, 1 / mdp.num_groups)))]
    while True:
        size = mdp.num_groups
        found = linprog(
            np.append(np.zeros(size), 1.0),
            A_ub=np.hstack([np.array(planes), -np.ones((len(planes), 1))]),
            b_ub=np.zeros(len(planes)),
            A_eq=[[1.0] * size + [0.0]],
            b_eq=[1.0],
            bounds=[(0, None)] * size + [(None, None)],
        )
        weights = found.x[:size]
        response = returns_of(mdp, policy_iteration(mdp, weights))
        if weights @ response <= found.fun + 1e-9:
            return found.fun
        planes.append(response)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_the_best_response_dual_is_the_occupancy_programme(size, seed):
    mdp = VectorMDP.random(*size, seed=seed)
    solution = solve_max_min(mdp)
    assert solution.value == pytest.approx(dual_by_cutting_planes(mdp), abs=1e-6)
    assert mdp.returns(solution.policy).min() == pytest.approx(solution.value, abs=1e-6)
    assert solution.weights.sum() == pytest.approx(1.0)
    assert (solution.weights >= -1e-12).all()
    # its own weights make it a best response
    best = returns_of(mdp, policy_iteration(mdp, solution.weights))
    assert solution.weights @ best == pytest.approx(solution.value, abs=1e-6)


@pytest.mark.parametrize("size", SIZES[:4])
def test_weighted_optima_are_those_of_policy_iteration(size):
    mdp = VectorMDP.random(*size, seed=3)
    weights = np.random.default_rng(0).dirichlet(np.ones(size[2]))
    solution = solve_weighted(mdp, weights)
    expected = weights @ returns_of(mdp, policy_iteration(mdp, weights))
    assert solution.value == pytest.approx(expected, abs=1e-6)
    assert weights @ solution.utilities == pytest.approx(expected, abs=1e-6)
    for k, best in enumerate(best_responses(mdp)):
        every = itertools.product(range(size[1]), repeat=size[0])
        assert best.value == pytest.approx(max(returns_of(mdp, np.array(c))[k] for c in every), abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_no_policy_is_above_max_min(seed):
    mdp = VectorMDP.random(4, 3, 3, seed=seed)
    worst, rng = solve_max_min(mdp), np.random.default_rng(seed)
    assert worst.utilities.min() == pytest.approx(worst.value, abs=1e-6)
    for _ in range(300):
        assert min(mdp.returns(rng.dirichlet(np.full(3, 0.3), size=4))) <= worst.value + 1e-6


def test_returns_are_what_a_simulation_gives():
    mdp = VectorMDP.random(3, 2, 2, gamma=0.7, seed=1)
    policy = np.random.default_rng(2).dirichlet(np.ones(2), size=3)
    state, discount, total = mdp.initial, 1.0, np.zeros(2)
    for _ in range(200):
        joint = state[:, None] * policy
        total += discount * np.einsum("sa,sak->k", joint, mdp.reward)
        state, discount = np.einsum("sa,san->n", joint, mdp.transition), discount * mdp.gamma
    np.testing.assert_allclose(mdp.returns(policy), total, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": 1.0}, "gamma"),
        ({"initial": np.array([0.5, 0.4])}, "initial"),
        ({"transition": np.ones((2, 2, 2))}, "transition"),
        ({"reward": np.ones((3, 2, 2))}, "needs transition"),
    ],
)
def test_mistakes(change, match):
    good = VectorMDP.random(2, 2, 2)
    arguments = {name: getattr(good, name) for name in ("transition", "reward", "initial", "gamma")}
    with pytest.raises(ValueError, match=match):
        VectorMDP(**(arguments | change))
    with pytest.raises(ValueError, match="2 group weights"):
        solve_weighted(good, [1.0])
