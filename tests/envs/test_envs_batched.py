"""What every batched environment keeps: specs, seeds, partial resets, batches of batches, devices' copies."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torchrl.envs import ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs import (
    BatchedEnv,
    FishwoodEnv,
    FruitTreeEnv,
    GridworldEnv,
    GroupReward,
    TabularEnv,
    VectorMDP,
)

FULL = VectorMDP.random(4, 3, 2)


def leaving(gamma=1.0):
    """A process that ends with chance .3 in every step."""
    return VectorMDP(0.7 * FULL.transition, FULL.reward, FULL.initial, gamma)


def fruits(num_envs, **options):
    table = np.random.default_rng(0).random((8, 3))
    return FruitTreeEnv(num_envs, depth=3, fruits=table, **options)


MAKERS = {
    "fishwood": lambda n, **options: FishwoodEnv(n, horizon=6, **options),
    "fruit-tree": fruits,
    "gridworld": lambda n, **options: GridworldEnv(n, horizon=5, **options),
    "gridworld-once": lambda n, **options: GridworldEnv(n, horizon=5, once=True, stay=True, **options),
    "tabular": lambda n, **options: TabularEnv(FULL, n, **options),
    "tabular-ending": lambda n, **options: TabularEnv(leaving(), n, **options),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every
@pytest.mark.parametrize("num_envs", [1, 7])
def test_specs(make, num_envs):
    env = make(num_envs)
    check_env_specs(env, seed=0)
    data = env.rollout(4, break_when_any_done=False)
    assert data["observation"].dtype is data["next", "reward"].dtype is torch.float32
    assert data["state"].dtype is data["action"].dtype is torch.int64
    assert data["observation"].shape[:2] == data["state"].shape[:2] == (num_envs, 4)
    assert data["observation"].ndim == data["state"].ndim == 3
    check_env_specs(TransformedEnv(make(num_envs), GroupReward()), seed=0)


@every
def test_the_seed_decides_all(make):
    def rollout(env):
        torch.manual_seed(0)  # of the random actions
        return env.rollout(20, break_when_any_done=False)

    first, again, other = rollout(make(5, seed=3)), rollout(make(5, seed=3)), rollout(make(5, seed=4))
    assert (first == again).all()
    env = make(5, seed=9)
    env.set_seed(3)
    assert (rollout(env) == first).all()
    if make in (MAKERS["fishwood"], MAKERS["tabular"], MAKERS["tabular-ending"]):
        assert not torch.equal(first["next", "reward"], other["next", "reward"])


@every
def test_only_the_copies_asked_for_start_again(make):
    env = make(6, seed=1)
    data = env.rand_step(env.reset())["next"]
    chosen = torch.tensor([True, False, False, True, True, False])
    before = data.clone()
    data["_reset"] = chosen[:, None]
    after = env.reset(data)
    for key in ("observation", "state"):
        assert torch.equal(after[key][~chosen], before[key][~chosen])
    assert not after["done"][chosen].any()
    if make not in (MAKERS["tabular"], MAKERS["tabular-ending"]):  # whose first states are drawn
        assert torch.equal(after["state"][chosen], env.reset()["state"][chosen])


@every
def test_episodes_go_on_from_a_state_that_is_given(make):
    """Nothing is kept between steps: a step is a function of its input (and of the generator)."""
    env, state = make(5, seed=2), make(5, seed=0).reset()
    torch.manual_seed(1)
    state = env.rand_action(state)
    env.set_seed(0)
    one = env.step(state.clone())["next"]
    env.rollout(3)
    env.set_seed(0)
    two = env.step(state.clone())["next"]
    assert (one == two).all()


@every
def test_copies_and_pickles_go_on_alike(make):
    env = make(4, seed=5)
    env.rollout(3)
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        mine, theirs = copy.deepcopy(env), twin
        outs = []
        for one in (mine, theirs):
            torch.manual_seed(3)
            outs.append(one.rollout(8, break_when_any_done=False))
        assert (outs[0] == outs[1]).all()


def always_first(td):
    return td.set("action", torch.zeros(td.batch_size, dtype=torch.int64))


@every
def test_serial_and_parallel_environments_of_them_are_the_same(make):
    """Each member keeps its own copies; ends inside a member restart those copies alone."""
    outs = []
    for kind, options in ((SerialEnv, {}), (ParallelEnv, {"mp_start_method": "fork"})):
        env = kind(2, lambda: make(3), **options)
        env.set_seed(7)
        outs.append(env.rollout(9, always_first, break_when_any_done=False).contiguous())
        env.close()
    assert outs[0].batch_size == (2, 3, 9)
    assert (outs[0] == outs[1]).all()
    one = make(3)
    one.set_seed(7)  # the first member's
    alone = one.rollout(9, always_first, break_when_any_done=False)
    for key in ("observation", "state", ("next", "reward"), ("next", "done")):
        assert torch.equal(outs[0][0][key], alone[key])


def test_a_rollout_until_all_are_done_leaves_those_that_are():
    env = MAKERS["tabular-ending"](6, seed=1)
    torch.manual_seed(0)
    data = env.rollout(200, break_when_any_done=False, break_when_all_done=True)
    done = data["next", "done"][..., 0]
    assert done[:, -1].all()
    assert not done[:, :-1].all(0).any()
    lengths = (~done).sum(1) + 1
    assert lengths.unique().numel() > 1
    for copy_, length in zip(data, lengths.tolist(), strict=True):
        assert (copy_["next", "state"][length - 1 :] == 4).all()
        assert (copy_["next", "state"][: length - 1] < 4).all()
    # waiting costs and pays nothing
    idle = env.reset()
    idle["state"][0], idle["observation"][0], idle["done"][0], idle["terminated"][0] = 4, 0, True, True
    idle["_step"] = ~idle["done"]
    stepped = env.rand_step(idle)["next"]
    assert stepped["state"][0].item() == 4
    assert stepped["done"][0].item() is stepped["terminated"][0].item() is True
    assert stepped["reward"][0].tolist() == [0.0, 0.0]
    assert (stepped["reward"][1:] > 0).all()


def test_ends_terminate_and_truncate_where_they_say_so():
    for name, truncates in (("fishwood", True), ("fruit-tree", False), ("gridworld", False)):
        env = MAKERS[name](4)
        data = env.rollout(50)
        horizon = {"fishwood": 6, "fruit-tree": 3, "gridworld": 5}[name]
        assert data.shape[1] == horizon
        ends = torch.arange(1, horizon + 1) == horizon
        for key in ("done", "terminated", "truncated")[: 3 if truncates else 2]:
            assert torch.equal(data["next", key][..., 0], ends.expand(4, horizon))
        assert ("truncated" in set(data.keys())) is truncates


def test_an_ending_table_is_its_process():
    """Ends with the missing chance, pays on the way out, and simulates the exact return."""
    mdp = leaving()
    policy = np.random.default_rng(0).dirichlet(np.ones(3), size=4)
    chances = torch.as_tensor(policy)

    def act(td):
        return td.set("action", torch.multinomial(chances[td["observation"].argmax(-1)], 1).squeeze(-1))

    env = TransformedEnv(TabularEnv(mdp, 4000, seed=1), GroupReward())
    torch.manual_seed(0)
    data = env.rollout(60, act, break_when_any_done=False)
    ended = data["next", "done"][..., 0]
    first = ended.float().argmax(1)
    assert ended.any(1).all()  # .7 ** 60 of not ending at all
    totals = data["next", "episode_reward"][torch.arange(4000), first].double()
    error = totals.std(0) / 4000**0.5
    assert ((totals.mean(0) - torch.as_tensor(mdp.returns(policy))).abs() < 4 * error).all()
    rate = ended.double().mean()
    assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / ended.numel()) ** 0.5
    assert (data["next", "observation"][ended] == 0).all()
    assert (data["next", "observation"].sum(-1)[~ended] == 1).all()


class Countdown(BatchedEnv):
    """The smallest subclass, with a cut of its own beside the end."""

    def __init__(self, num_envs):
        sizes = {"observation_size": 1, "state_size": 1, "num_actions": 2, "num_groups": 2}
        super().__init__(num_envs, **sizes, truncates=True)

    def _first(self):
        return torch.arange(self.num_envs)[:, None] + 2

    def _move(self, state, action):
        return state - 1, torch.eye(2)[action], state == 1, (state == 5) & (action == 1)[:, None]

    def _look(self, state):
        return state.float()


def test_a_subclass_of_one_s_own():
    check_env_specs(Countdown(6))
    data = Countdown(6).rollout(3, lambda td: td.set("action", torch.ones(6, dtype=torch.int64)))
    assert data.shape == (6, 1)  # the copy that starts at 5 is cut at once
    assert data["next", "truncated"].flatten().tolist() == [False, False, False, True, False, False]
    assert torch.equal(data["next", "truncated"], data["next", "done"])
    assert not data["next", "terminated"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_to_another_device_takes_the_tables_along():
    env = FishwoodEnv(3)
    assert env.to("cpu") is env
    there = TransformedEnv(env, GroupReward(scale=[1.0, 2.0])).to("cuda")
    assert there.rollout(4)["next", "reward"].device.type == "cuda"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FishwoodEnv(0), "num_envs must be at least 1, got 0"),
        (lambda: FishwoodEnv(2, fish_chance=1.5), r"fish_chance must be in \[0, 1\], got 1.5"),
        (lambda: FishwoodEnv(2, horizon=0), "horizon must be at least 1"),
        (lambda: GridworldEnv(2, size=1), "size must be at least 2, got 1"),
        (lambda: GridworldEnv(2, horizon=0), "horizon must be at least 1"),
        (lambda: FruitTreeEnv(2, depth=3, fruits=np.ones((4, 2))), r"depth 3 .*got \[4, 2\]"),
        (lambda: FruitTreeEnv(2, depth=4), "fruits for depth 5, 6, 7, not 4"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(UserError, match=match):
        make()
