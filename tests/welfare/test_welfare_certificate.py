import math

import pytest
import torch

from torchrl_maxmin.welfare import certify, solve_dual

PROMPTS, RESPONSES, GROUPS = 40, 128, 3


class World:
    """Enumerated responses: every expectation is exact, and samples can be drawn."""

    def __init__(self, beta, strength, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.beta = beta
        self.rewards = 0.5 * torch.randn(PROMPTS, RESPONSES, GROUPS, generator=generator, dtype=torch.float64)
        self.reference = torch.randn(
            PROMPTS, RESPONSES, generator=generator, dtype=torch.float64
        ).log_softmax(-1)
        solution = solve_dual(self.rewards, beta, self.reference)
        tilt = strength * (self.rewards @ solution.weights) / beta
        self.policy = (self.reference + tilt).log_softmax(-1)
        policy = self.policy.exp()
        utilities = torch.einsum("xn,xnk->xk", policy, self.rewards).mean(0)
        kl = (policy * (self.policy - self.reference)).sum(-1).mean()
        self.gap = max(solution.gap(utilities, kl), 0.0)

    def sample(self, prompts, responses, generator):
        """The arguments of certify, from ``responses`` draws for each of ``prompts`` drawn prompts."""
        x = torch.randint(PROMPTS, (prompts,), generator=generator)
        half = responses // 2
        own = torch.multinomial(self.policy[x].exp(), half, True, generator=generator)
        theirs = torch.multinomial(self.reference[x].exp(), half, True, generator=generator)
        y = torch.cat([own, theirs], 1)
        log_policy, log_reference = self.policy[x].gather(1, y), self.reference[x].gather(1, y)
        log_mixture = torch.logaddexp(log_policy, log_reference) - math.log(2)
        rewards = self.rewards[x].gather(1, y.unsqueeze(-1).expand(-1, -1, GROUPS))
        terms = rewards - self.beta * (log_policy - log_reference).unsqueeze(-1)
        return rewards, log_reference - log_mixture - math.log(responses), terms[:, :half].mean(1)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_interval_covers_the_exact_gap(strength):
    world = World(beta=0.5, strength=strength)
    generator = torch.Generator().manual_seed(1)
    covered = above = 0
    for _ in range(40):
        certificate = certify(*world.sample(32, 64, generator), world.beta)
        assert certificate.reason is None
        assert 0.0 <= certificate.low <= certificate.value <= certificate.high
        covered += certificate.low - 1e-6 <= world.gap <= certificate.high + 1e-6
        above += world.gap <= certificate.high + 1e-6
    assert above == 40
    assert covered >= 37


def test_more_responses_and_prompts_narrow_the_interval():
    world = World(beta=0.5, strength=0.5)
    generator = torch.Generator().manual_seed(2)
    wide = certify(*world.sample(16, 64, generator), world.beta)
    narrow = certify(*world.sample(256, 256, generator), world.beta)
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    assert narrow.value == pytest.approx(world.gap, abs=0.02)


def test_a_policy_that_misses_the_best_responses_is_not_certified_as_optimal():
    world = World(beta=0.5, strength=1.0)
    # Take away what the optimal policy likes most, everywhere.
    worst = world.policy.topk(20, dim=1).indices
    world.policy = world.policy.scatter(1, worst, -40.0).log_softmax(-1)
    policy = world.policy.exp()
    utilities = torch.einsum("xn,xnk->xk", policy, world.rewards).mean(0)
    kl = (policy * (world.policy - world.reference)).sum(-1).mean()
    gap = solve_dual(world.rewards, world.beta, world.reference).gap(utilities, kl)
    certificate = certify(*world.sample(64, 64, torch.Generator().manual_seed(3)), world.beta)
    assert gap > 0.2
    assert certificate.low > 0.1
    assert certificate.high >= gap


def test_few_effective_samples_give_a_reason_and_no_number():
    world = World(beta=0.02, strength=0.0)
    certificate = certify(*world.sample(32, 64, torch.Generator().manual_seed(0)), world.beta)
    assert (certificate.value, certificate.low, certificate.high) == (None, None, None)
    assert "effective sample size" in certificate.reason
    assert "below 10" in certificate.reason


def test_a_half_without_reference_weight_gives_a_reason():
    log_weights = torch.full((4, 16), -torch.inf)
    log_weights[:, 0] = 0.0
    certificate = certify(torch.zeros(4, 16, 2), log_weights, torch.zeros(4, 2), 0.1)
    assert certificate.value is None
    assert "positive reference weight" in certificate.reason


def test_one_prompt_gives_a_reason():
    certificate = certify(torch.zeros(1, 16, 2), torch.zeros(1, 16), torch.zeros(1, 2), 0.1)
    assert certificate.high is None
    assert "standard error" in certificate.reason


def test_constant_rewards_leave_no_gap():
    rewards = torch.tensor([1.0, 2.0]).expand(8, 16, 2)
    log_weights = torch.full((8, 16), -math.log(16))
    certificate = certify(rewards, log_weights, rewards.mean(1), 0.1)
    assert certificate.low == pytest.approx(0.0, abs=1e-6)
    assert certificate.high == pytest.approx(0.0, abs=1e-6)


def test_the_halves_are_balanced_in_either_layout():
    # Policy samples carry almost all weight: a half with too few of them would see another Z.
    rewards = torch.zeros(8, 16, 2)
    block = torch.tensor([-20.0] * 8 + [-math.log(8)] * 8).expand(8, 16)
    alternating = torch.tensor([-20.0, -math.log(8)] * 8).expand(8, 16)
    for log_weights in (block, alternating):
        certificate = certify(rewards, log_weights, torch.zeros(8, 2), 1.0, min_effective_samples=4)
        assert certificate.value == pytest.approx(0.0, abs=1e-6)


def test_the_policy_may_be_given_by_its_responses_terms():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 64, 2, generator=generator, dtype=torch.float64)
    log_weights, terms = torch.full((8, 64), -math.log(64)), rewards[:, :32]
    by_response, by_mean = (certify(rewards, log_weights, u, 1.0) for u in (terms, terms.mean(1)))
    for end in ("value", "low", "high"):
        assert getattr(by_response, end) == pytest.approx(getattr(by_mean, end), abs=1e-12)


def test_given_prompts_leave_the_responses_alone_unsure():
    """Prompts that differ much, responses that do not: sure of these prompts, unsure of others."""
    generator = torch.Generator().manual_seed(0)
    level = 5 * torch.randn(8, 1, 2, generator=generator, dtype=torch.float64)
    rewards = level + 0.1 * torch.randn(8, 64, 2, generator=generator, dtype=torch.float64)
    log_weights = torch.full((8, 64), -math.log(64))
    drawn, given = (
        certify(rewards, log_weights, rewards[:, :32], 1.0, prompts=which) for which in ("drawn", "given")
    )
    assert given.value == drawn.value
    assert given.high - given.low < 0.1 < drawn.high - drawn.low
    one = certify(rewards[:1], log_weights[:1], rewards[:1, :32], 1.0, prompts="given")
    assert one.reason is None


def test_bad_input_raises():
    rewards, log_weights, utilities = torch.zeros(4, 16, 2), torch.zeros(4, 16), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="multiple of 4"):
        certify(rewards[:, :6], log_weights[:, :6], utilities, 0.1)
    with pytest.raises(ValueError, match=r"policy_utilities must be \[prompts, groups\]"):
        certify(rewards, log_weights, utilities[0], 0.1)
    with pytest.raises(ValueError, match="policy_utilities hold NaN"):
        certify(rewards, log_weights, utilities * torch.nan, 0.1)
    with pytest.raises(ValueError, match="confidence"):
        certify(rewards, log_weights, utilities, 0.1, confidence=1.0)
    with pytest.raises(ValueError, match="'drawn' or 'given'"):
        certify(rewards, log_weights, utilities, 0.1, prompts="fixed")
    with pytest.raises(ValueError, match="the standard errors come from the responses"):
        certify(rewards, log_weights, utilities, 0.1, prompts="given")
    with pytest.raises(ValueError, match="beta must be positive"):
        certify(rewards, log_weights, utilities, -1.0)
