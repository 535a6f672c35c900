import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from torchrl_maxmin.welfare import certify, solve_dual
from torchrl_maxmin.welfare.certificate import spend_unseen

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
    log_weights = torch.full((16, 16), -torch.inf)
    log_weights[:, 0] = 0.0
    certificate = certify(torch.zeros(16, 16, 2), log_weights, torch.zeros(16, 2), 0.1)
    assert certificate.value is None
    assert "positive reference weight" in certificate.reason


def test_one_prompt_gives_a_reason():
    certificate = certify(torch.zeros(1, 16, 2), torch.zeros(1, 16), torch.zeros(1, 2), 0.1)
    assert certificate.high is None
    assert "standard error" in certificate.reason


def test_constant_rewards_leave_no_gap():
    rewards = torch.tensor([1.0, 2.0]).expand(16, 16, 2)
    log_weights = torch.full((16, 16), -math.log(16))
    certificate = certify(rewards, log_weights, rewards.mean(1), 0.1)
    assert certificate.low == pytest.approx(0.0, abs=1e-6)
    assert certificate.high == pytest.approx(0.0, abs=1e-6)


def test_the_halves_are_balanced_in_either_layout():
    # Policy samples carry almost all weight: a half with too few of them would see another Z.
    rewards = torch.zeros(16, 16, 2)
    block = torch.tensor([-20.0] * 8 + [-math.log(8)] * 8).expand(16, 16)
    alternating = torch.tensor([-20.0, -math.log(8)] * 8).expand(16, 16)
    for log_weights in (block, alternating):
        certificate = certify(rewards, log_weights, torch.zeros(16, 2), 1.0, min_effective_samples=4)
        assert certificate.value == pytest.approx(0.0, abs=1e-6)


def test_the_policy_may_be_given_by_its_responses_terms():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(16, 64, 2, generator=generator, dtype=torch.float64)
    log_weights, terms = torch.full((16, 64), -math.log(64)), rewards[:, :32]
    by_response, by_mean = (certify(rewards, log_weights, u, 1.0) for u in (terms, terms.mean(1)))
    for end in ("value", "low", "high"):
        assert getattr(by_response, end) == pytest.approx(getattr(by_mean, end), abs=1e-12)


def test_given_prompts_leave_the_responses_alone_unsure():
    """Prompts that differ much, responses that do not: sure of these prompts, unsure of others."""
    generator = torch.Generator().manual_seed(0)
    level = 5 * torch.randn(16, 1, 2, generator=generator, dtype=torch.float64)
    rewards = level + 0.1 * torch.randn(16, 64, 2, generator=generator, dtype=torch.float64)
    log_weights = torch.full((16, 64), -math.log(64))
    drawn, given = (
        certify(rewards, log_weights, rewards[:, :32], 1.0, prompts=which) for which in ("drawn", "given")
    )
    assert given.value == drawn.value
    assert given.high - given.low < 0.1 < drawn.high - drawn.low
    one = certify(rewards[:1], log_weights[:1], rewards[:1, :32], 1.0, prompts="given")
    assert one.reason is None


@pytest.mark.parametrize(("share", "prompts"), [(0.01, 16), (0.05, 16), (0.05, 64), (0.2, 16)])
def test_a_policy_that_is_bad_on_few_prompts_is_not_called_good(share, prompts):
    """Student's t says less than the gap in half and more of such cases: it sees only what was drawn."""
    world = World(beta=2.0, strength=1.0)
    worst = world.rewards.sum(-1).argmin(1, keepdim=True)
    bad = (0.02 * world.policy.exp()).scatter_add(1, worst, torch.full_like(world.policy[:, :1], 0.98))
    utilities = []
    for policy in (world.policy.exp(), bad):
        terms = world.rewards - world.beta * (policy.log() - world.reference)[..., None]
        utilities.append((policy[..., None] * terms).sum(1).mean(0))
    mixed = (1 - share) * utilities[0] + share * utilities[1]
    gap = solve_dual(world.rewards, world.beta, world.reference).value - float(mixed.min())
    generator, usual = torch.Generator().manual_seed(4), world.policy
    for _ in range(15):
        count = int((torch.rand(prompts, generator=generator) < share).sum())
        parts = []
        for policy, some in ((usual, prompts - count), (bad.log(), count)):
            world.policy = policy
            parts += [world.sample(some, 64, generator)] if some else []
        certificate = certify(*(torch.cat(each) for each in zip(*parts, strict=True)), world.beta)
        assert certificate.value is None or certificate.high >= gap


def test_a_dropped_rare_mode_is_in_the_statement_or_within_the_bound():
    beta, mass = 1.0, 0.001
    world = World(beta=beta, strength=1.0)
    top = world.rewards.amax(1, keepdim=True) + 8 * beta
    world.rewards = torch.cat([world.rewards, top], 1)
    rare = torch.full((PROMPTS, 1), math.log(mass), dtype=torch.float64)
    world.reference = torch.cat([world.reference + math.log1p(-mass), rare], 1)
    world.policy = torch.cat([world.policy, torch.full_like(rare, -80.0)], 1)
    policy = world.policy.exp()
    utilities = torch.einsum("xn,xnk->xk", policy, world.rewards).mean(0)
    kl = (policy * (world.policy - world.reference)).sum(-1).mean()
    gap = solve_dual(world.rewards, beta, world.reference).gap(utilities, kl)
    generator, numbers = torch.Generator().manual_seed(5), 0
    for _ in range(15):
        sampled = world.sample(16, 64, generator)
        alone = certify(*sampled, beta)
        bounded = certify(*sampled, beta, reward_bound=float(world.rewards.abs().max()))
        if alone.value is None:
            assert "effective sample size" in alone.reason
            continue
        numbers += 1
        assert alone.mass > mass
        assert alone.worth < 8 * beta  # what it says of such responses is what is not so here
        assert f"below {alone.mass:.2g} is worth more than {alone.worth:.3g}" in alone.statement
        assert bounded.high >= gap
        assert bounded.worth > 8 * beta
        assert bounded.high > alone.high
    assert numbers >= 3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 8)), min_size=1, max_size=5), st.floats(1e-4, 0.3))
def test_the_unseen_mass_is_spent_where_it_raises_the_bound_most(prompts, mass):
    """Against the maximum of ``mean_x log(c_x + q_x (best_x - c_x))`` over masses, found by scipy."""
    log_c, above = np.array(prompts).T
    damping, lift = spend_unseen(log_c, log_c + above, mass)
    np.testing.assert_allclose(damping, np.exp(-lift))
    count, most = len(log_c), np.expm1(above)

    def negative(share):
        return -np.log1p(share * mass * count * most).mean()

    found = minimize(
        negative,
        np.full(count, 1 / count),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda share: share.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert lift.mean() >= -found.fun - 1e-6
    assert lift.mean() == pytest.approx(-found.fun, rel=1e-3, abs=1e-5)


def test_more_looks_and_a_looser_bound_widen_the_interval():
    sampled = World(beta=0.5, strength=0.5).sample(32, 64, torch.Generator().manual_seed(6))
    once, often = certify(*sampled, 0.5), certify(*sampled, 0.5, looks=20)
    stricter = certify(*sampled, 0.5, confidence=1 - 0.05 / 20)
    for name in ("low", "high", "mass", "prompt_mass"):
        assert getattr(often, name) == pytest.approx(getattr(stricter, name))
    assert often.value == once.value
    assert often.high > once.high
    assert often.mass > once.mass
    assert often.low <= once.low
    highs = [certify(*sampled, 0.5, reward_bound=bound).high for bound in (3.0, 5.0, 50.0)]
    assert once.high < highs[0] < highs[1] < highs[2]


@pytest.mark.parametrize("count", [1, 2, 15])
def test_few_prompts_give_a_reason(count):
    sampled = World(beta=0.5, strength=0.5).sample(count, 64, torch.Generator().manual_seed(7))
    certificate = certify(*sampled, 0.5)
    assert (certificate.value, certificate.statement, certificate.worth) == (None, None, None)
    assert f"{count} of them" in certificate.reason
    assert "use 16 or more" in certificate.reason
    assert count < 2 or certify(*sampled, 0.5, min_prompts=2).value is not None


def test_a_reward_above_the_bound_gives_a_reason():
    sampled = World(beta=0.5, strength=0.5).sample(16, 64, torch.Generator().manual_seed(8))
    largest = float(sampled[0].abs().max())
    certificate = certify(*sampled, 0.5, reward_bound=0.9 * largest)
    assert certificate.high is None
    assert f"a reward of size {largest:.4g} was seen, above the given bound" in certificate.reason
    assert certify(*sampled, 0.5, reward_bound=1.01 * largest).reason is None


def test_the_numbers_of_the_statement():
    """From the sample size: what is above the mass would have been drawn with .9875, prompts with .99375."""
    sampled = World(beta=0.5, strength=0.5).sample(32, 64, torch.Generator().manual_seed(9))
    drawn = certify(*sampled, 0.5)
    assert (1 - drawn.mass) ** (32 * 32) == pytest.approx(0.0125)
    assert (1 - drawn.prompt_mass) ** 32 == pytest.approx(0.0125 / GROUPS)
    assert 0 < drawn.worth < float(sampled[0].max() - sampled[0].min())
    assert drawn.high <= drawn.prompt_loss
    for number in (drawn.mass, drawn.prompt_mass):
        assert f"{number:.2g}" in drawn.statement
    terms = sampled[0][:, :32]
    given_prompts = certify(sampled[0], sampled[1], terms, 0.5, prompts="given")
    assert (given_prompts.mass, given_prompts.worth) == (drawn.mass, drawn.worth)
    assert given_prompts.prompt_mass is None
    assert "kind of prompt" not in given_prompts.statement


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
    for wrong in ({"looks": 0}, {"reward_bound": 0.0}, {"reward_bound": math.nan}):
        with pytest.raises(ValueError, match="looks at least 1 and reward_bound positive"):
            certify(rewards, log_weights, utilities, 0.1, **wrong)
    with pytest.raises(ValueError, match="'drawn' or 'given'"):
        certify(rewards, log_weights, utilities, 0.1, prompts="fixed")
    with pytest.raises(ValueError, match="the standard errors come from the responses"):
        certify(rewards, log_weights, utilities, 0.1, prompts="given")
    with pytest.raises(ValueError, match="beta must be positive"):
        certify(rewards, log_weights, utilities, -1.0)
