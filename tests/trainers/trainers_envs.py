"""Environments of the tests, found by name as a user's would be."""

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, MOGymEnv, SerialEnv, TransformedEnv

from torchrl_maxmin.envs import TabularEnv, VectorMDP
from torchrl_maxmin.envs.gym import FlatObservation

# two groups: one arm for each, and one that gives both a little
ARMS = np.array([[1.0, 0.1], [0.0, 0.5], [0.2, 0.2]])


def arms(num_envs, seed):
    """One state, one step."""
    process = VectorMDP(np.zeros((1, 3, 1)), ARMS[None], np.ones(1), gamma=1.0)
    return TabularEnv(process, num_envs, seed=seed)


def walk(num_envs, seed, ends=0.25, factor=1.0, kind=TabularEnv):
    """Four states, three groups; an episode ends after any step with the same chance."""
    endless = VectorMDP.random(states=4, actions=2, groups=3, seed=5)
    reward = factor * (endless.reward - np.array([0.4, 0.6, 0.5]))
    process = VectorMDP((1 - ends) * endless.transition, reward, endless.initial, gamma=1.0)
    return kind(process, num_envs, seed=seed)


def endless(num_envs, seed):
    """The walk without an end."""
    return TabularEnv(VectorMDP.random(states=4, actions=2, groups=3, seed=5), num_envs, seed=seed)


class Poisoned(TabularEnv):
    """NaN for one group in one copy, from a given step on."""

    steps_left = 10**9

    def _move(self, state, action):
        following, reward, ends, cut = super()._move(state, action)
        Poisoned.steps_left -= 1
        if Poisoned.steps_left < 0:
            reward = reward.clone()
            reward[1, 0] = torch.nan
        return following, reward, ends, cut


def poisoned(num_envs, seed):
    return walk(num_envs, seed, kind=Poisoned)


class Dial(EnvBase):
    """One step, one number in [-2, 2]: the groups want 0.4 and 1.2, and pay for the squared distance."""

    def __init__(self, num_envs):
        super().__init__(batch_size=[num_envs])
        self.observation_spec = Composite(observation=Unbounded(shape=(num_envs, 1)), shape=(num_envs,))
        self.action_spec = Bounded(-2.0, 2.0, shape=(num_envs, 1))
        self.reward_spec = Unbounded(shape=(num_envs, 2))

    def _reset(self, tensordict=None, **_):
        return TensorDict({"observation": torch.ones(*self.batch_size, 1)}, self.batch_size)

    def _step(self, tensordict):
        entries = {
            "observation": torch.ones(*self.batch_size, 1),
            "reward": -((tensordict["action"] - torch.tensor([0.4, 1.2])) ** 2),
            "done": torch.ones(*self.batch_size, 1, dtype=torch.bool),
            "terminated": torch.ones(*self.batch_size, 1, dtype=torch.bool),
        }
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        """Nothing is random here."""


def dial(num_envs, seed):
    return Dial(num_envs)


def one_hot_fishwood(num_envs, seed):
    """MO-Gymnasium's own, with TorchRL's one-hot actions."""
    import mo_gymnasium  # noqa: F401 - registers it

    def one():
        env = MOGymEnv("fishwood-v0")
        return TransformedEnv(env, FlatObservation(env.observation_spec["observation"]))

    env = SerialEnv(num_envs, one)
    env.set_seed(seed)
    return env
