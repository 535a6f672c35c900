"""Padding is in no group's mean."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from test_collectors_maxmin import Corridor, episode_returns, random_policy
from torchrl.envs import RewardSum, TransformedEnv

from torchrl_maxmin.collectors import GroupStatistics, MaxMinCollector
from torchrl_maxmin.objectives import MaxMinAdvantage
from torchrl_maxmin.welfare import EntropyRegularized, HardMin, Nash

LENGTHS = (5, 2, 1, 4)
STEPS = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def padded(name, fill, shape=(4, 5), episodes=False):
    """Ragged rows whose padding holds ``fill`` and says that it is done."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDict({"next": {"reward": torch.rand(4, 5, 2, generator=generator)}}, [4, 5])
    data["next", "done"] = torch.zeros(4, 5, 1, dtype=torch.bool)
    data["next", "done"][torch.arange(4), torch.tensor(LENGTHS) - 1] = True
    if episodes:
        data["next", "episode_reward"] = data["next", "reward"].cumsum(1)
        data["next", "episode_reward"][~STEPS] = fill
    data["next", "done"][~STEPS] = True
    data["next", "reward"][~STEPS] = fill
    data[name] = STEPS.reshape(shape)
    return data


@pytest.mark.parametrize("fill", [0.0, -100.0, float("nan")], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1)], ids=str)
@pytest.mark.parametrize("name", ["mask", ("collector", "mask")], ids=["named", "auto"])
@pytest.mark.parametrize("episodes", [False, True])
def test_utilities_are_means_over_real_steps(episodes, name, shape, fill):
    data = padded(name, fill, shape, episodes)
    adversary, twin = EntropyRegularized(2, tau=0.5), EntropyRegularized(2, tau=0.5)
    out = GroupStatistics(adversary, mask_key=name if name == "mask" else "auto")(data)
    rows = data["next", "reward"].double()
    if episodes:
        expected = torch.stack([row[:n].sum(0) for row, n in zip(rows, LENGTHS, strict=True)]).mean(0)
    else:
        expected = rows[STEPS].mean(0)
    assert out["group_utilities"].shape == out["group_weights"].shape == (4, 5, 2)
    torch.testing.assert_close(out["group_utilities"][0, 0].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out["group_weights"][3, 4], twin.update(expected.float()))


def test_a_batch_of_padding_alone_keeps_the_weights():
    adversary = HardMin(2)
    data = padded("mask", float("nan"))
    GroupStatistics(adversary, mask_key="mask")(data.clone())
    weights = adversary.weights.clone()
    data["mask"] = torch.zeros(4, 5, dtype=torch.bool)
    out = GroupStatistics(adversary, mask_key="mask")(data)
    assert torch.equal(out["group_weights"][0, 0], weights)
    assert torch.equal(adversary.weights, weights)


def test_masks_of_statistics():
    data = padded("mask", -100.0)
    with pytest.raises(KeyError, match="'other' is not in the data; padding would be counted"):
        GroupStatistics(HardMin(2), mask_key="other")(data)
    everything = GroupStatistics(HardMin(2), mask_key=None)(data.clone())["group_utilities"][0, 0]
    assert (everything < -10).all()
    unnamed = GroupStatistics(HardMin(2))(data.clone())["group_utilities"][0, 0]
    assert torch.equal(unnamed, everything)  # a mask of another name is not guessed


@pytest.mark.parametrize("fill", [0.0, float("nan")], ids=str)
def test_weights_by_prompt_leave_padding_out(fill):
    data = padded("mask", fill)
    data["prompt_index"] = torch.tensor([7, 3, 7, 3])[:, None].expand(4, 5).clone()
    data["prompt_index"][~STEPS] = -1
    adversary, welfare = HardMin(2), Nash()
    statistics = GroupStatistics(adversary, prompt_welfare=welfare, mask_key="mask")
    out = statistics(data)["group_weights"]
    for rows in ([0, 2], [1, 3]):
        real = STEPS[rows]
        mean = data["next", "reward"][rows][real].mean(0)
        expected = welfare.normalized_weights(mean[None])[0]
        torch.testing.assert_close(out[rows][real], expected.expand(int(real.sum()), 2))
    assert torch.equal(out[~STEPS], adversary.weights.expand(int((~STEPS).sum()), 2))


def test_an_advantage_that_moves_its_own_adversary_leaves_padding_out():
    data = padded("mask", -100.0)
    data["advantage"] = torch.ones(4, 5, 2)
    MaxMinAdvantage(EntropyRegularized(2), mask_key="mask")(data)
    torch.testing.assert_close(data["group_utilities"][0, 0], data["next", "reward"][STEPS].mean(0))


class Ragged(Corridor):
    """A corridor whose copies end after three steps and after one, in turns."""

    def __init__(self):
        super().__init__(batch=2)
        self.clock = torch.zeros(2, dtype=torch.long)

    def _observe(self):
        return self.clock[:, None].float()

    def _reset(self, tensordict=None, **_):
        again = torch.ones(2, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            again = tensordict["_reset"].reshape(2)
        self.clock = torch.where(again, 0, self.clock)
        return TensorDict({"observation": self._observe()}, self.batch_size)

    def _step(self, tensordict):
        reward = torch.full((2, 2), -1.0)
        reward.scatter_(-1, tensordict["action"][:, None], self.clock[:, None] + 1.0)
        self.clock = self.clock + 1
        done = (self.clock == torch.tensor([3, 1]))[:, None]
        content = {"observation": self._observe(), "reward": reward, "done": done, "terminated": done}
        return TensorDict(content, self.batch_size)


@pytest.mark.parametrize("summed", [True, False], ids=["episodes", "steps"])
def test_trajectories_split_and_padded_by_the_collector(summed):
    def utilities(split):
        torch.manual_seed(0)
        env = TransformedEnv(Ragged(), RewardSum()) if summed else Ragged()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collector = MaxMinCollector(
                env, random_policy(), adversary=HardMin(2), frames_per_batch=16, total_frames=16,
                split_trajs=split,
            )  # fmt: skip
        (out,) = [batch.clone() for batch in collector]
        collector.shutdown()
        return out

    whole, split = utilities(False), utilities(True)
    assert not split["collector", "mask"].all()
    torch.testing.assert_close(split["group_utilities"][0, 0], whole["group_utilities"][0, 0])
    assert torch.equal(split["group_weights"][0, 0], whole["group_weights"][0, 0])
    if summed:
        torch.testing.assert_close(whole["group_utilities"][0, 0], episode_returns(whole).mean(0))
