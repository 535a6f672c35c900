"""The critic's own scale for every group, the KL estimators of the loss, masked actions."""

import pytest
import torch
from loss_data import OBS, batch, categorical_actor, critic, gradients
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import MaskedCategorical, PopArtValueNorm, ProbabilisticActor, RunningValueNorm
from torchrl.objectives import ClipPPOLoss

from torchrl_maxmin.objectives import KL_ESTIMATORS, MaxMinPPOLoss

WEIGHTS = (0.3, 0.7)


def make(columns=2, **options):
    loss = MaxMinPPOLoss(categorical_actor(), critic(columns), loss_critic_type="l2", **options)
    loss.set_keys(sample_log_prob="sample_log_prob")
    return loss


def test_every_column_is_measured_in_its_own_spread():
    data = batch((50,), 2, WEIGHTS)
    data["value_target"] = data["value_target"] * torch.tensor([1.0, 100.0]) + torch.tensor([0.0, 500.0])
    norm = RunningValueNorm(shape=2)
    loss = make(value_norm=norm, reduction="none")(data)["loss_critic"]
    target = data["value_target"].double()
    with torch.no_grad():
        value = critic(2)(data.clone())["state_value"].double()
    spread = target.std(0, unbiased=False)
    torch.testing.assert_close(loss.double(), ((target - value) / spread).square(), rtol=1e-3, atol=1e-4)


def test_padding_does_not_reach_the_statistics():
    data = batch((4, 6), 2, WEIGHTS)
    data["mask"] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    data["mask"][0] = True
    clean, norm = RunningValueNorm(shape=2), RunningValueNorm(shape=2)
    clean.update(data["value_target"][data["mask"]])
    data["value_target"][~data["mask"]] = float("nan")
    loss = make(value_norm=norm, loss_mask_key="mask")
    values, found = gradients(loss, data)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert torch.isfinite(values["loss_critic"])
    for name, tensor in clean.state_dict().items():
        assert torch.equal(norm.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("clip_value", [None, 0.2])
@pytest.mark.parametrize("wide", ["value_target", "state_value"])
def test_returns_and_values_of_two_dtypes(kind, clip_value, wide):
    """As beside a float64 policy: torch 2.11 differentiates no distance between two dtypes."""
    data = batch((30,), 2, WEIGHTS)
    expected, slopes = gradients(make(clip_value=clip_value), data.clone())
    data[wide] = data[wide].double()
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), loss_critic_type=kind, clip_value=clip_value)
    loss.set_keys(sample_log_prob="sample_log_prob")
    found, moved = gradients(loss, data)
    assert all(gradient.isfinite().all() for gradient in moved.values())
    if kind == "l2":
        torch.testing.assert_close(found["loss_critic"].float(), expected["loss_critic"])
        for name, slope in slopes.items():
            torch.testing.assert_close(moved[name], slope)


def test_clip_value_is_in_units_of_the_spread():
    data = batch((30,), 2, WEIGHTS)
    data["value_target"] = data["value_target"] * 50
    data["state_value"] = data["state_value"] * 50
    by_hand = RunningValueNorm(shape=2)
    by_hand.update(data["value_target"])
    loss = make(value_norm=RunningValueNorm(shape=2), clip_value=0.2, reduction="none")
    found = loss(data)["loss_critic"]
    with torch.no_grad():
        value = by_hand.normalize(critic(2)(data.clone())["state_value"])
    old, target = by_hand.normalize(data["state_value"]), by_hand.normalize(data["value_target"])
    clipped = old + (value - old).clamp(-0.2, 0.2)
    torch.testing.assert_close(found, torch.maximum((value - target) ** 2, (clipped - target) ** 2))


def test_statistics_are_saved_with_the_loss():
    loss = make(value_norm=PopArtValueNorm(shape=2))
    loss(batch((30,), 2, WEIGHTS))
    other = make(value_norm=PopArtValueNorm(shape=2))
    other.load_state_dict(loss.state_dict())
    again = batch((30,), 2, WEIGHTS, seed=1)
    assert torch.equal(loss(again.clone())["loss_critic"], other(again.clone())["loss_critic"])


def test_every_kl_estimator_is_that_of_the_formula():
    data = batch((6,), 2, WEIGHTS)
    with torch.no_grad():
        log_prob = categorical_actor().get_dist(data).log_prob(data["action"])
    d = (log_prob - data["ref_log_prob"]).double()
    oracle = {"k1": d, "k2": d.square() / 2, "k3": torch.exp(-d) - 1 + d}
    for name in KL_ESTIMATORS:
        loss = make(kl_to_ref_coeff=0.5, kl_estimator=name)
        found = loss(data)
        torch.testing.assert_close(found["kl_to_ref"].double(), oracle[name].mean(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found["loss_kl_to_ref"].double(), 0.5 * oracle[name].mean(), rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="k1, k2, k3"):
        make(kl_estimator="k4")


def masked_actor():
    torch.manual_seed(0)
    module = TensorDictModule(torch.nn.Linear(OBS, 4), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        module,
        in_keys={"logits": "logits", "mask": "action_mask"},
        out_keys=["action"],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )


def test_masked_actions_are_clip_ppos():
    data = batch((8,), 1)
    data["action_mask"] = torch.ones(8, 4, dtype=torch.bool)
    data["action_mask"][:, 0] = data["action"] == 0
    ours, theirs = MaxMinPPOLoss(masked_actor(), critic(1)), ClipPPOLoss(masked_actor(), critic(1))
    for loss in (ours, theirs):
        loss.set_keys(sample_log_prob="sample_log_prob")
    (mine, my_grads), (their, their_grads) = gradients(ours, data), gradients(theirs, data)
    for key in ("loss_objective", "loss_entropy", "loss_critic"):
        assert torch.equal(mine[key], their[key])
    for name, gradient in their_grads.items():
        assert torch.equal(my_grads[name], gradient)
    assert isinstance(data, TensorDict)
