"""Exact tabular values and the paper's bounds, against independent optimisers and closed forms."""

import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax
from scipy.stats import spearmanr
from scripts import load_script

from torchrl_maxmin.diagnosis.exact import (
    exact_outcome,
    pair_probabilities,
    policy_utilities,
    single_reward,
    tilted_policy,
)
from torchrl_maxmin.diagnosis.theorem import (
    PROOF_GAPS,
    distinctness,
    diversity,
    lemma1_bound,
    theorem1_bound,
)


@pytest.fixture(scope="module")
def reproduction():
    """The script that draws gap against diversity."""
    return load_script("theory/run.py")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 5.0))
def test_the_tilted_policy_beats_every_other(seed, beta):
    rng = np.random.default_rng(seed)
    rewards, reference = rng.normal(size=(2, 4, 1)), np.log(rng.dirichlet(np.ones(4), size=2))
    best = tilted_policy(rewards[..., 0], beta, reference)
    value = policy_utilities(best, rewards, beta, reference)[:, 0]
    np.testing.assert_allclose(value, beta * logsumexp(reference + rewards[..., 0] / beta, axis=1))
    other = np.log(rng.dirichlet(np.ones(4), size=2))
    assert (policy_utilities(other, rewards, beta, reference)[:, 0] <= value + 1e-12).all()


def test_the_single_reward_minimises_the_likelihood_of_all_pairs():
    """Against a general optimiser that is told nothing of gradients or gauges."""
    rng = np.random.default_rng(0)
    rewards, shares = 2 * rng.normal(size=(3, 4, 3)), np.array([0.5, 0.3, 0.2])
    found = single_reward(rewards, shares)
    for x in range(3):

        def loss(r, x=x):
            total = 0.0
            for a, b in itertools.permutations(range(4), 2):
                p = sum(shares[u] * expit(rewards[x, a, u] - rewards[x, b, u]) for u in range(3))
                total -= p * np.log(expit(r[a] - r[b]))
            return total

        best = minimize(loss, np.zeros(4), options={"gtol": 1e-9}).x
        np.testing.assert_allclose(found[x], best - best.mean(), atol=1e-5)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-12)


def test_the_single_reward_of_one_group_is_its_own():
    rewards = 6 * np.random.default_rng(1).normal(size=(20, 5, 1))
    own = rewards[..., 0] - rewards[..., 0].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(single_reward(rewards, [1.0]), own, atol=1e-6)
    twins = np.repeat(rewards, 2, axis=2)
    np.testing.assert_allclose(single_reward(twins, [0.7, 0.3]), own, atol=1e-6)


def test_gaps_are_beta_times_the_divergence_to_the_own_best_policy():
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(6, 4, 3))
    single = single_reward(rewards, [0.6, 0.3, 0.1])
    outcome = exact_outcome(rewards, single, 0.3)
    p = softmax(single / 0.3, axis=1)
    for u in range(3):
        q = softmax(rewards[..., u] / 0.3, axis=1)
        divergence = (p * np.log(p / q)).sum(axis=1).mean()
        np.testing.assert_allclose(outcome.single_gap.gap[u], 0.3 * divergence, rtol=1e-9)
        np.testing.assert_allclose(outcome.best[u] - outcome.single[u], 0.3 * divergence, rtol=1e-9)
    assert (outcome.maxmin_gap.gap > 0).all()
    smallest = min(p.min(), softmax(rewards / 0.3, axis=1).min())
    np.testing.assert_allclose(outcome.smallest_probability, smallest, rtol=1e-9)


def test_maxmin_beats_a_general_optimiser_of_the_worst_group():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=(2, 3, 2))
    outcome = exact_outcome(rewards, single_reward(rewards, [0.8, 0.2]), 0.5)
    np.testing.assert_allclose(outcome.maxmin.min(), outcome.dual_value, atol=1e-6)

    def worst(logits):
        log_p = logits.reshape(2, 3) - logsumexp(logits.reshape(2, 3), axis=1, keepdims=True)
        return -policy_utilities(log_p, rewards, 0.5).mean(axis=0).min()

    searched = max(
        -minimize(worst, rng.normal(size=6), method="Nelder-Mead", options={"maxiter": 8000}).fun
        for _ in range(4)
    )
    assert searched <= outcome.dual_value + 1e-6
    assert searched > outcome.dual_value - 1e-2


def test_diversity_is_half_the_absolute_difference_over_both_outcomes():
    rng = np.random.default_rng(4)
    p, weights = rng.random((50, 3)), rng.random(50)
    found = diversity(p, weights)
    for i, j in itertools.product(range(3), repeat=2):
        by_pair = [0.5 * (abs(a - b) + abs((1 - a) - (1 - b))) for a, b in zip(p[:, i], p[:, j], strict=True)]
        np.testing.assert_allclose(found[i, j], np.average(by_pair, weights=weights))
    # Which response is written first does not matter.
    turned = np.where(rng.random((50, 1)) < 0.5, p, 1 - p)
    np.testing.assert_allclose(diversity(turned, weights), found)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_epsilon_is_the_printed_formula_and_its_lower_bound_holds(num_groups, seed):
    """TV(p_u, mixture) >= epsilon (1 - share), the step of the proof before the parameters."""
    rng = np.random.default_rng(seed)
    p, shares = rng.random((30, num_groups)), rng.dirichlet(np.ones(num_groups))
    d = diversity(p)
    found = distinctness(d)
    for u in range(num_groups):
        lead = [
            d[u, j] - max(d[k, j] for k in range(num_groups) if k != u) for j in range(num_groups) if j != u
        ]
        np.testing.assert_allclose(found.epsilon[u], max(lead), atol=1e-12)
        apart = np.abs(p[:, u] - p @ shares).mean()
        assert apart >= found.epsilon[u] * (1 - shares[u]) - 1e-12
    if num_groups == 2:
        np.testing.assert_allclose(found.epsilon, d[0, 1])


def test_bounds_are_the_printed_ones():
    np.testing.assert_allclose(lemma1_bound([0.4, -0.1], [0.2, 0.8], 2.0), [0.4 * 0.8 / 8, 0.0])
    constants = {"beta": 0.5, "smallest_eigenvalue": 2.0, "lipschitz": 10.0, "feature_bound": 3.0}
    expected = 2.0 / (64 * 0.25 * 10.0) * 0.4 * 0.8 / 9.0
    np.testing.assert_allclose(theorem1_bound([0.4, -0.1], [0.2, 0.8], **constants), [expected, 0.0])
    squared = theorem1_bound([0.4], [0.2], squared=True, **constants)
    np.testing.assert_allclose(squared, [expected * 0.4 * 0.8])
    assert len(PROOF_GAPS) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tilted_policy([[1.0]], 0.0), "beta must be positive"),
        (lambda: tilted_policy([[1.0, 2.0]], 1.0, [[0.0]]), "log_reference must be"),
        (lambda: diversity([0.5]), r"\[P, K\]"),
        (lambda: diversity([[1.5, 0.5]]), r"lie in \[0, 1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def check_theory(found, worlds):
    told = found[1]
    assert told["Spearman, gap with diversity at share .2"] >= 0.95
    assert told["Spearman, gap with epsilon (1 - share)"] >= 0.95
    assert told["worlds whose gap falls with the share throughout"] == worlds
    assert told["MaxMin's worst utility and the dual optimum, largest distance"] <= 1e-6
    assert told["mean gap of the minority, MaxMin"] < told["mean gap of the minority, single"]
    assert told["mean gap of the majority, MaxMin"] > told["mean gap of the majority, single"]
    rows = found[0]["fixed"]
    by_hand = spearmanr([r["diversity"] for r in rows], [r["single gap, minority"] for r in rows])[0]
    assert told["Spearman, gap with diversity at share .2"] == pytest.approx(by_hand)


def test_the_gap_follows_diversity_and_share_in_40_worlds(reproduction, tmp_path):
    found = reproduction.study(1, 40, 8, 4)
    check_theory((found, reproduction.figures(found)), 40)
    shares = reproduction.by_share(1, 3, 8, 4)
    reproduction.draw(tmp_path, found["fixed"], shares)
    text = reproduction.write(tmp_path, found, shares, "40 worlds")
    assert "| worlds | 40 |" in text
    assert all((tmp_path / f"theory{suffix}").stat().st_size > 0 for suffix in (".png", ".svg", ".csv"))


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "responses"), [(8, 4), (16, 6)])
def test_the_gap_follows_diversity_and_share_in_200_worlds(reproduction, prompts, responses):
    found = reproduction.study(0, 200, prompts, responses)
    check_theory((found, reproduction.figures(found)), 200)


def test_the_world_is_turned_at_equal_norm(reproduction):
    rewards, angle = reproduction.world(np.random.default_rng(5), 8, 4)
    one, other = (rewards[..., k].ravel() for k in range(2))
    np.testing.assert_allclose(np.linalg.norm(one), np.linalg.norm(other))
    np.testing.assert_allclose(one @ other / (one @ one), np.cos(angle))
    np.testing.assert_allclose(pair_probabilities(rewards).shape, (8, 6, 2))


@pytest.mark.parametrize("name", ["analysis", "exact", "figures", "report", "theorem"])
def test_examples_of_the_room_run(name):
    import doctest

    module = importlib.import_module(f"torchrl_maxmin.diagnosis.{name}")
    assert doctest.testmod(module).failed == 0
