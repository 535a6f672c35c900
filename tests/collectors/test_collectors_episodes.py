"""Returns of whole episodes without a preference for short ones, their intervals, and exact values."""

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_maxmin.collectors.episodes import episode_returns, episode_summary, exact_summary, policy_table
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs import FruitTreeEnv, GroupReward, TabularEnv, VectorMDP, make_env, solve_max_min
from torchrl_maxmin.models.mlp import make_actor


class Uneven(EnvBase):
    """Copy i ends after i + 1 steps, each paying (1, i)."""

    def __init__(self, copies):
        super().__init__(batch_size=[copies])
        self.observation_spec = Composite(
            observation=Unbounded(shape=(copies, 1)), time=Unbounded(shape=(copies, 1)), shape=(copies,)
        )
        self.action_spec = Categorical(2, shape=(copies,))
        self.reward_spec = Unbounded(shape=(copies, 2))
        self.state_spec = Composite(time=Unbounded(shape=(copies, 1)), shape=(copies,))
        self.which = torch.arange(copies, dtype=torch.float32)[:, None]

    def _reset(self, tensordict=None, **_):
        zeros = torch.zeros_like(self.which)
        return TensorDict({"observation": zeros, "time": zeros.clone()}, self.batch_size)

    def _step(self, tensordict):
        time = tensordict["time"] + 1
        ends = time > self.which
        entries = {
            "observation": torch.zeros_like(time),
            "time": time,
            "reward": torch.cat([torch.ones_like(time), self.which], -1),
            "done": ends,
            "terminated": ends.clone(),
        }
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        """Nothing is random here."""


class Chance(EnvBase):
    """Every episode is long or short with the same chance, and pays its length."""

    LENGTHS = (1.0, 9.0)

    def __init__(self, copies):
        super().__init__(batch_size=[copies])
        one = Unbounded(shape=(copies, 1))
        self.observation_spec = Composite(observation=one, left=one.clone(), shape=(copies,))
        self.action_spec = Categorical(2, shape=(copies,))
        self.reward_spec = Unbounded(shape=(copies, 2))
        self.state_spec = Composite(left=one.clone(), shape=(copies,))
        self._set_seed(0)

    def _reset(self, tensordict=None, **_):
        long = torch.rand(*self.batch_size, 1, generator=self.generator) < 0.5
        left = torch.where(long, self.LENGTHS[1], self.LENGTHS[0])
        return TensorDict({"observation": torch.zeros_like(left), "left": left}, self.batch_size)

    def _step(self, tensordict):
        left = tensordict["left"] - 1
        entries = {
            "observation": torch.zeros_like(left),
            "left": left,
            "reward": torch.ones(*self.batch_size, 2),
            "done": left == 0,
            "terminated": left == 0,
        }
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed or 0)


def grouped(env, *before):
    for transform in (*before, GroupReward()):
        env = env.append_transform(transform)
    return env


def idle():
    """Always the first action."""
    return TensorDictModule(
        lambda looks: torch.zeros(looks.shape[0], dtype=torch.int64), ["observation"], ["action"]
    )


# -- sampled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "each"), [(1, 1), (4, 1), (5, 2), (11, 3)])
def test_every_copy_gives_as_many_episodes(wanted, each):
    returns = episode_returns(grouped(Uneven(4)), idle(), wanted)
    assert returns.dtype is torch.float64
    assert returns.shape == (4 * each, 2)
    expected = [[i + 1.0, i * (i + 1.0)] for i in range(4) for _ in range(each)]
    assert sorted(returns.tolist()) == sorted(expected)  # the first to end would be copy 0's alone


def test_short_episodes_are_not_preferred():
    torch.manual_seed(0)
    returns = episode_returns(grouped(Chance(50)), idle(), 1000)
    lengths = returns[:, 0]
    assert set(lengths.tolist()) == {1.0, 9.0}
    assert (lengths == 9).double().mean().item() == pytest.approx(0.5, abs=3 * 0.5 / 1000**0.5)
    # those that end in the first steps of all copies are nearly all short
    data = grouped(Chance(50)).rollout(3, idle(), break_when_any_done=False)
    early = data["next", "episode_group_reward"][data["next", "done"].squeeze(-1)]
    assert (early[:, 0] == 1).all()


def test_returns_are_the_processs():
    """A stochastic policy, sampled and by the Bellman equations."""
    endless = VectorMDP.random(4, 2, 3, seed=2)
    process = VectorMDP(0.8 * endless.transition, endless.reward, endless.initial, gamma=1.0)
    env = grouped(TabularEnv(process, 100, seed=1))
    torch.manual_seed(3)
    policy = make_actor(env, [8])
    torch.nn.init.normal_(policy.module[0].module[-1].weight)
    returns = episode_returns(env, policy, 4000)
    exact = process.returns(policy_table(env, policy))
    error = returns.std(0) / len(returns) ** 0.5
    assert ((returns.mean(0) - torch.as_tensor(exact)).abs() < 4 * error).all()
    uniform = process.returns(np.full((4, 2), 0.5))
    assert (np.abs(uniform - exact) > 0.02).any()


def test_the_policy_is_sampled_whatever_the_mode():
    env = grouped(make_env("fruit-tree-v0", 200, depth=1, fruits=[[1.0, 0.0], [0.0, 1.0]]))
    torch.manual_seed(0)

    with set_exploration_type(ExplorationType.DETERMINISTIC):
        returns = episode_returns(env, make_actor(env), 200)
    assert 0.35 < returns[:, 0].mean() < 0.65


@pytest.mark.parametrize("copies", [1, 3])
def test_an_episode_that_does_not_end(copies):
    env = grouped(TabularEnv(VectorMDP.random(3, 2, 2), copies))
    with pytest.raises(
        UserError, match="an episode did not end in 7 steps; cut episodes by --max_episode_st"
    ):
        episode_returns(env, idle(), 2 * copies, max_steps=7)
    cut = grouped(TabularEnv(VectorMDP.random(3, 2, 2), copies), StepCounter(7))
    assert len(episode_returns(cut, idle(), 2 * copies, max_steps=7)) == 2 * copies


def test_one_copy_that_does_not_end_is_enough():
    assert len(episode_returns(grouped(Uneven(5)), idle(), 10, max_steps=5)) == 10
    with pytest.raises(UserError, match="did not end in 4 steps"):  # copy 4 takes 5
        episode_returns(grouped(Uneven(5)), idle(), 10, max_steps=4)


def test_a_bar_shows_that_episodes_are_played(monkeypatch):
    """All of them at the end, and none before two seconds have passed."""
    from contextlib import contextmanager

    from torchrl_maxmin.core import progress

    shown = []

    @contextmanager
    def bar(description, total):
        shown.append((description, total))
        yield shown.append

    monkeypatch.setattr(progress, "progress_bar", bar)
    episode_returns(grouped(Uneven(4)), idle(), 8)
    assert shown == []
    monkeypatch.setattr(progress, "_PATIENCE_S", -1.0)
    episode_returns(grouped(Uneven(4)), idle(), 8)
    assert shown[0] == ("playing episodes", 8)
    assert sum(shown[1:]) == 8


# -- summaries -------------------------------------------------------------------------------------


def test_a_summary_by_hand():
    returns = torch.tensor(np.random.default_rng(0).normal([3.0, 2.9, 5.0], [1.0, 4.0, 0.1], (40, 3)))
    summary = episode_summary(returns, confidence=0.9)
    columns = [*returns.numpy().T, returns.numpy().min(-1)]
    found = [*(summary["utilities"][str(k)] for k in range(3)), summary["mean_of_mins"]]
    for column, told in zip(columns, found, strict=True):
        low, high = stats.t.interval(0.9, 39, loc=column.mean(), scale=stats.sem(column))
        assert [told[name] for name in ("mean", "low", "high")] == pytest.approx([column.mean(), low, high])
    assert summary["episodes"] == 40
    assert summary["worst_group"] == min(one["mean"] for one in summary["utilities"].values())
    # The third group is far above: of the first two the smallest low is no further out than its own.
    lows, highs = ([one[end] for one in summary["utilities"].values()] for end in ("low", "high"))
    low, high = summary["worst_group_interval"]
    assert min(lows) <= low < summary["worst_group"] < min(highs) <= high
    assert summary["mean_of_mins"]["mean"] < summary["worst_group"]


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        told = episode_summary(torch.tensor(rng.normal(2.0, 3.0, (12, 1))), confidence=0.8)["utilities"]["0"]
        held += told["low"] <= 2.0 <= told["high"]
    assert stats.binomtest(held, 400, 0.8).pvalue > 1e-3


def test_one_episode_has_no_interval():
    with pytest.raises(ValueError, match="at least two episodes, got 1"):
        episode_summary(torch.ones(1, 2))
    told = episode_summary(torch.ones(2, 2))["utilities"]["1"]
    assert told == {"mean": 1.0, "low": 1.0, "high": 1.0, "method": "t over episodes"}


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        TabularEnv(VectorMDP.random(5, 3, 2), 2),
        FruitTreeEnv(2, depth=2, fruits=np.eye(4)),
        make_env("fishwood-v0", 3, horizon=4),
        make_env("gridworld", 3, horizon=4),
    ],
    ids=lambda env: type(env).__name__,
)
def test_a_policys_table_is_its_distribution_in_every_state(env):
    torch.manual_seed(0)
    policy = make_actor(env, [16])
    torch.nn.init.normal_(policy.module[0].module[-1].weight)
    table = policy_table(TransformedEnv(env, GroupReward()), policy)
    looks = env.observations()
    assert table.shape == (len(env.process().initial), env.action_spec.n)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table.sum(1), 1.0, atol=1e-6)
    for row, look in zip(table[:20], looks[:20], strict=True):
        chances = policy.get_dist(TensorDict({"observation": look}, [])).probs
        np.testing.assert_allclose(row, chances.detach().numpy(), atol=1e-6)
    # and where the environment goes, it sees what the table's rows were made of
    seen = env.rollout(3, break_when_any_done=False)["observation"].flatten(0, 1)
    assert all((looks == one).all(-1).any() for one in seen if one.any())


def uniform_in(env):
    policy = make_actor(env, [4])
    torch.nn.init.zeros_(policy.module[0].module[-1].weight)
    return policy


def test_exact_values_by_hand():
    env = FruitTreeEnv(2, depth=2, fruits=[[4.0, 0.0], [0.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    told = exact_summary(grouped(env), uniform_in(env), "min_of_means")
    assert told["exact"]["utilities"] == pytest.approx([1.25, 1.25])
    assert told["exact"]["worst_group"] == pytest.approx(1.25)
    assert told["exact"]["max_min"] == pytest.approx(2.0)  # half and half of the first two leaves
    assert told["certificate"] == {
        "value": pytest.approx(0.75), "low": pytest.approx(0.75), "high": pytest.approx(0.75), "reason": None,
    }  # fmt: skip
    other = exact_summary(grouped(env), uniform_in(env), "mean_of_mins")
    assert other["exact"] == told["exact"]
    assert other["certificate"] == {
        "value": None, "low": None, "high": None,
        "reason": "trained for mean_of_mins, which has another optimum",
    }  # fmt: skip


def test_the_exact_optimum_is_not_beaten_and_is_reached_by_its_own_policy():
    process = VectorMDP.with_horizon(
        *(getattr(VectorMDP.random(3, 2, 2, seed=4), name) for name in ("transition", "reward", "initial")), 3
    )
    env = TabularEnv(process, 2)
    best = solve_max_min(process)

    class Optimal:
        def get_dist(self, looks):
            return torch.distributions.Categorical(looks["observation"].double() @ torch.tensor(best.policy))

    told = exact_summary(env, Optimal(), "min_of_means")
    assert told["certificate"]["value"] == pytest.approx(0.0, abs=1e-9)
    for seed in range(5):
        torch.manual_seed(seed)
        policy = make_actor(env, [8])
        torch.nn.init.normal_(policy.module[0].module[-1].weight)
        assert exact_summary(env, policy, "min_of_means")["certificate"]["value"] > 0


def test_where_nothing_exact_is_known():
    """A process that goes on where the episodes are cut would be another one."""
    endless = VectorMDP.random(4, 2, 2)
    ending = VectorMDP(0.5 * endless.transition, endless.reward, endless.initial, gamma=1.0)
    cases = {
        "process is not known": grouped(Uneven(2)),
        "discounts by 0.95": grouped(TabularEnv(endless, 2), StepCounter(4)),
        "episodes are cut": grouped(TabularEnv(ending, 2), StepCounter(4)),
    }
    for reason, env in cases.items():
        told = exact_summary(env, uniform_in(env), "min_of_means")
        assert told["exact"] is None
        assert reason in told["certificate"].pop("reason")
        assert told["certificate"] == {"value": None, "low": None, "high": None}
    counted = grouped(TabularEnv(ending, 2), StepCounter(), RewardSum())  # counts and cuts nothing
    assert exact_summary(counted, uniform_in(counted), "min_of_means")["exact"] is not None
