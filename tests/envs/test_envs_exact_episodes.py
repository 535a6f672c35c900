"""Exact answers where episodes end: against sums over time, value iteration and hulls of pure policies."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array

from torchrl_maxmin.envs import (
    FishwoodEnv,
    FruitTreeEnv,
    VectorMDP,
    solve_max_min,
    solve_weighted,
)


def ending(states, actions, groups, seed, gamma=1.0, least=0.05):
    """Dense random transitions that end an episode with a chance of at least ``least`` in every step."""
    rng = np.random.default_rng(seed)
    full = VectorMDP.random(states, actions, groups, seed=seed)
    kept = rng.uniform(0.3, 1 - least, size=(states, actions, 1))
    return VectorMDP(full.transition * kept, full.reward - 0.5, full.initial, gamma)


def summed_over_time(mdp, policy, steps):
    """Returns [K] by following the distribution over states; no linear system in it."""
    state, total, discount = mdp.initial, np.zeros(mdp.num_groups), 1.0
    for _ in range(steps):
        joint = state[:, None] * policy
        total = total + discount * np.einsum("sa,sak->k", joint, mdp.reward)
        state, discount = np.einsum("sa,san->n", joint, mdp.transition), discount * mdp.gamma
    return total


def value_iteration(mdp, weights):
    reward, value = mdp.reward @ weights, np.zeros(len(mdp.initial))
    for _ in range(2000):
        value = (reward + mdp.gamma * mdp.transition @ value).max(1)
    return mdp.initial @ value


def best_mixture_of_pure_policies(mdp):
    """Max-min over the hull of all deterministic policies' returns, which holds all that is reachable."""
    states, actions = mdp.reward.shape[:2]
    choices = itertools.product(range(actions), repeat=states)
    points = np.array([summed_over_time(mdp, np.eye(actions)[list(choice)], 600) for choice in choices])
    found = linprog(
        np.append(np.zeros(len(points)), -1.0),
        A_ub=np.hstack([-points.T, np.ones((mdp.num_groups, 1))]),
        b_ub=np.zeros(mdp.num_groups),
        A_eq=np.append(np.ones(len(points)), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * len(points) + [(None, None)],
    )
    return -found.fun


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_returns_are_sums_over_time(seed, gamma):
    mdp = ending(5, 3, 2, seed, gamma)
    policy = np.random.default_rng(seed).dirichlet(np.ones(3), size=5)
    np.testing.assert_allclose(mdp.returns(policy), summed_over_time(mdp, policy, 800), rtol=1e-9)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("size", [(2, 2, 2), (3, 2, 3), (4, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_optima_are_those_of_value_iteration_and_of_mixtures(size, seed, gamma):
    mdp = ending(*size, seed, gamma)
    weights = np.random.default_rng(seed).dirichlet(np.ones(size[2]))
    solution = solve_weighted(mdp, weights)
    assert solution.value == pytest.approx(value_iteration(mdp, weights), abs=1e-6)
    assert weights @ solution.utilities == pytest.approx(solution.value, abs=1e-6)
    worst = solve_max_min(mdp)
    assert worst.value == pytest.approx(best_mixture_of_pure_policies(mdp), abs=1e-6)
    assert worst.utilities.min() == pytest.approx(worst.value, abs=1e-6)
    assert value_iteration(mdp, worst.weights) == pytest.approx(worst.value, abs=1e-6)


@pytest.mark.parametrize(
    ("depth", "max_min", "uniform", "best_leaf"),
    [(5, 3.7982, 3.0184, 3.3028), (6, 3.7987, 3.0598, 2.2224), (7, 3.9301, 3.0853, 2.5901)],
)
def test_fruit_trees(depth, max_min, uniform, best_leaf):
    """The published leaves: what mixtures of them reach, what a coin reaches, what one leaf reaches."""
    env = FruitTreeEnv(1, depth=depth)
    process = env.process()
    assert solve_max_min(process).value == pytest.approx(max_min, abs=5e-5)
    nodes = len(process.initial)
    assert process.returns(np.full((nodes, 2), 0.5)).min() == pytest.approx(uniform, abs=5e-5)
    assert env.fruits.min(1).max() == pytest.approx(best_leaf, abs=5e-5)
    np.testing.assert_allclose(process.returns(np.full((nodes, 2), 0.5)), env.fruits.mean(0))


def test_fishwood():
    process = FishwoodEnv(1).process()
    assert len(process.initial) == 400
    solution = solve_max_min(process)
    np.testing.assert_allclose(solution.utilities, [18.0, 18.0], atol=1e-5)
    np.testing.assert_allclose(solve_weighted(process, [0.5, 0.5]).utilities, [0.0, 180.0], atol=1e-5)
    # without the time: never from the woods to the woods, and there from the water in .106 of the steps
    table = np.tile([[1 - 0.106, 0.106], [1.0, 0.0]], (200, 1))
    assert process.returns(table).min() > 17.8


def test_a_sparse_process_is_the_dense_one():
    dense = ending(6, 3, 2, seed=0)
    rows = csr_array(dense.transition.reshape(-1, 6))
    sparse = VectorMDP(rows, dense.reward, dense.initial, 1.0)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=6)
    np.testing.assert_array_equal(sparse.returns(policy), dense.returns(policy))
    assert solve_max_min(sparse).value == solve_max_min(dense).value
    with pytest.raises(ValueError, match="needs transition"):
        VectorMDP(rows[:-1], dense.reward, dense.initial, 1.0)


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_a_horizon_is_the_sum_of_its_steps(gamma):
    base = VectorMDP.random(3, 2, 2, gamma=gamma if gamma < 1 else 0.5, seed=1)
    process = VectorMDP.with_horizon(base.transition, base.reward, base.initial, 7, gamma)
    rng = np.random.default_rng(0)
    tables = rng.dirichlet(np.ones(2), size=(7, 3))
    state, total = base.initial, np.zeros(2)
    for time, table in enumerate(tables):
        joint = state[:, None] * table
        total = total + gamma**time * np.einsum("sa,sak->k", joint, base.reward)
        state = np.einsum("sa,san->n", joint, base.transition)
    np.testing.assert_allclose(process.returns(tables.reshape(21, 2)), total, rtol=1e-12)


def test_a_process_of_three_thousand_states_is_solved():
    base = ending(30, 4, 3, seed=2)
    process = VectorMDP.with_horizon(
        base.transition * (base.transition > 0.05), base.reward, base.initial, 100
    )
    solution = solve_max_min(process)
    assert len(process.initial) == 3000
    assert solution.utilities.min() == pytest.approx(solution.value, abs=1e-6)
    best = max(solve_weighted(process, one).value for one in np.eye(3))
    assert solution.utilities.min() <= best + 1e-6


def endless(loop):
    """Three states in a row; the last one goes back to the middle with chance ``loop`` under action 1."""
    transition = np.zeros((3, 2, 3))
    transition[0, :, 1] = transition[1, :, 2] = 1.0
    transition[2, 1, 1] = loop
    return {
        "transition": transition,
        "reward": np.ones((3, 2, 1)),
        "initial": np.eye(3)[0],
    }


def test_a_discount_of_one_needs_an_end():
    """The first state leads into the loop and is in it too: all of its mass stays inside."""
    with pytest.raises(ValueError, match=r"state 0 \(3 such states\).*Give a gamma below 1, or add the time"):
        VectorMDP(**endless(1.0), gamma=1.0)
    policy = [[0.5, 0.5]] * 3
    assert VectorMDP(**endless(1.0), gamma=0.99).returns(policy)[0] > 0
    # by hand: from state 2 back to state 1 with chance 1/4 under the even policy, so 1 + 2 / (1 - 1/4) steps
    assert VectorMDP(**endless(0.5), gamma=1.0).returns(policy)[0] == pytest.approx(1 + 2 / 0.75)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": 1.1}, "gamma must be at least 0 and at most 1"),
        ({"transition": np.full((3, 2, 3), 0.4)}, "at most 1"),
        ({"transition": np.full((3, 2, 3), np.nan)}, "at most 1"),
        ({"transition": np.full((3, 2, 3), -0.1)}, "probabilities"),
        ({"initial": np.array([0.5, 0.2, 0.0])}, "initial"),
    ],
)
def test_mistakes(change, match):
    with pytest.raises(ValueError, match=match):
        VectorMDP(**{**endless(0.5), "gamma": 1.0, **change})


def test_a_policy_of_another_shape():
    with pytest.raises(ValueError, match=r"expected a policy \[3, 2\], got shape \(3, 3\)"):
        VectorMDP(**endless(0.5), gamma=1.0).returns(np.ones((3, 3)))
