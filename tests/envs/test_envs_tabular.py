"""The tabular environment against its own process, and a game on it against the exact answer."""

import numpy as np
import pytest
import torch
from torchrl.envs import RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.envs import TabularEnv, VectorMDP, solve_max_min, solve_weighted
from torchrl_maxmin.welfare import ExponentiatedGradient, HardMin


@pytest.mark.parametrize("num_envs", [1, 5])
def test_specs(num_envs):
    check_env_specs(TabularEnv(VectorMDP.random(4, 3, 2), num_envs))


def test_transitions_and_rewards_are_the_process_s():
    mdp = VectorMDP.random(3, 2, 2, seed=1)
    env = TabularEnv(mdp, num_envs=4000, seed=3)
    data = env.rollout(5)
    state, action = data["observation"].argmax(-1), data["action"]
    rewards = torch.as_tensor(mdp.reward).float()[state, action]
    assert torch.equal(data["next", "reward"], rewards)
    following = data["next", "observation"].argmax(-1)
    for s in range(3):
        for a in range(2):
            here = (state == s) & (action == a)
            share = following[here].bincount(minlength=3) / here.sum()
            torch.testing.assert_close(
                share.double(), torch.as_tensor(mdp.transition[s, a]), atol=0.04, rtol=0
            )
    first = state[:, 0].bincount(minlength=3) / 4000
    torch.testing.assert_close(first.double(), torch.as_tensor(mdp.initial), atol=0.04, rtol=0)


def test_the_seed_decides_and_copies_reset_alone():
    mdp = VectorMDP.random(4, 2, 2)

    def first_action(td):
        return td.set("action", torch.zeros(6, dtype=torch.int64))

    runs = [TabularEnv(mdp, 6, seed=7).rollout(10, first_action) for _ in range(2)]
    assert torch.equal(runs[0]["observation"], runs[1]["observation"])
    env = TabularEnv(mdp, 6, seed=1)
    state = env.reset()
    before = state["observation"].clone()
    state["_reset"] = torch.tensor([[True], [False], [False], [True], [False], [False]])
    after = env.reset(state)["observation"]
    kept = torch.tensor([False, True, True, False, True, True])
    assert torch.equal(after[kept], before[kept])


def test_a_simulated_return_is_the_exact_one():
    mdp = VectorMDP.random(4, 3, 2, gamma=0.8, seed=2)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    chances = torch.as_tensor(policy)

    def act(td):
        chance = chances[td["observation"].argmax(-1)]
        return td.set("action", torch.multinomial(chance, 1).squeeze(-1))

    torch.manual_seed(0)
    rewards = TabularEnv(mdp, 4000, seed=1).rollout(40, act)["next", "reward"].double()
    discounted = (rewards * 0.8 ** torch.arange(40)[:, None]).sum(1)
    error = discounted.std(0) / 4000**0.5
    exact = torch.as_tensor(mdp.returns(policy))
    assert ((discounted.mean(0) - exact).abs() < 4 * error + 5 * 0.8**40).all()


def test_the_collector_sees_the_worst_group_of_finished_episodes():
    mdp = VectorMDP.random(4, 3, 3, seed=4)
    env = TransformedEnv(TabularEnv(mdp, 8, seed=0), StepCounter(5))
    env = TransformedEnv(env, RewardSum())
    collector = MaxMinCollector(env, None, adversary=HardMin(3), frames_per_batch=80, total_frames=80)
    data = next(iter(collector))
    episodes = data["next", "episode_reward"][data["next", "done"].squeeze(-1)]
    assert len(episodes) == 16
    torch.testing.assert_close(data["group_utilities"][0, 0], episodes.mean(0))
    assert data["group_weights"][0, 0].argmax() == episodes.mean(0).argmin()
    collector.shutdown()


def test_a_serial_env_of_them():
    def make():
        return TransformedEnv(TabularEnv(VectorMDP.random(4, 3, 2), 1), StepCounter(4))

    assert SerialEnv(3, make).rollout(4)["next", "reward"].shape == (3, 1, 4, 2)


def duality_gap(mdp, iterations):
    """Natural policy gradient against exponentiated gradient, both optimistic: gap of the average."""
    scale, states, groups = 1 - mdp.gamma, len(mdp.initial), mdp.num_groups
    adversary = ExponentiatedGradient(groups, step_size=10.0, optimistic=True)
    weights, logits, last = adversary.weights.double().numpy(), np.zeros(mdp.reward.shape[:2]), None
    average_returns, average_weights, total = np.zeros(groups), np.zeros(groups), 0
    for t in range(1, iterations + 1):
        policy = np.exp(logits - logits.max(-1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        moves = np.einsum("sa,san->sn", policy, mdp.transition)
        rewards = np.einsum("sa,sak->sk", policy, mdp.reward)
        values = scale * np.linalg.solve(np.eye(states) - mdp.gamma * moves, rewards)
        returns = mdp.initial @ values
        average_returns, average_weights = average_returns + t * returns, average_weights + t * weights
        total += t
        quality = scale * mdp.reward @ weights + mdp.gamma * mdp.transition @ (values @ weights)
        ascent = 20.0 * (quality - (policy * quality).sum(1, keepdims=True))
        logits, last = logits + 2 * ascent - (ascent if last is None else last), ascent
        weights = adversary.update(torch.as_tensor(returns)).double().numpy()
    average_weights /= average_weights.sum()
    upper = scale * solve_weighted(mdp, average_weights).value
    return upper - (average_returns / total).min(), scale * solve_max_min(mdp).value


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_the_average_iterate_closes_the_duality_gap(count):
    """Averages of returns are returns of a policy: that of the averaged occupancies."""
    rng, near = np.random.default_rng(0), 0
    for seed in range(count):
        mdp = VectorMDP.random(*rng.integers(2, 7, size=3), seed=seed)
        gap, value = duality_gap(mdp, 5000 if count == 200 else 1500)
        assert gap >= -1e-8
        near += gap <= 1e-2 * abs(value)
    assert near >= 0.99 * count
