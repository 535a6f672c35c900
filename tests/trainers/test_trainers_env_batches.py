"""What a rollout in an environment becomes, against plain loops in float64."""

import numpy as np
import pytest
import torch
import trainers_envs
from trainers_runs import EnvPPORun


def first_batch(config):
    """The first rollout of a run, with its advantages."""
    trainer = EnvPPORun(config)
    return trainer, trainer.first_batch()


def numbers(batch, *key):
    return batch[key].double().numpy()


def finished_returns(batch):
    """Returns [E, K] of the episodes that end in the first rollout, added up step by step."""
    rewards, done = numbers(batch, "next", "group_reward"), batch["next", "done"].numpy()
    finished, where = [], []
    for copy_, (steps, ends) in enumerate(zip(rewards, done, strict=True)):
        total = np.zeros(rewards.shape[-1])
        for t, (reward, end) in enumerate(zip(steps, ends, strict=True)):
            total = total + reward
            if end:
                finished.append(total)
                where.append((copy_, t))
                total = np.zeros_like(total)
    return np.array(finished), where


def scalar_gae(reward, value, next_value, done, terminated, gamma, lmbda):
    """One copy and one group, [T] each."""
    advantage, running = np.zeros(len(reward)), 0.0
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        running = delta + gamma * lmbda * (1 - done[t]) * running
        advantage[t] = running
    return advantage


def oracle(trainer, batch, reward):
    """Advantage [N, T] before whitening and value target [N, T, K], from rewards [N, T, K]."""
    config = trainer.config
    with torch.no_grad():
        now, later = (
            trainer.critic.module(looks).double().numpy()
            for looks in (batch["observation"], batch["next", "observation"])
        )
    done, terminated = (numbers(batch, "next", name)[..., 0] for name in ("done", "terminated"))
    columns = np.zeros_like(reward)
    for n in range(len(reward)):
        for k in range(reward.shape[-1]):
            columns[n, :, k] = scalar_gae(
                reward[n, :, k] / trainer.utility_scale, now[n, :, k], later[n, :, k],
                done[n], terminated[n], config.gamma, config.lam,
            )  # fmt: skip
    weights = numbers(batch, "group_weights")[0, 0]
    return columns @ weights, columns + now


@pytest.mark.parametrize("cut", [0, 5])
def test_a_batch_is_three_scalar_gaes_weighted_and_whitened(make_env_config, cut):
    config = make_env_config(gamma=0.97, lam=0.9, tau=0.5, max_episode_steps=cut)
    trainer, batch = first_batch(config)
    assert batch.shape == (8, 8)
    done, terminated = batch["next", "done"], batch["next", "terminated"]
    assert bool((done & ~terminated).any()) == bool(cut)  # episodes cut short are valued on
    advantage, target = oracle(trainer, batch, numbers(batch, "next", "group_reward"))
    whitened = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    np.testing.assert_allclose(numbers(batch, "advantage")[..., 0], whitened, atol=2e-5)
    np.testing.assert_allclose(numbers(batch, "value_target"), target, atol=2e-5)


def test_utilities_are_means_of_finished_episodes_and_weights_answer_them(make_env_config):
    config = make_env_config(tau=0.5)
    trainer, batch = first_batch(config)
    returns, _ = finished_returns(batch)
    assert 8 < len(returns) < 64
    utilities = numbers(batch, "group_utilities")
    np.testing.assert_allclose(utilities[0, 0], returns.mean(0), atol=1e-5)
    assert (utilities == utilities[0, 0]).all()
    # from equal weights, half way in logarithms to softmin(u / (tau scale))
    logits = -0.5 * returns.mean(0) / (0.5 * trainer.utility_scale)
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(numbers(batch, "group_weights")[0, 0], expected, atol=1e-5)
    assert expected.max() - expected.min() > 0.05


def test_mean_of_mins_pays_the_least_return_when_the_episode_ends(make_env_config):
    trainer, batch = first_batch(make_env_config(objective="mean_of_mins", gamma=0.97))
    returns, where = finished_returns(batch)
    expected = np.zeros((8, 8, 1))
    for (n, t), value in zip(where, returns.min(-1), strict=True):
        expected[n, t] = value
    np.testing.assert_allclose(numbers(batch, "next", "reward"), expected, atol=1e-5)
    assert batch["group_weights"].unique().tolist() == [1.0]
    np.testing.assert_allclose(
        numbers(batch, "group_utilities").ravel()[0], returns.min(-1).mean(), atol=1e-5
    )
    advantage, target = oracle(trainer, batch, expected)
    whitened = (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)
    np.testing.assert_allclose(numbers(batch, "advantage")[..., 0], whitened, atol=2e-5)
    np.testing.assert_allclose(numbers(batch, "value_target"), target, atol=2e-5)


def test_returns_are_measured_in_deviations_of_the_first_policy(make_env_config):
    trainer = EnvPPORun(
        make_env_config(env_id="trainers_envs:arms", num_envs=4096, frames_per_batch=4096, total_frames=4096)
    )
    # the first policy is near uniform over the arms
    assert trainer.utility_scale == pytest.approx(trainers_envs.ARMS.std(0).mean(), rel=0.06)
    assert trainer.adversary.scale == trainer.utility_scale
    given = EnvPPORun(make_env_config("given", utility_scale=7.0))
    assert (given.utility_scale, given.adversary.scale) == (7.0, 7.0)


def test_a_larger_reward_has_a_larger_scale_and_the_same_advantages(make_env_config):
    small, plain = first_batch(make_env_config("plain"))
    trainer, large = first_batch(make_env_config("large", env_options={"factor": 10.0}))
    assert trainer.utility_scale == pytest.approx(10 * small.utility_scale, rel=1e-5)
    torch.testing.assert_close(large["group_utilities"], 10 * plain["group_utilities"])
    torch.testing.assert_close(large["group_weights"], plain["group_weights"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(large["advantage"], plain["advantage"], atol=1e-4, rtol=1e-4)
