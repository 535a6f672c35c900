"""The numbers of the loss: equality with TorchRL's, a float64 oracle, masks, groups."""

import math

import pytest
import torch
from loss_data import (
    batch,
    categorical_actor,
    critic,
    gaussian_actor,
    gradients,
    rollout,
    scoring_actor,
)
from tensordict import TensorDict
from torchrl.objectives import ClipPPOLoss

from torchrl_maxmin.objectives import MaxMinPPOLoss

functional = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
LOSSES = ("loss_objective", "loss_entropy", "loss_critic")
METRICS = ("clip_fraction", "kl_approx", "entropy", "max_ratio", "mean_ratio")


@functional
@pytest.mark.parametrize("shape", [(8,), (4, 6), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_value": 0.1},
        {"clip_value": True, "loss_critic_type": "l2", "clip_epsilon": 0.05},
        {"entropy_bonus": False},
        {"entropy_coeff": 0.2, "critic_coeff": 0.5},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"max_importance_ratio": 1.1},
        {"separate_losses": True},
    ],
    ids=str,
)
def test_one_group_is_clip_ppo_to_the_bit(options, shape, functional):
    data = batch(shape)
    ours = MaxMinPPOLoss(categorical_actor(), critic(1), functional=functional, **options)
    theirs = ClipPPOLoss(categorical_actor(), critic(1), functional=functional, **options)
    weighted = data.clone().set("group_weights", torch.ones(*shape, 1))
    expected, expected_grads = gradients(theirs, data)
    for one in (data, weighted):
        losses, grads = gradients(ours, one)
        for key in set(LOSSES) & set(expected):
            assert torch.equal(losses[key], expected[key])
        assert grads.keys() == expected_grads.keys()
        for name in grads:
            assert torch.equal(grads[name], expected_grads[name])
        for key in set(METRICS) & set(expected):
            torch.testing.assert_close(losses[key], expected[key])


@functional
def test_one_group_is_clip_ppo_for_continuous_actions(functional):
    data = batch(continuous=True)
    make = {"functional": functional, "entropy_bonus": False}
    expected, expected_grads = gradients(ClipPPOLoss(gaussian_actor(), critic(1), **make), data)
    losses, grads = gradients(MaxMinPPOLoss(gaussian_actor(), critic(1), **make), data)
    assert torch.equal(losses["loss_objective"], expected["loss_objective"])
    assert all(torch.equal(grads[name], expected_grads[name]) for name in expected_grads)


@functional
def test_a_scoring_actor_equals_the_distribution(functional):
    data = batch(columns=2, weights=(0.3, 0.7))
    make = {"functional": functional, "kl_to_ref_coeff": 0.1}
    expected, expected_grads = gradients(MaxMinPPOLoss(categorical_actor(), critic(2), **make), data)
    losses, grads = gradients(MaxMinPPOLoss(scoring_actor(), critic(2), **make), data)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)
    for ours, theirs in zip(grads.values(), expected_grads.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("groups", [2, 5])
def test_identical_groups_are_one_group(groups):
    data = batch()
    single = MaxMinPPOLoss(categorical_actor(), critic(1))
    heads = critic(groups)
    one = critic(1)
    heads.module.weight.data = one.module.weight.data.repeat(groups, 1)
    heads.module.bias.data = one.module.bias.data.repeat(groups)
    repeated = data.clone()
    for key in ("advantage", "value_target", "state_value"):
        repeated[key] = data[key].expand(-1, -1, groups)
    weights = torch.rand(groups, generator=torch.Generator().manual_seed(0)).softmax(0)
    repeated["group_weights"] = weights.expand(4, 6, groups)
    expected, expected_grads = gradients(single, data)
    losses, grads = gradients(MaxMinPPOLoss(categorical_actor(), heads), repeated)
    for key in LOSSES:
        torch.testing.assert_close(losses[key], expected[key], atol=1e-6, rtol=0)
    for name, grad in expected_grads.items():
        ours = grads[name].sum(0, keepdim=True) if name.startswith("critic") else grads[name]
        torch.testing.assert_close(ours.reshape(grad.shape), grad, atol=1e-6, rtol=0)


def oracle(data, actor, values, mask, *, clip=0.2, entropy_coeff=0.01, kl_coeff=0.3, clip_value=0.15):
    """The loss written step by step in float64 from its definition."""
    weight, bias = (p.detach().double() for p in actor.parameters())
    v_weight, v_bias = (p.detach().double() for p in values.parameters())
    columns = data["advantage"].shape[-1]
    groups = data["group_weights"].shape[-1]
    positions = [tuple(index) for index in mask.nonzero().tolist()]
    advantages = []
    for index in positions:
        a, w = data["advantage"][index].double(), data["group_weights"][index].double()
        advantages.append(float((a[:groups] * w).sum() + a[groups:].sum()))
    mean = sum(advantages) / len(positions)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(positions) + 1e-8)
    sums = dict.fromkeys(
        ("objective", "entropy", "kl", "critic", "approx", "clipped", "first", "second"), 0.0
    )
    for index, raw in zip(positions, advantages, strict=True):
        advantage = (raw - mean) / deviation
        x = data["observation"][index].double()
        log_policy = (weight @ x + bias).log_softmax(-1)
        log_prob = float(log_policy[data["action"][index]])
        log_ratio = log_prob - float(data["sample_log_prob"][index])
        ratio = math.exp(log_ratio)
        sums["objective"] -= min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
        sums["clipped"] += not 1 - clip <= ratio <= 1 + clip
        sums["approx"] -= log_ratio
        sums["first"] += ratio
        sums["second"] += ratio**2
        sums["entropy"] -= float((log_policy.exp() * log_policy).sum())
        d = float(data["ref_log_prob"][index]) - log_prob
        sums["kl"] += math.exp(d) - d - 1
        prediction = v_weight @ x + v_bias
        target, old = data["value_target"][index].double(), data["state_value"][index].double()
        near = old + (prediction - old).clamp(-clip_value, clip_value)
        sums["critic"] += float(torch.maximum((prediction - target) ** 2, (near - target) ** 2).sum())
    n = len(positions)
    return {
        "loss_objective": sums["objective"] / n,
        "loss_entropy": -entropy_coeff * sums["entropy"] / n,
        "loss_kl_to_ref": kl_coeff * sums["kl"] / n,
        "loss_critic": sums["critic"] / (n * columns),
        "entropy": sums["entropy"] / n,
        "kl_to_ref": sums["kl"] / n,
        "kl_approx": sums["approx"] / n,
        "clip_fraction": sums["clipped"] / n,
        "mean_ratio": sums["first"] / n,
        "ESS": sums["first"] ** 2 / sums["second"] / n,
    }


@pytest.mark.parametrize("kl_column", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_float64_oracle(masked, kl_column):
    data = batch(columns=2 + kl_column, weights=(0.3, 0.7))
    mask = torch.ones(4, 6, dtype=torch.bool)
    if masked:
        mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    data["mask"] = mask
    actor, values = categorical_actor(), critic(2 + kl_column)
    expected = oracle(data, actor, values, mask)
    loss = MaxMinPPOLoss(
        actor,
        values,
        normalize_advantage=True,
        kl_to_ref_coeff=0.3,
        clip_value=0.15,
        loss_critic_type="l2",
        loss_mask_key="mask",
    )
    losses = loss(data)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=2e-5, abs=2e-6), key


def test_gradient_of_the_objective_against_autograd_in_float64():
    data = batch(columns=2, weights=(0.3, 0.7))
    _, grads = gradients(MaxMinPPOLoss(categorical_actor(), critic(2), functional=False), data)
    actor = categorical_actor()
    weight, bias = (p.detach().double().requires_grad_() for p in actor.parameters())
    log_policy = (data["observation"].double() @ weight.T + bias).log_softmax(-1)
    log_prob = log_policy.gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)
    ratio = (log_prob - data["sample_log_prob"].double()).exp()
    advantage = (data["advantage"] * data["group_weights"]).sum(-1).double()
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (-surrogate - 0.01 * entropy).mean().backward()
    by_shape = {grad.shape: grad for name, grad in grads.items() if name.startswith("actor")}
    for oracle_grad in (weight.grad, bias.grad):
        torch.testing.assert_close(by_shape[oracle_grad.shape].double(), oracle_grad, atol=1e-6, rtol=1e-5)


GARBAGE = ("advantage", "value_target", "state_value", "sample_log_prob", "ref_log_prob")


@functional
@pytest.mark.parametrize("garbage", [float("nan"), 1e30], ids=str)
@pytest.mark.parametrize("mask_shape", [(4, 6), (4, 6, 1)], ids=str)
@pytest.mark.parametrize("batch_size", [(4, 6), (4,)], ids=["steps", "sequences"])
def test_masked_is_the_subset(batch_size, mask_shape, garbage, functional):
    columns = 3
    data = batch(columns=columns, weights=(0.3, 0.7))
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    subset = data[mask]
    padded = TensorDict(dict(data.clone().items()), batch_size=batch_size)
    for key in GARBAGE:
        padded[key][~mask] = garbage
    padded["mask"] = mask.reshape(mask_shape)
    make = {
        "functional": functional,
        "normalize_advantage": True,
        "kl_to_ref_coeff": 0.3,
        "clip_value": 0.15,
        "max_importance_ratio": 1.5,
    }
    expected, expected_grads = gradients(MaxMinPPOLoss(categorical_actor(), critic(columns), **make), subset)
    masked = MaxMinPPOLoss(categorical_actor(), critic(columns), loss_mask_key="mask", **make)
    losses, grads = gradients(masked, padded)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key].shape == value.shape
        torch.testing.assert_close(losses[key], value, atol=1e-6, rtol=1e-5)
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name], value, atol=1e-6, rtol=1e-5)


def test_the_collectors_mask_is_found():
    data = batch(columns=2, weights=(0.3, 0.7))
    mask = torch.rand(4, 6, 1, generator=torch.Generator().manual_seed(0)) > 0.4
    data["collector", "mask"] = mask
    losses = MaxMinPPOLoss(categorical_actor(), critic(2))(data)
    named = MaxMinPPOLoss(categorical_actor(), critic(2), loss_mask_key=("collector", "mask"))(data)
    unmasked = MaxMinPPOLoss(categorical_actor(), critic(2), loss_mask_key=None)(data)
    assert torch.equal(losses["loss_objective"], named["loss_objective"])
    assert not torch.equal(losses["loss_objective"], unmasked["loss_objective"])


def test_an_empty_mask_gives_zeros():
    data = batch(columns=2, weights=(0.3, 0.7)).set("mask", torch.zeros(4, 6, dtype=torch.bool))
    loss = MaxMinPPOLoss(
        categorical_actor(), critic(2), loss_mask_key="mask", normalize_advantage=True, kl_to_ref_coeff=0.1
    )
    losses, grads = gradients(loss, data)
    for key in (*LOSSES, "loss_kl_to_ref", "ESS", "kl_approx", "max_ratio"):
        assert losses[key].item() == 0.0
    assert all(grad.isfinite().all() for grad in grads.values())


def test_weights_change_the_objective_and_nothing_else():
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    first, second = (loss(batch(columns=2, weights=weights)) for weights in ((1.0, 0.0), (0.0, 1.0)))
    assert not torch.equal(first["loss_objective"], second["loss_objective"])
    for key in ("loss_critic", "loss_entropy", "kl_approx"):
        assert torch.equal(first[key], second[key])
    alone = batch(columns=2, weights=None)
    alone["advantage"] = alone["advantage"][..., :1]
    assert torch.equal(loss(alone)["loss_objective"], first["loss_objective"])


def test_the_objective_is_linear_in_the_weights_at_ratio_one():
    data = batch(columns=2)
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), entropy_bonus=False, functional=False)
    with torch.no_grad():
        dist = loss.actor_network.get_dist(data.clone())
        data["sample_log_prob"] = dist.log_prob(data["action"])

    def actor_gradient(weights):
        _, grads = gradients(loss, data.clone().set("group_weights", torch.tensor(weights).expand(4, 6, 2)))
        return torch.cat([g.flatten() for name, g in grads.items() if name.startswith("actor")])

    mixed = 0.3 * actor_gradient((1.0, 0.0)) + 0.7 * actor_gradient((0.0, 1.0))
    torch.testing.assert_close(actor_gradient((0.3, 0.7)), mixed, atol=1e-6, rtol=1e-5)


def test_a_sequence_level_advantage_reaches_every_token():
    data = TensorDict(dict(batch().items()), batch_size=[4])
    sequence = data["advantage"][:, 0]
    spread = data.clone().set("advantage", sequence.unsqueeze(1).expand(4, 6, 1))
    loss = MaxMinPPOLoss(categorical_actor(), None)
    assert torch.equal(
        loss(data.clone().set("advantage", sequence))["loss_objective"], loss(spread)["loss_objective"]
    )


def test_explained_variance_has_one_entry_a_column():
    losses = MaxMinPPOLoss(categorical_actor(), critic(3))(rollout(columns=3))
    assert losses["explained_variance"].shape == (3,)
    silent = MaxMinPPOLoss(categorical_actor(), critic(3), log_explained_variance=False)
    assert "explained_variance" not in silent(rollout(columns=3))
    assert "explained_variance" not in silent.out_keys
