"""Minimum of the means against mean of the minima: the bandit that tells them apart."""

import math

import pytest
import torch
from welfare_bandits import mirror_ascent, objective

from torchrl_maxmin.welfare import ExponentiatedGradient, FixedWeights, solve_dual

BETA = 0.1
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3]], dtype=torch.float64)  # arms by groups


def trained(adversary, rewards):
    """Logits after mirror ascent on the rewards [arms, K] that the adversary weighs."""
    logits = torch.zeros(3, dtype=torch.float64)
    for _ in range(2000):
        log_policy = logits.log_softmax(-1)
        policy = log_policy.exp()
        gradient = rewards @ adversary.update(policy @ rewards).double() - BETA * log_policy
        logits = logits + 0.2 * (gradient - policy @ gradient)
    return logits


def test_the_dual_of_the_bandit():
    solution = solve_dual(REWARDS[None], BETA)
    assert solution.value == pytest.approx(0.466, abs=0.005)
    torch.testing.assert_close(solution.weights, torch.full((2,), 0.5).double(), atol=1e-6, rtol=0)


def test_a_policy_trained_at_population_level_reaches_it():
    value = solve_dual(REWARDS[None], BETA).value
    reached = objective(trained(ExponentiatedGradient(2, 0.1), REWARDS), REWARDS, BETA).item()
    assert reached == pytest.approx(0.466, abs=0.005)
    assert reached <= value + 1e-9
    values, _ = mirror_ascent(ExponentiatedGradient(2, 0.1), REWARDS, 0.2, 2000, beta=BETA)
    assert values.mean().item() == pytest.approx(value, abs=1e-3)


def test_the_mean_of_the_minima_is_another_objective():
    smallest = REWARDS.min(-1, keepdim=True).values
    logits = trained(FixedWeights([1.0]), smallest)
    assert objective(logits, smallest, BETA).item() == pytest.approx(0.200, abs=0.005)
    assert objective(logits, REWARDS, BETA).item() == pytest.approx(0.245, abs=0.005)
    closed_form = BETA * math.log((2 + math.exp(0.3 / BETA)) / 3)
    assert objective(logits, smallest, BETA).item() == pytest.approx(closed_form, abs=1e-6)
