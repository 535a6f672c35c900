"""Fishwood and the fruit tree step by step against MO-Gymnasium, and all three against their processes."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from torchrl_maxmin.envs import FishwoodEnv, FruitTreeEnv, GridworldEnv, solve_max_min, solve_weighted
from torchrl_maxmin.envs.optional import require_mo_gymnasium

TREES = {depth: FruitTreeEnv(1, depth=depth) for depth in (5, 6, 7)}


class Scripted:
    """Stands for a generator of numpy; gives what is next in a list."""

    def __init__(self, values):
        self.values = iter(values)

    def random(self):
        return next(self.values)


@pytest.mark.parametrize("chances", [(0.1, 0.9), (0.4, 0.3)])
def test_fishwood_is_mo_gymnasium_s_for_the_same_draws(chances):
    """Two episodes of 200 steps, every copy with its own actions and draws."""
    mo = require_mo_gymnasium("the test")
    rng, copies = np.random.default_rng(0), 3
    draws = rng.random((400, copies), dtype=np.float32)
    actions = rng.integers(2, size=(400, copies))
    env = FishwoodEnv(copies, fish_chance=chances[0], wood_chance=chances[1])
    theirs = [mo.make("fishwood-v0", fishproba=chances[0], woodproba=chances[1]) for _ in range(copies)]
    for index, one in enumerate(theirs):
        one.unwrapped.np_random = Scripted(draws[:, index])
    state, seen = env.reset(), [int(one.reset()[0][0]) for one in theirs]
    for step in range(400):
        assert state["observation"].argmax(-1).tolist() == seen
        env._uniform = lambda *_, step=step: torch.as_tensor(draws[step])
        state["action"] = torch.as_tensor(actions[step])
        stepped, state = env.step_and_maybe_reset(state)
        for index, one in enumerate(theirs):
            place, reward, terminated, truncated, _ = one.step(int(actions[step, index]))
            following = stepped["next"][index]
            assert following["reward"].tolist() == reward.tolist()
            assert following["observation"].argmax() == place[0]
            assert following["terminated"].item() is terminated is ((step + 1) % 200 == 0)
            assert following["truncated"].item() is truncated
            seen[index] = int((one.reset()[0] if terminated else place)[0])


def test_fishwood_gathers_with_its_chances():
    data = FishwoodEnv(500, fish_chance=0.2, wood_chance=0.7, seed=3).rollout(200)
    place, reward = data["observation"].argmax(-1), data["next", "reward"]
    for here, chance in ((0, 0.2), (1, 0.7)):
        gathered = reward[place == here]
        assert (gathered[:, 1 - here] == 0).all()
        hits = int(gathered[:, here].sum())
        expected = [len(gathered) * chance, len(gathered) * (1 - chance)]
        assert chisquare([hits, len(gathered) - hits], expected).pvalue > 1e-4
        # a draw does not depend on the one before it, nor on its neighbour's
    woods = (place[:, :-1] == 1) & (place[:, 1:] == 1)
    before, after = reward[:, :-1][woods][:, 1], reward[:, 1:][woods][:, 1]
    assert abs(np.corrcoef(before, after)[0, 1]) < 4 / len(before) ** 0.5


@pytest.mark.parametrize("depth", [5, 6, 7])
def test_every_path_to_a_fruit_is_mo_gymnasium_s(depth):
    theirs = require_mo_gymnasium("the test").make("fruit-tree-v0", depth=depth)
    paths = torch.tensor(list(itertools.product((0, 1), repeat=depth)))
    env = FruitTreeEnv(len(paths), depth=depth)
    steps = iter(paths.T)
    data = env.rollout(depth + 1, lambda td: td.set("action", next(steps)))
    assert data.shape == (2**depth, depth)
    assert torch.equal(data["action"], paths)
    assert torch.equal(data["next", "reward"][:, -1].double(), torch.as_tensor(env.fruits).float().double())
    for path, ours in zip(paths.tolist(), data, strict=True):
        place, _ = theirs.reset()
        for action, step in zip(path, ours, strict=True):
            assert step["observation"].argmax() == 2 ** place[0] - 1 + place[1]
            place, reward, terminated, truncated, _ = theirs.step(action)
            assert step["next", "reward"].tolist() == reward.tolist()
            assert step["next", "terminated"].item() is terminated
            assert not truncated
            assert step["next", "state"].item() == 2 ** place[0] - 1 + place[1]


def test_a_tree_needs_mo_gymnasium_or_a_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "mo_gymnasium.envs.fruit_tree.fruit_tree", None)
    with pytest.raises(ValueError, match=r"a fruit tree without a table.*pip install 'torchrl-maxmin\[mo\]'"):
        FruitTreeEnv(2)
    assert FruitTreeEnv(2, depth=1, fruits=[[1.0], [2.0]]).process().returns([[0.5, 0.5]]) == 1.5


def states_of(env):
    """Every state of the process as the environment writes it, in the process's order."""
    if isinstance(env, GridworldEnv):
        return env.states()
    if isinstance(env, FishwoodEnv):
        time, place = torch.cartesian_prod(torch.arange(env.horizon), torch.arange(2)).unbind(-1)
        return torch.stack([place, time], -1)
    return torch.arange(2**env.depth - 1)[:, None]


GRIDS = [
    {"size": size, "horizon": horizon, "stay": stay, "move_cost": cost, "once": once}
    for size, horizon, stay, cost, once in (
        (4, 12, False, 0.0, False),
        (3, 4, True, 0.25, False),
        (4, 7, True, 0.05, True),
        (2, 3, False, 0.5, True),
    )
]
CLASSICS = {
    **{f"fruit-tree-{depth}": (FruitTreeEnv, {"depth": depth}) for depth in TREES},
    "fishwood": (FishwoodEnv, {"horizon": 30, "fish_chance": 0.1, "wood_chance": 0.9}),
    "sure-fishwood": (FishwoodEnv, {"horizon": 5, "fish_chance": 1.0, "wood_chance": 1.0}),
    **{f"gridworld-{i}": (GridworldEnv, options) for i, options in enumerate(GRIDS)},
}


@pytest.mark.parametrize(("kind", "options"), CLASSICS.values(), ids=CLASSICS)
def test_every_move_is_the_process_s(kind, options):
    """All states and actions at once: next state, expected reward, end and observation."""
    process = kind(1, **options).process()
    actions = process.reward.shape[1]
    states = states_of(kind(1, **options))
    env = kind(len(states) * actions, **options)
    state = states.repeat_interleave(actions, 0)
    action = torch.arange(actions).repeat(len(states))
    batch = env.reset()
    batch["state"], batch["action"] = state, action
    moved = env.step(batch)["next"]
    looks = env.observations()
    assert len(looks) == len(states) == len(process.initial)
    assert torch.equal(env._look(states), looks)
    # nothing is drawn about where a move leads: at most one next state, certain, and else the end
    moves = torch.as_tensor(process.moves.toarray())
    ends = moves.sum(-1) == 0
    assert torch.equal(moves.max(-1).values, 1.0 - ends.double())
    assert torch.equal(moved["terminated"][:, 0], ends)
    following = states[moves.argmax(-1)]
    assert torch.equal(moved["state"][~ends], following[~ends])
    assert torch.equal(moved["observation"][~ends], looks[moves.argmax(-1)][~ends])
    expected = torch.as_tensor(process.reward).flatten(0, 1)
    if kind is FishwoodEnv:
        place = state[:, 0]
        env._uniform = lambda *_: torch.zeros(len(state))  # less than any chance: everything is gathered
        gathered = env.step(batch)["next", "reward"].double()
        assert torch.equal(gathered, torch.eye(2)[place].double())
        chances = torch.tensor([options["fish_chance"], options["wood_chance"]])
        expected = torch.where(expected > 0, 1.0, 0.0) * chances[place][:, None]
        torch.testing.assert_close(expected.double(), torch.as_tensor(process.reward).flatten(0, 1))
    else:
        torch.testing.assert_close(moved["reward"], expected.float())
    first = torch.as_tensor(process.initial).argmax()
    assert process.initial.max() == 1.0
    assert torch.equal(env.reset()["observation"], looks[first].expand(len(state), -1))


def simulated(env, table, steps, seed):
    """Returns [N, K] of whole episodes under a policy given for every state of the process."""
    states, chances = states_of(env), torch.as_tensor(table)
    index = {tuple(row): i for i, row in enumerate(states.tolist())}

    def act(td):
        rows = [index.get(tuple(row), 0) for row in td["state"].tolist()]
        return td.set("action", torch.multinomial(chances[rows], 1).squeeze(-1))

    torch.manual_seed(seed)
    return env.rollout(steps, act)["next", "reward"].double().sum(1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    size=st.integers(2, 4),
    horizon=st.integers(1, 8),
    stay=st.booleans(),
    cost=st.sampled_from([0.0, 0.1]),
    once=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_simulated_gridworld_has_the_exact_returns(size, horizon, stay, cost, once, seed):
    env = GridworldEnv(1500, size=size, horizon=horizon, stay=stay, move_cost=cost, once=once)
    process = env.process()
    table = np.random.default_rng(seed).dirichlet(np.full(process.reward.shape[1], 2.0), len(process.initial))
    totals = simulated(env, table, horizon, seed)
    error = totals.std(0) / len(totals) ** 0.5
    exact = torch.as_tensor(process.returns(table))
    rare = 5 / len(totals)  # what so few episodes show of an event is no measure of its spread
    assert ((totals.mean(0) - exact).abs() <= 5 * error + rare).all()


def test_a_simulated_fishwood_has_the_exact_returns():
    env = FishwoodEnv(3000, horizon=20, seed=2)
    table = np.tile([[0.6, 0.4], [0.9, 0.1]], (20, 1))
    totals = simulated(env, table, 20, seed=0)
    error = totals.std(0) / len(totals) ** 0.5
    assert ((totals.mean(0) - torch.as_tensor(env.process().returns(table))).abs() < 4 * error).all()


def visits_both(env, policy, episodes_seed=0):
    """The share of episodes that visit both goals, under a policy for every state of the process."""
    states, chances = states_of(env), torch.as_tensor(policy)
    index = {tuple(row): i for i, row in enumerate(states.tolist())}

    def act(td):
        rows = [index[tuple(row)] for row in td["state"].tolist()]
        return td.set("action", torch.multinomial(chances[rows], 1).squeeze(-1))

    torch.manual_seed(episodes_seed)
    cells = env.rollout(env.horizon, act)["next", "state"][..., 0]
    goals = (env.size - 1, env.size**2 - 1)
    return ((cells == goals[0]).any(1) & (cells == goals[1]).any(1)).double().mean().item()


@pytest.mark.parametrize(
    ("options", "value", "both"),
    [
        ({}, 4.375, 0.625),  # 10 p + (1 - p) = 7 (1 - p): p = 3/8 of the episodes stay at the first goal
        ({"horizon": 10}, 10 / 3, 2 / 3),  # 8 p + (1 - p) = 5 (1 - p): p = 1/3
        ({"horizon": 6}, 1.0, 1.0),  # just time to get to both
        ({"once": True}, 1.0, 1.0),
        ({"once": True, "stay": True, "move_cost": 0.05}, 0.7, 1.0),  # six moves
    ],
)
def test_the_max_min_of_a_gridworld_by_hand(options, value, both):
    env = GridworldEnv(1500, **options)
    solution = solve_max_min(env.process())
    assert solution.value == pytest.approx(value, abs=1e-6)
    assert visits_both(env, solution.policy) == pytest.approx(both, abs=0.05)


def test_shares_with_a_move_cost_leave_the_minority_s_goal_out():
    options = {"once": True, "stay": True, "move_cost": 0.05}
    env = GridworldEnv(200, **options)
    shares = solve_weighted(env.process(), [10 / 11, 1 / 11])
    np.testing.assert_allclose(shares.utilities, [0.85, -0.15], atol=1e-6)
    assert visits_both(env, shares.policy) == 0.0
    # without a cost the second goal is on the way
    free = solve_weighted(GridworldEnv(1, once=True).process(), [10 / 11, 1 / 11])
    np.testing.assert_allclose(free.utilities, [1.0, 1.0], atol=1e-6)
