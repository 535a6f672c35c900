"""Padding is as if it were not there, for a loss that computes its own advantage, and whatever it holds."""

import pytest
import torch
from loss_data import categorical_actor, critic, gaussian_actor, gradients, rollout, scoring_actor
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.modules import RunningValueNorm
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from torchrl.objectives.value import GAE

from torchrl_maxmin.masks import expand_mask, fill_masked, validity_mask
from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE

LENGTHS = (6, 3, 1, 5)
STEPS = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
BY_NAME = ["GAE", "TD0", "TD1", "TDLambda", "VTrace"]
NAMES = pytest.mark.parametrize("name", ["mask", ("collector", "mask")], ids=["named", "auto"])
FUNCTIONAL = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])


def padded_rollout(name=("collector", "mask"), shape=(4, 6), seed=0, columns=2):
    """Ragged trajectories, none of which ends; the last real step of a row is followed by padding."""
    data = rollout(columns=columns, weights=(0.3, 0.7) if columns == 2 else (1.0,), seed=seed)
    for flag in ("done", "terminated"):
        data["next", flag] = torch.zeros(4, 6, 1, dtype=torch.bool)
    if isinstance(name, tuple):
        data["collector"] = TensorDict({}, [4, 6])
    data[name] = STEPS.reshape(shape)
    return data


def rows_alone(data):
    """The real steps of every row, each a rollout of its own."""
    return [data[b : b + 1, :length].clone() for b, length in enumerate(LENGTHS)]


def poison(data, value=float("nan"), keep=()):
    """Put ``value`` at the masked steps of everything that is a floating-point number."""
    data = data.clone()
    for key, tensor in data.items(True, True):
        if tensor.is_floating_point() and key not in keep:
            data[key] = torch.where(expand_mask(STEPS, tensor), tensor, value)
    return data


def make(name=("collector", "mask"), actor=categorical_actor, columns=2, **options):
    mask = {} if isinstance(name, tuple) else {"loss_mask_key": name}
    return MaxMinPPOLoss(actor(), critic(columns), **mask, **options)


@NAMES
@FUNCTIONAL
@pytest.mark.parametrize("estimator", BY_NAME)
def test_a_padded_batch_is_its_real_steps_alone(estimator, functional, name):
    data = padded_rollout(name)
    loss = make(name, functional=functional, reduction="sum")
    loss.make_value_estimator(ValueEstimators[estimator])
    expected, expected_grads = {}, {}
    for row in rows_alone(data):
        losses, grads = gradients(loss, row)
        for total, part in ((expected, losses), (expected_grads, grads)):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value.clone()
    for one in (data, poison(data)):
        losses, grads = gradients(loss, one)
        for key in ("loss_objective", "loss_entropy", "loss_critic"):
            torch.testing.assert_close(losses[key], expected[key], atol=1e-5, rtol=1e-5)
        assert grads.keys() == expected_grads.keys()
        for key, value in grads.items():
            torch.testing.assert_close(value, expected_grads[key], atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_real_steps():
    data = padded_rollout()
    losses = make(loss_critic_type="l2")(data)
    rows = [make(loss_critic_type="l2")(row) for row in rows_alone(data)]
    lengths = torch.tensor(LENGTHS, dtype=torch.float32)
    for key in ("loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx"):
        alone = (torch.stack([row[key] for row in rows]) * lengths).sum() / lengths.sum()
        torch.testing.assert_close(losses[key], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("actor", [categorical_actor, gaussian_actor, scoring_actor])
def test_padding_may_hold_anything(actor, value):
    """Values, gradients and metrics are those of zeros in padding, with every option that reads a step."""
    options = {
        "normalize_advantage": True,
        "kl_to_ref_coeff": 0.1,
        "clip_value": 0.2,
        "max_importance_ratio": 1.5,
        "entropy_bonus": actor is not gaussian_actor,  # whose entropy is sampled
        "separate_losses": True,
    }
    data = padded_rollout()
    if actor is gaussian_actor:
        generator = torch.Generator().manual_seed(3)
        data["action"] = torch.rand(4, 6, 4, generator=generator) - 0.5
    clean, clean_grads = gradients(
        make(actor=actor, value_norm=RunningValueNorm(shape=2), **options), poison(data, 0.0)
    )
    norm = RunningValueNorm(shape=2)
    losses, grads = gradients(make(actor=actor, value_norm=norm, **options), poison(data, value))
    for key, expected in clean.items():
        assert expected.isfinite().all(), key
        torch.testing.assert_close(losses[key], expected)
    assert clean_grads.keys() == grads.keys()
    for key, expected in clean_grads.items():
        assert expected.isfinite().all(), key
        torch.testing.assert_close(grads[key], expected)
    assert norm.scale().isfinite().all()


def test_a_critic_on_what_the_actor_writes():
    """The trunk is called once; what it makes of padding is finite."""
    torch.manual_seed(0)
    trunk = TensorDictModule(nn.Linear(3, 8), in_keys=["observation"], out_keys=["hidden"])
    policy = TensorDictModule(nn.Linear(8, 4), in_keys=["hidden"], out_keys=["logits"])
    head = TensorDictModule(nn.Linear(8, 2), in_keys=["hidden"], out_keys=["state_value"])
    distribution = ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
    )
    loss = MaxMinPPOLoss(
        ProbabilisticTensorDictSequential(trunk, policy, distribution), head, functional=False
    )
    loss.set_keys(sample_log_prob="sample_log_prob")
    data = padded_rollout()
    generator = torch.Generator().manual_seed(1)
    data["advantage"] = torch.randn(4, 6, 2, generator=generator)
    data["value_target"] = torch.randn(4, 6, 2, generator=generator)
    expected, expected_grads = gradients(loss, poison(data, 0.0))
    expected_grads = {key: value.clone() for key, value in expected_grads.items()}
    losses, grads = gradients(loss, poison(data))
    for key, value in expected.items():
        assert torch.equal(losses[key], value)
    for key, value in expected_grads.items():
        assert torch.equal(grads[key], value)


class Averages(nn.Module):
    """A critic that looks back: attention of equal weights to all steps so far."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 2)

    def forward(self, features):
        steps = features.shape[-2]
        weights = torch.ones(steps, steps).tril()
        return self.linear((weights / weights.sum(-1, keepdim=True)) @ features)


@FUNCTIONAL
def test_a_critic_that_looks_across_steps(functional):
    """A weight of 0 times NaN is NaN: padding has to be finite before the network sees it."""
    value = TensorDictModule(Averages(), in_keys=["features"], out_keys=["state_value"])
    loss = MaxMinPPOLoss(categorical_actor(), value, functional=functional, reduction="sum")
    data = padded_rollout()
    data["features"], data["next", "features"] = data["observation"] * 2, data["next", "observation"] * 2
    expected = [loss(row) for row in rows_alone(data)]
    losses, grads = gradients(loss, poison(data))
    for key in ("loss_objective", "loss_entropy", "loss_critic"):
        torch.testing.assert_close(losses[key], sum(row[key] for row in expected), atol=1e-5, rtol=1e-5)
    assert all(grad.isfinite().all() for grad in grads.values())


# -- which mask ----------------------------------------------------------------------------------------


def test_a_named_mask_that_is_missing_raises_in_loss_estimator_and_statistics():
    data = padded_rollout().exclude("collector")
    data["advantage"] = data["value_target"] = data["state_value"] = torch.zeros(4, 6, 2)
    data["next", "state_value"] = torch.zeros(4, 6, 2)
    own = data.exclude("advantage", "value_target")
    calls = [
        lambda: make("mask")(data.clone()),
        lambda: make("mask")(own.clone()),
        lambda: make("mask").value_estimator(own.clone()),
        lambda: VectorGAE(gamma=0.9, lmbda=0.9, mask_key="mask")(data.clone()),
        lambda: VectorGAE(gamma=0.9, lmbda=0.9, mask_key=("my", "mask"))(data.clone()),
    ]
    messages = []
    for call in calls:
        with pytest.raises(KeyError, match="is not in the data; padding would be counted") as error:
            call()
        messages.append(str(error.value))
    assert len(set(messages[:4])) == 1


def test_the_estimator_goes_by_the_mask_of_the_loss():
    loss = make("mask")
    assert loss.value_estimator.mask_key == "mask"
    loss.loss_mask_key = "other"
    assert loss.value_estimator.mask_key == "other"
    loss.loss_mask_key = None
    assert loss.value_estimator.mask_key is None
    loss.loss_mask_key = "mask"
    for estimator in BY_NAME:
        loss.make_value_estimator(ValueEstimators[estimator])
        assert loss.value_estimator.mask_key == "mask"
    loss.make_value_estimator(VectorGAE(gamma=0.9, lmbda=0.9, value_network=loss.critic_network))
    assert loss.value_estimator.mask_key == "mask"
    own = VectorGAE(gamma=0.9, lmbda=0.9, value_network=loss.critic_network, mask_key="own")
    loss.make_value_estimator(own)
    loss.loss_mask_key = "third"
    assert loss.value_estimator.mask_key == "own"
    loss.make_value_estimator(gamma=0.9, mask_key=None)
    assert loss.value_estimator.mask_key is None


def test_no_mask_is_no_mask():
    """Switched off, padding counts: the opposite of what every other test here shows."""
    data = padded_rollout()
    masked, all_steps = make()(data), make(loss_mask_key=None)(data)
    assert not torch.allclose(masked["loss_objective"], all_steps["loss_objective"])
    plain = make()(data.exclude("collector"))
    for key, value in plain.items():
        assert torch.equal(all_steps[key], value)


def test_every_mask_in_the_data_counts():
    data = padded_rollout()
    data["shifted_valid"] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    both = STEPS & data["shifted_valid"]
    assert torch.equal(validity_mask(data), both)
    data["mask"] = STEPS
    assert torch.equal(validity_mask(data, "mask"), both)
    assert validity_mask(data, None) is None
    assert validity_mask(data.exclude("collector", "shifted_valid")) is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_masks_of_zeros_and_ones(dtype):
    data = padded_rollout("mask")
    expected = make("mask")(data)
    data["mask"] = data["mask"].to(dtype)
    for key, value in make("mask")(data).items():
        assert torch.equal(value, expected[key])


def test_a_mask_that_does_not_fit():
    data = padded_rollout("mask")
    data["mask"] = torch.ones(4, 6, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 6, 3\) does not fit"):
        make("mask")(data)


def test_filling_leaves_what_is_finite():
    data = TensorDict({"x": torch.tensor([[1.0], [2.0], [torch.nan]]), "n": torch.arange(3)}, [3])
    filled = fill_masked(data, ["x", "n", "absent"], torch.tensor([True, False, False]))
    assert filled["x"].tolist() == [[1.0], [2.0], [0.0]]  # the second may be context of the first
    assert data["x"].isnan().any()
    assert fill_masked(data, ["x"], None) is data
    real = fill_masked(data, ["x"], torch.tensor([True, True, True]))
    assert real["x"].isnan().any()  # a NaN of a real step is not hidden


# -- the estimator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "time_dim"),
    [({}, 1), ({}, 0), ({"differentiable": True}, 1), ({"differentiable": True}, 0), ({"shifted": True}, 1)],
    ids=str,
)
def test_vector_gae_with_a_network(option, time_dim):
    """The next observation of the last real step is its own, not the padding that follows."""
    data = poison(padded_rollout())
    for row, length in zip(data, LENGTHS, strict=True):  # as in any rollout, for the shifted call
        row["next", "observation"][: length - 1] = row["observation"][1:length]
    rows = rows_alone(data)
    estimator = VectorGAE(gamma=0.9, lmbda=0.8, value_network=critic(2), **option)
    if time_dim == 0:
        data = data.transpose(0, 1).contiguous()
        estimated = estimator(data, time_dim=0).transpose(0, 1)
    else:
        data.names = [None, "time"]
        estimated = estimator(data)
    for b, row in enumerate(rows):
        alone = VectorGAE(gamma=0.9, lmbda=0.8, value_network=critic(2))(row)
        for key in ("advantage", "value_target", "advantage_per_group", "state_value"):
            torch.testing.assert_close(
                estimated[key][b, : LENGTHS[b]], alone[key][0], atol=1e-6, rtol=1e-5, check_stride=False
            )
    assert (estimated["advantage"][~STEPS] == 0).all()
    assert (estimated["value_target"][~STEPS] == 0).all()


@pytest.mark.parametrize("option", ["auto_reset_env", "steps_to_next_obs"])
def test_options_of_gae_with_padding(option):
    data = padded_rollout()
    generator = torch.Generator().manual_seed(5)
    options = {}
    if option == "auto_reset_env":
        options[option] = True
        data["next", "truncated"] = torch.rand(4, 6, 1, generator=generator) < 0.3
        data["next", "truncated"][1, LENGTHS[1] - 1] = False  # goes on, behind the padding
        data["next", "done"] = data["next", "truncated"].clone()
    else:
        data[option] = torch.randint(1, 4, (4, 6, 1), generator=generator).float()
    estimator = VectorGAE(gamma=0.9, lmbda=0.8, value_network=critic(2), **options)
    estimated = estimator(poison(data))
    for b, row in enumerate(rows_alone(data)):
        torch.testing.assert_close(estimated["advantage"][b, : LENGTHS[b]], estimator(row)["advantage"][0])


def test_the_last_real_step_is_no_terminal_one_without_terminated_flags_either():
    data = padded_rollout()
    estimator = VectorGAE(gamma=0.9, lmbda=0.8, value_network=critic(2))
    expected = estimator(data.clone())
    found = estimator(data.exclude(("next", "terminated")))
    assert torch.equal(found["advantage"], expected["advantage"])


def test_steps_that_were_displaced_and_padding_both_count_out():
    """One of two masks is not enough for a step to count."""
    data = padded_rollout("mask")
    data["state_value"] = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(2))
    data["next", "state_value"] = torch.zeros(4, 6, 2)
    data["next", "done"] = data["next", "terminated"] = torch.ones(4, 6, 1, dtype=torch.bool)
    data["shifted_valid"] = torch.ones(4, 6, dtype=torch.bool)
    data["shifted_valid"][:, -2:] = False
    out = VectorGAE(gamma=0.9, lmbda=0.8, value_network=None, mask_key="mask")(data)
    counted = (out["advantage_per_group"] != 0).all(-1)
    assert torch.equal(counted, STEPS & data["shifted_valid"])


def test_value_estimate_is_the_value_target_with_padding_too():
    data = poison(padded_rollout())
    estimator = VectorGAE(gamma=0.9, lmbda=0.8, value_network=critic(2))
    keys = set(data.keys(True))
    target = estimator.value_estimate(data)
    assert set(data.keys(True)) == keys
    assert torch.equal(target, estimator(data)["value_target"])


def test_estimators_of_one_reward_are_refused_where_they_would_be_wrong():
    loss = make(columns=1)
    loss.make_value_estimator(GAE, value_network=loss.critic_network, gamma=0.99, lmbda=0.95)
    data = padded_rollout(columns=1)
    with pytest.raises(ValueError, match=r"GAE does not know masks.*TD0.*TDLambda.*VectorGAE"):
        loss(data)
    data["collector", "mask"] = torch.ones(4, 6, dtype=torch.bool)
    theirs = ClipPPOLoss(categorical_actor(), critic(1))
    torch.testing.assert_close(loss(data)["loss_objective"], theirs(data)["loss_objective"])
    several = make()
    several.make_value_estimator(GAE, value_network=several.critic_network, gamma=0.99, lmbda=0.95)
    with pytest.raises(ValueError, match="GAE estimates one reward, and the data hold 2"):
        several(padded_rollout())
