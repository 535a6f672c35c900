import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from welfare_bandits import BANDITS, BETA, LINEAR_VALUE, VALUE, WEIGHTS

from torchrl_maxmin.welfare import solve_dual
from torchrl_maxmin.welfare.dual import dual_terms


def linear_max_min(rewards):
    """max over policies of the minimum over groups of E[r], without KL, averaged over prompts."""
    prompts, arms, groups = rewards.shape
    cost = np.zeros(prompts * arms + 1)
    cost[-1] = -1.0
    utilities = np.concatenate([rewards[x].T.numpy() for x in range(prompts)], axis=1) / prompts
    upper = np.concatenate([-utilities, np.ones((groups, 1))], axis=1)
    equal = np.concatenate([np.kron(np.eye(prompts), np.ones((1, arms))), np.zeros((prompts, 1))], axis=1)
    bounds = [(0, None)] * (prompts * arms) + [(None, None)]
    found = linprog(cost, upper, np.zeros(groups), equal, np.ones(prompts), bounds)
    return -found.fun


def random_problem(seed, prompts=3, arms=6, groups=3):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, arms, groups, generator=generator, dtype=torch.float64)
    reference = torch.randn(prompts, arms, generator=generator, dtype=torch.float64).log_softmax(-1)
    return rewards, reference


def optimal_policy(solution, rewards, reference):
    return (reference + rewards @ solution.weights / solution.beta).log_softmax(-1)


def utilities_and_kl(log_policy, rewards, reference):
    policy = log_policy.exp()
    utilities = torch.einsum("xn,xnk->xk", policy, rewards).mean(0)
    return utilities, (policy * (log_policy - reference)).sum(-1).mean()


@pytest.mark.parametrize("name", BANDITS)
def test_bandits_with_a_kl_penalty(name):
    solution = solve_dual(BANDITS[name].unsqueeze(0), BETA)
    assert solution.value == pytest.approx(VALUE[name], abs=1e-4)
    # measured with four and three digits
    assert solution.weights.tolist() == pytest.approx(WEIGHTS[name], abs=6e-4)
    assert solution.slack < 1e-6


@pytest.mark.parametrize("name", BANDITS)
def test_bandits_without_one(name):
    rewards = BANDITS[name].unsqueeze(0)
    assert linear_max_min(rewards) == pytest.approx(LINEAR_VALUE[name], abs=1e-4)
    assert solve_dual(rewards, 1e-5).value == pytest.approx(LINEAR_VALUE[name], abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_vanishing_beta_gives_the_linear_programme(seed):
    rewards, _ = random_problem(seed)
    assert solve_dual(rewards, 1e-5).value == pytest.approx(linear_max_min(rewards), abs=1e-4)


@pytest.mark.parametrize("beta", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_grid_over_the_simplex(seed, beta):
    rewards, reference = random_problem(seed)
    side = 200
    grid = torch.tensor(
        [(i, j, side - i - j) for i in range(side + 1) for j in range(side + 1 - i)], dtype=torch.float64
    )
    tilted = torch.einsum("gk,xnk->gxn", grid / side, rewards) / beta + reference
    best = beta * tilted.logsumexp(-1).mean(-1).min()
    solution = solve_dual(rewards, beta, reference)
    assert solution.value <= best.item() + 1e-9
    assert solution.value == pytest.approx(best.item(), abs=2e-3)
    assert solution.slack < 1e-5


def dual_objective(weights, rewards, beta, reference):
    """The dual at some weights and its gradient, by autograd."""
    point = weights.clone().requires_grad_()
    value = beta * (rewards @ point / beta + reference).logsumexp(-1).mean()
    return value.item(), torch.autograd.grad(value, point)[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.5, 5.0]), st.integers(1, 4))
def test_weak_duality(seed, beta, groups):
    rewards, reference = random_problem(seed, groups=groups)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(groups, generator=generator, dtype=torch.float64).softmax(0)
    policy = (reference + torch.randn(reference.shape, generator=generator, dtype=torch.float64)).log_softmax(
        -1
    )
    utilities, kl = utilities_and_kl(policy, rewards, reference)
    solution = solve_dual(rewards, beta, reference)
    bound, _ = dual_objective(weights, rewards, beta, reference)
    assert solution.value <= bound + 1e-9
    assert solution.gap(utilities, kl) >= -max(1e-9, solution.slack)


@pytest.mark.parametrize("seed", range(5))
def test_the_policy_of_the_weights_closes_the_gap(seed):
    rewards, reference = random_problem(seed)
    solution = solve_dual(rewards, 0.3, reference)
    utilities, kl = utilities_and_kl(optimal_policy(solution, rewards, reference), rewards, reference)
    assert solution.gap(utilities, kl) == pytest.approx(0.0, abs=1e-5)
    # The gap of any other policy is value minus its worst group's F.
    reference_utilities, _ = utilities_and_kl(reference, rewards, reference)
    assert solution.gap(reference_utilities, 0.0) == pytest.approx(
        solution.value - reference_utilities.min().item(), abs=1e-12
    )


def test_gradient_of_the_dual():
    rewards, reference = random_problem(0)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    value, gradient = dual_objective(weights, rewards, 0.4, reference)
    terms, gradients = dual_terms(weights.numpy(), rewards.numpy(), 0.4, reference.numpy())
    assert terms.mean() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(torch.from_numpy(gradients.mean(0)), gradient)


def test_one_group_is_the_log_partition_function():
    rewards, reference = random_problem(1, groups=1)
    solution = solve_dual(rewards, 0.5, reference)
    expected = 0.5 * (rewards.squeeze(-1) / 0.5 + reference).logsumexp(-1).mean()
    assert solution.weights.tolist() == [1.0]
    assert solution.value == pytest.approx(expected.item(), abs=1e-12)


def test_log_weights_may_take_responses_out():
    rewards, reference = random_problem(2)
    padded = torch.cat([rewards, torch.full((3, 2, 3), 50.0, dtype=torch.float64)], 1)
    padded_reference = torch.cat([reference, torch.full((3, 2), -torch.inf, dtype=torch.float64)], 1)
    assert solve_dual(padded, 0.3, padded_reference).value == pytest.approx(
        solve_dual(rewards, 0.3, reference).value, abs=1e-7
    )


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_a_common_shift_moves_the_value_alone(shift):
    rewards, reference = random_problem(3)
    solution, shifted = solve_dual(rewards, 0.3, reference), solve_dual(rewards + shift, 0.3, reference)
    assert shifted.value - shift == pytest.approx(solution.value, abs=1e-5)
    torch.testing.assert_close(shifted.weights, solution.weights, atol=1e-3, rtol=0)


def test_bad_input_raises():
    rewards, reference = random_problem(0)
    with pytest.raises(ValueError, match="beta must be positive"):
        solve_dual(rewards, 0.0)
    with pytest.raises(ValueError, match=r"\[prompts, responses, groups\]"):
        solve_dual(rewards[0], 0.1)
    with pytest.raises(ValueError, match=r"log_weights must be \[prompts, responses\]"):
        solve_dual(rewards, 0.1, reference[:, :2])
    with pytest.raises(ValueError, match="rewards hold NaN"):
        solve_dual(rewards.index_fill(1, torch.tensor([0]), torch.nan), 0.1)
    with pytest.raises(ValueError, match="at least one finite entry"):
        solve_dual(rewards, 0.1, torch.full_like(reference, -torch.inf))
    with pytest.raises(ValueError, match=r"utilities of shape \[3\]"):
        solve_dual(rewards, 0.1).gap(torch.zeros(2), 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_slack_bounds_the_distance_to_the_optimum(seed, monkeypatch):
    """Of a solver that is stopped early, whose value is above the optimum."""
    rewards, reference = random_problem(seed)
    exact = solve_dual(rewards, 0.3, reference)
    assert exact.slack == pytest.approx(0.0, abs=1e-5)

    def hasty(function, start, **settings):
        return minimize(function, start, **{**settings, "options": {"ftol": 1e-14, "maxiter": 1}})

    monkeypatch.setattr("torchrl_maxmin.welfare.dual.minimize", hasty)
    early = solve_dual(rewards, 0.3, reference)
    missing = early.value - exact.value
    assert missing > 1e-4
    assert missing <= early.slack
    # The duality gap of the policy that belongs to the weights: g minus its worst group.
    _, gradient = dual_objective(early.weights, rewards, 0.3, reference)
    assert early.slack == pytest.approx((gradient @ early.weights - gradient.min()).item(), rel=1e-9)
    utilities, kl = utilities_and_kl(optimal_policy(early, rewards, reference), rewards, reference)
    assert early.slack == pytest.approx(early.gap(utilities, kl), abs=1e-9)
