"""Advantages of the tokens of responses against a loop over single tokens in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import float32_bound
from tensordict import TensorDict
from torchrl.data.llm import AdaptiveKLController, ConstantKLController

from torchrl_maxmin.trainers.token_advantages import TokenAdvantages

WIDTH, GAMMA, LMBDA = 6, 0.97, 0.9
KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}


class Given:
    """Models whose reference and critic answer what they were given."""

    def __init__(self, ref_log_prob, values):
        self.known = ref_log_prob, values

    def ref_log_prob(self, rows):
        return self.known[0]

    def values(self, rows):
        return self.known[1]


def make(lengths, groups, seed, kl=None, estimator="k1", beta=0.3):
    generator = torch.Generator().manual_seed(seed)
    size = len(lengths)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    reward = draw(size, groups)
    batch = TensorDict(
        {
            "prompt_tokens": torch.zeros(size, 1, dtype=torch.int64),
            "prompt_mask": torch.ones(size, 1, dtype=torch.bool),
            "action": torch.zeros(size, WIDTH, dtype=torch.int64),
            "action_mask": mask,
            # what lies behind the end must not matter
            "sample_log_prob": draw(size, WIDTH),
            "group_weights": torch.rand(size, groups, generator=generator),
            "next": {"reward": reward, "group_reward": reward},
        },
        [size],
    )
    models = Given(draw(size, WIDTH), draw(size, WIDTH, groups + 1))
    kl = kl or ConstantKLController(kl_coef=beta)
    advantages = TokenAdvantages(models, kl, estimator, gamma=GAMMA, lmbda=LMBDA, fresh=False)
    return batch, models, advantages


def oracle(batch, models, estimator, beta):
    """Weighted advantage [B, R] before whitening and value target [B, R, K + 1], 0 at padding."""
    reference, value = (x.double().numpy() for x in models.known)
    log_prob, reward = batch["sample_log_prob"].double().numpy(), batch["next", "reward"].double().numpy()
    weights, mask = batch["group_weights"].double().numpy(), batch["action_mask"].numpy()
    advantage, target = np.zeros(mask.shape), np.zeros(value.shape)
    for b in range(len(mask)):
        length, running = mask[b].sum(), np.zeros(value.shape[-1])
        for t in reversed(range(length)):
            paid = np.zeros(value.shape[-1])
            paid[-1] = -beta * KL[estimator](log_prob[b, t] - reference[b, t])
            following = np.zeros_like(paid)
            if t == length - 1:
                paid[:-1] = reward[b]
            else:
                following = value[b, t + 1]
            delta = paid + GAMMA * following - value[b, t]
            running = delta + GAMMA * LMBDA * running
            target[b, t] = running + value[b, t]
            advantage[b, t] = running[:-1] @ weights[b] + running[-1]
    return advantage, target


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, WIDTH), min_size=2, max_size=5),
    st.integers(1, 3),
    st.floats(0, 2),
    st.sampled_from(sorted(KL)),
    st.integers(0, 99),
)
def test_against_a_loop(lengths, groups, beta, estimator, seed):
    batch, models, advantages = make(lengths, groups, seed, estimator=estimator, beta=beta)
    rows, _ = advantages(batch)
    expected, target = oracle(batch, models, estimator, beta)
    mask = batch["action_mask"].numpy()
    bound = float32_bound(np.abs(target).max() + np.abs(expected).max() + 1)
    np.testing.assert_allclose(rows["value_target"].numpy()[mask], target[mask], atol=bound)
    spread = expected[mask].std()
    if spread > 1e-3:
        whitened = (expected - expected[mask].mean()) / spread
        np.testing.assert_allclose(
            rows["advantage"].squeeze(-1).numpy()[mask], whitened[mask], atol=4 * bound / spread
        )
    assert (rows["advantage"].squeeze(-1).numpy()[~mask] == 0).all()


def test_the_penalty_moves_on_the_kl_after_the_rollout_that_paid_it():
    kl = AdaptiveKLController(init_kl_coef=0.3, target=0.01, horizon=40)
    batch, models, advantages = make([3, 6, 1], 2, 0, kl)
    batch["sample_log_prob"] = models.known[0] + 0.5  # far above the target
    _, metrics = advantages(batch)
    assert metrics["objective/kl"] == pytest.approx(0.5 * 10 / 3)
    assert metrics["objective/kl_coef"] == 0.3
    assert advantages.state_dict() == {"kl_coef": pytest.approx(0.3 * (1 + 0.2 * 3 / 40))}


@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_truncated_rollouts_pay_for_what_was_sampled_and_train_the_whole_policy(cap):
    batch, models, advantages = make([3, 6, 1], 2, 0)
    sampled, ref_log_prob = batch["sample_log_prob"].clone(), models.known[0]
    batch["whole_log_prob"] = whole = sampled - torch.rand(3, WIDTH)
    advantages.importance_sampling_cap = cap
    models.log_prob = lambda rows: whole
    rows, metrics = advantages(batch)
    assert torch.equal(rows["sample_log_prob"], whole)  # what PPO's ratio is taken to

    plain, _, same = make([3, 6, 1], 2, 0)
    expected, plain_metrics = same(plain)
    mask = batch["action_mask"]
    bound = float32_bound(10.0)
    target = rows["value_target"][mask] - expected["value_target"][mask]
    assert target.abs().max() < bound  # the penalty is that of the truncated distribution
    weight = (whole - sampled).exp().clamp(max=cap) if cap else torch.ones(3, WIDTH)
    difference = rows["advantage"].squeeze(-1) - expected["advantage"].squeeze(-1) * weight
    assert difference[mask].abs().max() < bound
    assert metrics["objective/kl"] == plain_metrics["objective/kl"]
    kl = ((sampled - ref_log_prob) * mask).sum(-1).mean()
    assert metrics["objective/kl"] == pytest.approx(float(kl), abs=float32_bound(10.0))
