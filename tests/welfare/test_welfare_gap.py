"""The duality gap that is logged: exact on enumerated responses, a bound at any weights, 0 at the optimum."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from welfare_bandits import BANDITS, BETA

from torchrl_maxmin.welfare import ExponentiatedGradient, duality_gap, solve_dual


def problem(seed, prompts=3, arms=6, groups=3):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, arms, groups, generator=generator, dtype=torch.float64)
    logits = torch.randn(2, prompts, arms, generator=generator, dtype=torch.float64)
    weights = torch.randn(groups, generator=generator, dtype=torch.float64).softmax(0)
    return rewards, *logits.log_softmax(-1), weights


def utilities_and_kl(policy, rewards, reference):
    utilities = torch.einsum("xn,xnk->xk", policy.exp(), rewards).mean(0)
    return utilities, (policy.exp() * (policy - reference)).sum(-1).mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.5, 5.0]))
def test_it_bounds_the_exact_gap_and_its_parts_are_not_negative(seed, beta):
    rewards, reference, policy, weights = problem(seed)
    utilities, kl = utilities_and_kl(policy, rewards, reference)
    gap = duality_gap(weights, rewards, beta, utilities, kl, reference)
    solution = solve_dual(rewards, beta, reference)
    assert gap.total.item() >= solution.gap(utilities, kl) - 1e-9
    assert gap.policy.item() >= -1e-12
    assert gap.adversary.item() >= -1e-12
    assert gap.total.item() == pytest.approx((gap.policy + gap.adversary).item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_at_the_best_weights_it_is_the_exact_gap(seed):
    rewards, reference, policy, _ = problem(seed)
    utilities, kl = utilities_and_kl(policy, rewards, reference)
    solution = solve_dual(rewards, 0.3, reference)
    gap = duality_gap(solution.weights, rewards, 0.3, utilities, kl, reference)
    assert gap.total.item() == pytest.approx(solution.gap(utilities, kl), abs=1e-12)


def test_the_best_response_leaves_the_adversary_its_part_alone():
    rewards, reference, _, weights = problem(7)
    response = (reference + rewards @ weights / 0.3).log_softmax(-1)
    gap = duality_gap(weights, rewards, 0.3, *utilities_and_kl(response, rewards, reference), reference)
    assert gap.policy.item() == pytest.approx(0.0, abs=1e-12)
    assert gap.adversary.item() > 0.01


@pytest.mark.parametrize("name", BANDITS)
def test_it_closes_while_a_policy_trains(name):
    rewards, logits = BANDITS[name], torch.zeros(len(BANDITS[name]), dtype=torch.float64)
    adversary = ExponentiatedGradient(rewards.shape[1], 0.1)
    reference = torch.zeros_like(logits).log_softmax(-1)
    totals = []
    for _ in range(1000):
        policy = logits.log_softmax(-1)
        utilities, kl = utilities_and_kl(policy[None], rewards[None], reference[None])
        totals.append(duality_gap(adversary.weights, rewards[None], BETA, utilities, kl).total.item())
        gradient = rewards @ adversary.update(utilities).double() - BETA * (policy - reference)
        logits = logits + 0.5 * (gradient - policy.exp() @ gradient)
    assert totals[0] > 0.1
    assert totals[-1] < 1e-3


def test_single_precision_agrees_and_half_is_raised_to_it():
    rewards, reference, policy, weights = problem(1)
    utilities, kl = utilities_and_kl(policy, rewards, reference)
    exact = duality_gap(weights, rewards, 0.1, utilities, kl, reference)
    single = duality_gap(
        weights.float(), rewards.float(), 0.1, utilities.float(), kl.float(), reference.float()
    )
    assert single.total.dtype == torch.float32
    assert single.total.item() == pytest.approx(exact.total.item(), abs=1e-5)
    assert duality_gap(weights, rewards.bfloat16(), 0.1, utilities, kl).total.dtype == torch.float32


def test_bad_input_raises():
    rewards, reference, _, weights = problem(0)
    with pytest.raises(ValueError, match="beta must be positive"):
        duality_gap(weights, rewards, 0.0, weights, 0.0)
    with pytest.raises(ValueError, match=r"\[prompts, responses, groups\]"):
        duality_gap(weights, rewards[0], 0.1, weights, 0.0)
    with pytest.raises(ValueError, match=r"weights and utilities must be \[3\]"):
        duality_gap(weights[:2], rewards, 0.1, weights, 0.0)
    with pytest.raises(ValueError, match=r"log_weights must be \[prompts, responses\]"):
        duality_gap(weights, rewards, 0.1, weights, 0.0, reference[:, :2])
