"""The group-reward transform: values against sums by hand, episodes that do not leak, every nesting."""

import numpy as np
import pytest
import torch
from torchrl.envs import Compose, ParallelEnv, RewardSum, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs import FishwoodEnv, FruitTreeEnv, GroupReward, TabularEnv, VectorMDP

MATRIX = [[1.0, 0.0], [0.25, 0.75], [0.0, 2.0]]
CALIBRATED = {"matrix": MATRIX, "scale": [1.0, 2.0, 0.5], "shift": [0.5, 0.0, -1.0]}
OPTIONS = {
    "plain": {},
    "minimum": {"minimum": True},
    "calibrated": CALIBRATED,
    "calibrated-minimum": {**CALIBRATED, "minimum": True},
}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def leaving(num_envs=4, seed=0):
    """Episodes of random length: every step ends one with chance .3, and no copy waits for another."""
    full = VectorMDP.random(4, 3, 2, seed=1)
    return TabularEnv(VectorMDP(0.7 * full.transition, full.reward, full.initial, 1.0), num_envs, seed=seed)


def grouped(options, num_envs=4):
    return TransformedEnv(leaving(num_envs), GroupReward(**options))


def always_first(td):
    return td.set("action", torch.zeros(td.batch_size, dtype=torch.int64))


def by_hand(reward, done, options):
    """Group rewards and running sums [N, T, K] in float64, one step at a time."""
    matrix = np.asarray(options.get("matrix", np.eye(reward.shape[-1])))
    groups = reward.double().numpy() @ matrix.T - options.get("shift", 0.0)
    groups = groups / options.get("scale", 1.0)
    totals = np.zeros_like(groups)
    for copy in range(len(groups)):
        running = np.zeros(groups.shape[-1])
        for time in range(groups.shape[1]):
            running = running + groups[copy, time]
            totals[copy, time] = running
            if done[copy, time, 0]:
                running = np.zeros_like(running)
    return torch.as_tensor(groups), torch.as_tensor(totals)


@every
def test_values_and_no_leak_from_one_episode_to_the_next(options):
    torch.manual_seed(0)
    data = grouped(options).rollout(60, break_when_any_done=False)
    torch.manual_seed(0)
    plain = leaving().rollout(60, break_when_any_done=False)
    assert torch.equal(plain["action"], data["action"])
    done = data["next", "done"]
    assert done.sum() > 40
    groups, totals = by_hand(plain["next", "reward"], done, options)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(data["next", "group_reward"], groups, **close)
    torch.testing.assert_close(data["next", "episode_group_reward"], totals, **close)
    reward = data["next", "reward"]
    if options.get("minimum"):
        assert reward.shape == (4, 60, 1)
        least = torch.where(done, totals.amin(-1, keepdim=True), 0.0)
        torch.testing.assert_close(reward, least, **close)
        torch.testing.assert_close(data["next", "episode_reward"], least, **close)
    else:
        torch.testing.assert_close(reward, groups, **close)
        torch.testing.assert_close(data["next", "episode_reward"], totals, **close)
    # what a step starts from: zero after an end, else what the step before left
    started = data["episode_group_reward"]
    assert (started[:, 0] == 0).all()
    before = torch.where(done[:, :-1], 0.0, data["next", "episode_group_reward"][:, :-1])
    assert torch.equal(started[:, 1:], before)


@pytest.mark.parametrize("options", [{}, OPTIONS["calibrated-minimum"]], ids=["plain", "calibrated-minimum"])
def test_specs_alone_and_in_every_nesting(options):
    check_env_specs(grouped(options))
    check_env_specs(TransformedEnv(leaving(), Compose(StepCounter(3), GroupReward(**options))))
    fork = {"mp_start_method": "fork"}
    for nested in (
        SerialEnv(2, lambda: grouped(options)),
        TransformedEnv(SerialEnv(2, leaving), GroupReward(**options)),
        ParallelEnv(2, lambda: grouped(options), **fork),
        TransformedEnv(ParallelEnv(2, leaving, **fork), GroupReward(**options)),
    ):
        check_env_specs(nested)
        nested.close()


@pytest.mark.parametrize("options", [{}, OPTIONS["calibrated-minimum"]], ids=["plain", "calibrated-minimum"])
def test_inside_and_outside_of_a_batch_of_environments_give_the_same(options):
    outs = []
    for make in (
        lambda: SerialEnv(2, lambda: grouped(options)),
        lambda: TransformedEnv(SerialEnv(2, leaving), GroupReward(**options)),
        lambda: ParallelEnv(2, lambda: grouped(options), mp_start_method="fork"),
    ):
        env = make()
        env.set_seed(3)
        outs.append(env.rollout(30, always_first, break_when_any_done=False).contiguous())
        env.close()
    assert outs[0]["next", "done"].sum() > 20
    for other in outs[1:]:
        for key in ("reward", "group_reward", "episode_group_reward", "episode_reward", "done"):
            assert torch.equal(outs[0]["next", key], other["next", key])


def test_a_partial_reset_starts_only_its_copies():
    env = TransformedEnv(FishwoodEnv(4, fish_chance=1.0, wood_chance=1.0), GroupReward())
    data = env.rand_step(env.rand_step(env.reset())["next"])["next"]
    held = data["episode_group_reward"].clone()
    chosen = torch.tensor([True, False, True, False])
    data["_reset"] = chosen[:, None]
    after = env.reset(data)
    assert (after["episode_group_reward"][chosen] == 0).all()
    assert (after["episode_reward"][chosen] == 0).all()
    assert torch.equal(after["episode_group_reward"][~chosen], held[~chosen])
    assert (held.sum(-1) == 2).all()


def test_the_minimum_is_paid_where_a_limit_cuts_an_episode():
    env = TransformedEnv(FishwoodEnv(3), Compose(StepCounter(7), GroupReward(minimum=True)))
    data = env.rollout(21, break_when_any_done=False)
    reward = data["next", "reward"].view(3, 3, 7)
    assert (reward[..., :-1] == 0).all()
    gathered = data["next", "group_reward"].view(3, 3, 7, 2).sum(2)
    assert torch.equal(reward[..., -1], gathered.amin(-1))


def test_sums_are_those_of_reward_sum():
    both = Compose(GroupReward(), RewardSum(in_keys=["reward"], out_keys=["their_sum"]))
    data = TransformedEnv(leaving(), both).rollout(40, break_when_any_done=False)
    assert torch.equal(data["next", "their_sum"], data["next", "episode_group_reward"])


def test_mean_of_mins_and_min_of_means_of_a_tree():
    """Two leaves taken in turn: the mean return is even, and no single return is."""
    env = FruitTreeEnv(2, depth=1, fruits=[[4.0, 0.0], [0.0, 4.0]])
    turns = torch.tensor([0, 1])
    returns = {}
    for minimum in (False, True):
        grouped_env = TransformedEnv(env, GroupReward(minimum=minimum))
        data = grouped_env.rollout(1, lambda td: td.set("action", turns))
        returns[minimum] = data["next", "episode_reward"][:, -1].mean(0)
    assert returns[False].tolist() == [2.0, 2.0]
    assert returns[True].tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"matrix": [[1.0, 2.0, 3.0]]}, "matrix has 3 columns and the environment 2 objectives"),
        ({"matrix": [1.0, 2.0]}, r"matrix must be finite numbers of shape \[K, D\]"),
        ({"matrix": [[1.0, float("nan")]]}, "matrix must be finite"),
        ({"scale": [1.0, 0.0]}, "scale must be positive"),
        ({"scale": [1.0, 1.0, 1.0]}, "scale has 3 numbers for 2 groups"),
        ({"matrix": MATRIX, "shift": [1.0, 1.0]}, "shift has 2 numbers for 3 groups"),
    ],
)
def test_mistakes(options, match):
    with pytest.raises(UserError, match=match):
        grouped(options).rollout(2)


def test_stored_data_are_refused():
    data = leaving().rollout(3)
    with pytest.raises(NotImplementedError, match="belongs in an environment"):
        GroupReward()(data)
