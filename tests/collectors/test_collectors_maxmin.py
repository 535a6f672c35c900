"""Group statistics of batches, and a collector that carries them, on any vector reward."""

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, TransformedEnv

from torchrl_maxmin.collectors import GroupStatistics, MaxMinCollector
from torchrl_maxmin.core.distributed import mean_over_ranks
from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.welfare import EntropyRegularized, ExponentiatedGradient, HardMin

STEPS = 3


class Corridor(EnvBase):
    """Three steps; action a in step t pays group a the sum t + 1, and the other group -1."""

    def __init__(self, batch=2):
        super().__init__(batch_size=[batch])
        self.observation_spec = Composite(
            observation=Bounded(0, STEPS, shape=(batch, 1), dtype=torch.float32), shape=(batch,)
        )
        self.action_spec = Categorical(2, shape=(batch,))
        self.reward_spec = Unbounded(shape=(batch, 2))
        self.time = 0

    def _observe(self):
        return torch.full((*self.batch_size, 1), float(self.time))

    def _reset(self, tensordict=None, **_):
        self.time = 0
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, tensordict):
        reward = torch.full((*self.batch_size, 2), -1.0)
        reward.scatter_(-1, tensordict["action"][:, None], self.time + 1.0)
        self.time += 1
        done = torch.full((*self.batch_size, 1), self.time == STEPS)
        content = {"observation": self._observe(), "reward": reward, "done": done, "terminated": done}
        return TensorDict(content, self.batch_size)

    def _set_seed(self, seed):
        torch.manual_seed(seed or 0)


def random_policy():
    return TensorDictModule(
        lambda observation: torch.randint(2, observation.shape[:-1]),
        in_keys=["observation"],
        out_keys=["action"],
    )


def collect(adversary, env=None, frames=12, batches=3, **kwargs):
    torch.manual_seed(0)
    env = TransformedEnv(Corridor(), RewardSum()) if env is None else env
    collector = MaxMinCollector(
        env,
        random_policy(),
        adversary=adversary,
        frames_per_batch=frames,
        total_frames=frames * batches,
        **kwargs,
    )
    out = [batch.clone() for batch in collector]
    collector.shutdown()
    return out


def episode_returns(batch):
    """Returns [N, 2] of the episodes that end in a batch, added up step by step."""
    returns = []
    for actions, dones, times in zip(
        batch["action"], batch["next", "done"], batch["observation"], strict=True
    ):
        total = [0.0, 0.0]
        for action, done, time in zip(
            actions.tolist(), dones.flatten().tolist(), times.flatten(), strict=True
        ):
            total[action] += time.item() + 1
            total[1 - action] -= 1
            if done:
                returns.append(total)
                total = [0.0, 0.0]
    return torch.tensor(returns)


def test_multi_step_utilities_are_mean_episode_returns_and_weights_the_adversarys():
    adversary, twin = EntropyRegularized(2, tau=0.5), EntropyRegularized(2, tau=0.5)
    batches = collect(adversary)
    assert len(batches) == 3
    for batch in batches:
        assert batch["group_weights"].shape == (*batch.batch_size, 2) == (2, 6, 2)
        returns = episode_returns(batch)
        assert len(returns) == 4
        expected = returns.mean(0)
        torch.testing.assert_close(batch["group_utilities"], expected.expand(2, 6, 2))
        weights = twin.update(expected)
        torch.testing.assert_close(batch["group_weights"], weights.expand(2, 6, 2))
        assert weights.max() > 0.5
    assert torch.equal(adversary.weights, twin.weights)


def test_without_reward_sum_utilities_are_mean_rewards():
    (batch,) = collect(HardMin(2), env=Corridor(), batches=1)
    expected = batch["next", "reward"].reshape(-1, 2).mean(0)
    torch.testing.assert_close(batch["group_utilities"][0, 0], expected)
    assert batch["group_weights"][0, 0].tolist() == [float(k == expected.argmin()) for k in (0, 1)]


def test_batches_without_a_finished_episode_keep_the_weights():
    adversary = HardMin(2)
    batches = collect(adversary, frames=2, batches=6)  # one step a batch, an end in every third
    weights = [batch["group_weights"][0, 0].tolist() for batch in batches]
    ends = [bool(batch["next", "done"].any()) for batch in batches]
    assert ends == [False, False, True] * 2
    assert weights[0] == weights[1] == [0.5, 0.5]
    assert weights[2] == weights[3] == weights[4]
    assert sorted(weights[2]) == [0.0, 1.0]


def test_postproc_runs_before_the_statistics():
    def negate(batch):
        batch["next", "reward"] = -batch["next", "reward"]
        return batch

    plain = collect(HardMin(2), env=Corridor(), batches=1)[0]
    negated = collect(HardMin(2), env=Corridor(), batches=1, postproc=negate)[0]
    torch.testing.assert_close(negated["group_utilities"], -plain["group_utilities"])


def test_reward_under_another_key():
    reward = torch.tensor([[1.0, 5.0], [2.0, 3.0]])
    data = TensorDict({"gains": reward, "next": {"reward": torch.zeros(2, 1)}}, [2])
    out = GroupStatistics(HardMin(2), reward_key="gains")(data)
    assert out["group_utilities"].tolist() == [[1.5, 4.0]] * 2
    assert out["group_weights"].tolist() == [[1.0, 0.0]] * 2


def test_wrong_number_of_groups():
    data = TensorDict({"next": {"reward": torch.zeros(4, 3)}}, [4])
    with pytest.raises(ValueError, match="the reward has 3 columns and the adversary 2 groups"):
        GroupStatistics(HardMin(2))(data)


def test_a_nan_reward_is_not_taken_for_a_batch_without_episodes():
    data = TensorDict({"next": {"reward": torch.tensor([[1.0, float("nan")]])}}, [1])
    with pytest.raises(ValueError, match="NaN"):
        GroupStatistics(HardMin(2))(data)


def test_token_env_through_the_collector():
    total = torch.arange(8)[:, None]
    prompts = TensorDict({"prompt_tokens": total, "prompt_mask": torch.ones_like(total).bool()}, [8])

    def rewards(td):
        return torch.stack([td["action"].sum(-1), td["prompt_tokens"][:, 0]], -1)

    env = TokenEnv(
        prompts, rewards, num_groups=2, num_prompts=4, max_new_tokens=3, eos_token_id=9, vocab_size=10
    )
    policy = TensorDictModule(
        lambda tokens: torch.randint(9, (len(tokens), 3)), in_keys=["prompt_tokens"], out_keys=["action"]
    )
    adversary, twin = ExponentiatedGradient(2, step_size=0.1), ExponentiatedGradient(2, step_size=0.1)
    collector = MaxMinCollector(env, policy, adversary=adversary, frames_per_batch=4, total_frames=16)
    seen = []
    for batch in collector:
        assert batch.batch_size == (4, 1)
        utilities = torch.tensor([batch["action"].sum() / 4, batch["prompt_tokens"].sum() / 4])
        torch.testing.assert_close(batch["group_utilities"][0, 0], utilities)
        torch.testing.assert_close(batch["group_weights"][2, 0], twin.update(utilities))
        seen.extend(batch["prompt_tokens"].flatten().tolist())
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))


def test_mean_over_ranks_alone_is_the_mean():
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_over_ranks(rows.sum(0), 5), rows.mean(0))
    assert mean_over_ranks(torch.zeros(3), 0).isnan().all()


def two_ranks(rank, store, queue):
    """One of two processes: rank 0 has one row, rank 1 three."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reward = [torch.tensor([[1.0, 9.0]]), torch.tensor([[5.0, 1.0]] * 3)][rank]
    data = GroupStatistics(HardMin(2))(TensorDict({"next": {"reward": reward}}, [len(reward)]))
    queue.put((rank, data["group_utilities"][0].tolist(), data["group_weights"][0].tolist()))
    dist.destroy_process_group()


def test_utilities_are_summed_over_ranks_before_the_minimum(tmp_path):
    """Each rank alone would name another worst group."""
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=two_ranks, args=(rank, tmp_path / "store", queue)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(timeout=60)
    for _, utilities, weights in results:
        assert utilities == [4.0, 3.0]
        assert weights == [0.0, 1.0]
