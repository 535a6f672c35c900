"""The max-min objective under TorchRL's own losses, and estimators of the KL."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_data import batch, categorical_actor, critic, gradients, rollout
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import LLMMaskedCategorical
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss
from torchrl.objectives.llm import GRPOLoss, MCAdvantage

from torchrl_maxmin.objectives import KL_ESTIMATORS, MaxMinAdvantage, VectorGAE, kl_estimate
from torchrl_maxmin.welfare import HardMin

WEIGHTS = (0.3, 0.7)


def test_one_column_by_the_groups_weights():
    data = batch((4, 6), 2, WEIGHTS)
    columns = data["advantage"].clone()
    found = MaxMinAdvantage()(data)
    assert found is data
    torch.testing.assert_close(data["advantage"], 0.3 * columns[..., :1] + 0.7 * columns[..., 1:])
    assert torch.equal(data["advantage_per_group"], columns)
    again = data["advantage"].clone()
    assert torch.equal(MaxMinAdvantage()(data)["advantage"], again)


def test_a_kl_column_has_weight_one():
    data = batch((5,), 3, WEIGHTS)
    columns = data["advantage"].clone()
    expected = (columns * torch.tensor([0.3, 0.7, 1.0])).sum(-1, keepdim=True)
    torch.testing.assert_close(MaxMinAdvantage()(data)["advantage"], expected)


def test_another_name_leaves_the_columns():
    data = batch((5,), 2, WEIGHTS)
    columns = data["advantage"].clone()
    MaxMinAdvantage(out_keys=["scalar"])(data)
    assert data["scalar"].shape == (5, 1)
    assert torch.equal(data["advantage"], columns)


@pytest.mark.parametrize("make_loss", [A2CLoss, ClipPPOLoss, ReinforceLoss])
def test_a_scalar_loss_gets_the_weighted_gradient(make_loss):
    """What the loss does to every group's own advantage, weighted, is what it does after the transform."""
    actor = categorical_actor()
    keys = {"sample_log_prob": "sample_log_prob"} if make_loss is not ReinforceLoss else {}
    options = {"entropy_coeff": 0.0} if make_loss is not ReinforceLoss else {}

    def actor_gradient(data):
        loss = make_loss(actor, critic(1), **options)
        loss.set_keys(**keys)
        grads = gradients(loss, data)[1]
        return {name: g for name, g in grads.items() if name.startswith("actor_network_params")}

    data = batch((6,), 2, WEIGHTS)
    with torch.no_grad():  # at ratio one every surrogate is linear in the advantage
        data["sample_log_prob"] = actor.get_dist(data).log_prob(data["action"])
    data["value_target"] = data["value_target"][..., :1]
    single = []
    for k in range(2):
        one = data.clone()
        one["advantage"] = one["advantage"][..., k : k + 1]
        single.append(actor_gradient(one))
    found = actor_gradient(MaxMinAdvantage()(data.clone()))
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 0.3 * single[0][name] + 0.7 * single[1][name])


def test_an_adversary_moves_once_a_batch():
    data = rollout((4, 6), 2, weights=None)
    adversary = HardMin(2)
    VectorGAE(gamma=0.9, lmbda=0.9, value_network=critic(2))(data)
    MaxMinAdvantage(adversary)(data)
    worst = int(data["next", "reward"].mean((0, 1)).argmin())
    assert adversary.weights[worst] == 1
    torch.testing.assert_close(data["advantage"], data["advantage_per_group"][..., worst : worst + 1])
    before = adversary.weights.clone()
    data["next", "reward"] = -data["next", "reward"]
    MaxMinAdvantage(adversary)(data)
    assert torch.equal(adversary.weights, before)


def grouped(num_prompts, size, weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = num_prompts * size
    done = torch.ones(count, 1, dtype=torch.bool)
    return TensorDict(
        {
            "prompt_index": torch.arange(num_prompts).repeat_interleave(size),
            "group_weights": torch.tensor(weights).expand(count, -1).clone(),
            "next": {"reward": torch.randn(count, len(weights), generator=generator), "done": done},
        },
        batch_size=[count],
    )


def test_a_monte_carlo_advantage_of_the_weighted_reward():
    buffer = ReplayBuffer(storage=LazyTensorStorage(64))
    buffer.append_transform(MCAdvantage(grpo_size=4, prompt_key="prompt_index"))
    buffer.append_transform(MaxMinAdvantage(in_keys=[("next", "reward")]))
    data = grouped(3, 4, WEIGHTS)
    expected = (data["next", "reward"] * torch.tensor(WEIGHTS)).sum(-1).view(3, 4)
    expected = (expected - expected.mean(1, keepdim=True)) / expected.std(1, keepdim=True).clamp_min(1e-6)
    for trajectory in data.split(1):
        buffer.extend(trajectory.clone())
    stored = buffer[:]
    assert stored["next", "reward"].shape == (12, 1)
    assert stored["next", "reward_per_group"].shape == (12, 2)
    order = stored["prompt_index"].flatten().argsort(stable=True)
    torch.testing.assert_close(stored["advantage"].flatten()[order], expected.flatten(), atol=1e-5, rtol=1e-4)


class TokenActor(TensorDictModuleBase):
    """Next-token logits from a table, as GRPOLoss reads an actor."""

    def __init__(self):
        super().__init__()
        self.in_keys, self.out_keys = [("tokens", "full")], ["logits"]
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 7)

    def forward(self, tensordict):
        return tensordict.set("logits", self.table(tensordict["tokens", "full"].roll(1, -1)))

    def get_dist(self, tensordict, **_):
        logits = self(tensordict.copy())["logits"]
        return LLMMaskedCategorical(logits=logits, mask=tensordict["mask"])


def test_grpo_gets_the_weighted_gradient():
    """Group-relative advantages of the weighted reward, one a response, through TorchRL's own loss."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (8, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 5, 4, 1])[:, None]
    actor = TokenActor()
    data = TensorDict(
        {
            "tokens": {"full": tokens},
            "mask": mask,
            "group_weights": torch.tensor(WEIGHTS).expand(8, -1).clone(),
            "advantage": torch.randn(8, 1, 2, generator=generator),
        },
        batch_size=[8],
    )
    with torch.no_grad():
        data["log_probs", "full"] = actor.get_dist(data).log_prob(tokens)

    def gradient(advantage):
        loss = GRPOLoss(actor, entropy_bonus=False, masking_strategy="generic")
        actor.zero_grad()
        loss(data.clone().set("advantage", advantage)).loss_objective.backward()
        return actor.table.weight.grad.clone()

    columns = data["advantage"].clone()
    found = gradient(MaxMinAdvantage()(data.clone())["advantage"])
    expected = 0.3 * gradient(columns[..., :1]) + 0.7 * gradient(columns[..., 1:])
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # what happens without: the columns are averaged, whatever the weights
    torch.testing.assert_close(
        gradient(columns), gradient(columns.mean(-1, keepdim=True)), atol=1e-6, rtol=1e-5
    )


def test_a_buffer_weighs_once():
    buffer = ReplayBuffer(storage=LazyTensorStorage(8), batch_size=8)
    buffer.append_transform(MaxMinAdvantage())
    data = batch((8,), 2, WEIGHTS)
    expected = MaxMinAdvantage()(data.clone())["advantage"]
    buffer.extend(data)
    assert torch.equal(buffer[:]["advantage"], expected)
    assert buffer.sample()["advantage"].shape == (8, 1)


def test_mistakes():
    data = batch((5,), 2)
    with pytest.raises(KeyError, match="MaxMinCollector"):
        MaxMinAdvantage()(data)
    with pytest.raises(KeyError, match="no 'missing' to weigh"):
        MaxMinAdvantage(in_keys=["missing"])(batch((5,), 2, WEIGHTS))
    with pytest.raises(ValueError, match="as many of each"):
        MaxMinAdvantage(in_keys=["advantage"], out_keys=["a", "b"])
    with pytest.raises(ValueError, match="2 group weights"):
        MaxMinAdvantage()(batch((5,), 4, WEIGHTS))
    with pytest.raises(NotImplementedError, match="whole batches"):
        MaxMinAdvantage()._step(data, data)


# -- estimators of the KL ----------------------------------------------------------------------------------


@given(st.floats(-20, 20))
def test_estimators_against_float64(value):
    ratio = torch.tensor(value, dtype=torch.float64)
    d = float(ratio)
    oracle = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}
    for name in KL_ESTIMATORS:
        assert kl_estimate(ratio, name).item() == pytest.approx(oracle[name], rel=1e-9, abs=1e-12)


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient():
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.3, 0.1], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy - reference, name)).sum(), kl)
    (gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    loss = (policy.exp().detach() * kl_estimate(policy - reference, "k2")).sum()
    (as_loss,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(as_loss, gradient)


def test_small_ratios_keep_their_digits():
    ratio = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(
        kl_estimate(ratio, "k3"), ratio.double().square().float() / 2, rtol=1e-2, atol=0
    )


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), "k4")
