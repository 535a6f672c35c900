"""The TorchRL contract of the loss: keys, reductions, keyword calls, state, buffers, compile."""

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
    total,
)
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import nn
from torchrl.modules import ActorValueOperator, PercentileValueNorm, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE

from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE

functional = pytest.mark.parametrize("functional", [True, False], ids=["functional", "stateful"])
WEIGHTS = (0.3, 0.7)


@functional
@pytest.mark.parametrize("precomputed", [True, False])
@pytest.mark.parametrize("make_actor", [categorical_actor, scoring_actor], ids=["dist", "scorer"])
def test_maxmin_ppo(make_actor, precomputed, functional):
    loss = MaxMinPPOLoss(make_actor(), critic(2), functional=functional)
    data = batch(columns=2, weights=WEIGHTS) if precomputed else rollout()
    keys = set(data.keys(True))
    losses, grads = gradients(loss, data)
    assert set(data.keys(True)) == keys
    assert {"loss_objective", "loss_entropy", "loss_critic"} <= set(losses)
    assert all(value.isfinite().all() for value in losses.values())
    assert len(grads) == 4
    assert all(grad.norm() > 0 for grad in grads.values())
    assert set(losses) == set(loss.out_keys)


@functional
def test_maxmin_ppo_state_dict(functional):
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), functional=functional, kl_to_ref_coeff=0.1)
    loss.clip_epsilon = 0.3
    other = MaxMinPPOLoss(categorical_actor(5), critic(2, 6), functional=functional, kl_to_ref_coeff=0.2)
    other.load_state_dict(loss.state_dict())
    data = batch(columns=2, weights=WEIGHTS)
    for key, value in loss(data).items():
        assert torch.equal(other(data)[key], value)


def test_maxmin_ppo_tensordict_keys():
    loss = MaxMinPPOLoss(scoring_actor(), critic(2))
    defaults = {
        "advantage": "advantage",
        "value_target": "value_target",
        "value": "state_value",
        "sample_log_prob": "sample_log_prob",
        "action": "action",
        "reward": "reward",
        "done": "done",
        "terminated": "terminated",
        "group_weights": "group_weights",
        "ref_log_prob": "ref_log_prob",
        "log_prob": "log_prob",
        "entropy": "entropy",
    }
    for name, key in defaults.items():
        assert getattr(loss.tensor_keys, name) == key
    for name in defaults.keys() - {"value"}:
        loss.set_keys(**{name: ("nested", name)})
        assert getattr(loss.tensor_keys, name) == ("nested", name)
        loss.set_keys(**{name: None})
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        loss.set_keys(weights="w")
    loss.make_value_estimator()
    loss.set_keys(group_weights="w", advantage="a", reward="r")
    keys = loss.value_estimator.tensor_keys
    assert (keys.group_weights, keys.advantage, keys.reward) == ("w", "a", "r")


def test_maxmin_ppo_tensordict_keys_run():
    renamed = {
        "advantage": "a",
        "value_target": ("targets", "v"),
        "group_weights": ("maxmin", "w"),
        "ref_log_prob": "r",
        "sample_log_prob": "old",
    }
    data = batch(columns=2, weights=WEIGHTS)
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), kl_to_ref_coeff=0.1)
    expected = loss(data)
    loss.set_keys(**renamed)
    moved = data.clone()
    for old, new in renamed.items():
        moved.rename_key_(old, new)
    for key, value in loss(moved).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("make_actor", [categorical_actor, scoring_actor], ids=["dist", "scorer"])
def test_maxmin_ppo_notensordict(make_actor):
    data = batch(columns=2, weights=WEIGHTS)
    data["mask"] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    loss = MaxMinPPOLoss(make_actor(), critic(2), loss_mask_key="mask", kl_to_ref_coeff=0.1, clip_value=0.2)
    expected = loss(data)
    assert {"advantage", "value_target", "group_weights", "mask", "ref_log_prob"} <= set(loss.in_keys)
    outputs = loss(**dict(data.items()))
    assert len(outputs) == len(loss.out_keys)
    for key, value in zip(loss.out_keys, outputs, strict=True):
        assert torch.equal(value, expected[key])
    loss.select_out_keys("loss_objective", "loss_critic")
    objective, value_loss = loss(**dict(data.items()))
    assert torch.equal(objective, expected["loss_objective"])
    assert torch.equal(value_loss, expected["loss_critic"])


def test_maxmin_ppo_notensordict_computes_the_advantage():
    data = rollout()
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    expected = loss(data)
    outputs = loss(**data.flatten_keys("_").to_dict())
    for key, value in zip(loss.out_keys, outputs, strict=True):
        torch.testing.assert_close(value, expected[key])


def test_keyword_call_without_a_critic():
    data = batch(weights=None)
    loss = MaxMinPPOLoss(categorical_actor(), None, entropy_bonus=False)
    assert "loss_critic" not in loss.out_keys
    outputs = loss(**data.select("observation", "action", "sample_log_prob", "advantage"))
    assert torch.equal(outputs[0], loss(data)["loss_objective"])


@pytest.mark.parametrize("reduction", [None, "none", "mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_maxmin_ppo_reduction(reduction, masked):
    data = batch(columns=2, weights=WEIGHTS)
    mask = torch.ones(4, 6, dtype=torch.bool)
    if masked:
        mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    data["mask"] = mask
    make = {"loss_mask_key": "mask", "kl_to_ref_coeff": 0.1}
    steps = MaxMinPPOLoss(categorical_actor(), critic(2), reduction="none", **make)(data)
    losses = MaxMinPPOLoss(categorical_actor(), critic(2), reduction=reduction, **make)(data)
    for key in ("loss_objective", "loss_entropy", "loss_kl_to_ref", "loss_critic"):
        assert steps[key].shape == ((4, 6, 2) if key == "loss_critic" else (4, 6))
        if reduction == "none":
            assert torch.equal(losses[key], steps[key])
            assert (losses[key][~mask] == 0).all()
        else:
            valid = steps[key][mask]
            expected = valid.sum() if reduction == "sum" else valid.mean()
            torch.testing.assert_close(losses[key], expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_critic_loss_is_a_mean_over_columns(reduction):
    data = batch(columns=3, weights=(0.2, 0.3, 0.5))
    loss = MaxMinPPOLoss(categorical_actor(), critic(3), reduction=reduction, loss_critic_type="l2")
    value = loss.critic_network_params.to_module(loss.critic_network)
    with value:
        prediction = loss.critic_network(data.clone())["state_value"]
    error = (prediction - data["value_target"]).square()
    torch.testing.assert_close(loss(data)["loss_critic"], error.mean() if reduction == "mean" else error)


def test_reset_parameters_recursive():
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    before = [p.detach().clone() for p in loss.parameters()]
    loss.reset_parameters_recursive()
    after = list(loss.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@functional
@pytest.mark.parametrize("separate_losses", [True, False])
def test_maxmin_ppo_shared_params(separate_losses, functional):
    torch.manual_seed(0)
    trunk = TensorDictModule(nn.Linear(3, 5), in_keys=["observation"], out_keys=["hidden"])
    head = ProbabilisticActor(
        TensorDictModule(nn.Linear(5, 4), in_keys=["hidden"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )
    values = TensorDictModule(nn.Linear(5, 2), in_keys=["hidden"], out_keys=["state_value"])
    model = ActorValueOperator(trunk, head, values)
    loss = MaxMinPPOLoss(
        model.get_policy_operator(),
        model.get_value_operator(),
        separate_losses=separate_losses,
        functional=functional,
    )
    losses = loss(batch(columns=2, weights=WEIGHTS))
    losses["loss_critic"].backward()
    from_critic = trunk.module.weight.grad
    # The critic's loss reaches the shared trunk unless the losses are separate, as in TorchRL, whose
    # separate losses need functional modules.
    if separate_losses and functional:
        assert from_critic is None or from_critic.norm() == 0
    else:
        assert from_critic.norm() > 0
    assert values.module.weight.grad.norm() > 0


# -- options -----------------------------------------------------------------------------------------------


def test_schedulable_buffers():
    loss = MaxMinPPOLoss(
        categorical_actor(), critic(2), kl_to_ref_coeff=0.1, clip_value=0.2, max_importance_ratio=10.0
    )
    data = batch(columns=2, weights=WEIGHTS)
    before = loss(data)
    for name in ("clip_epsilon", "entropy_coeff", "critic_coeff", "clip_value", "kl_to_ref_coeff"):
        setattr(loss, name, 0.05)
        assert isinstance(getattr(loss, name), torch.Tensor)
        assert loss.state_dict()[name].item() == pytest.approx(0.05)
    after = loss(data)
    torch.testing.assert_close(after["loss_kl_to_ref"], 0.5 * before["loss_kl_to_ref"])
    torch.testing.assert_close(after["loss_entropy"], 5 * before["loss_entropy"])
    assert after["clip_fraction"] > before["clip_fraction"]


def test_asymmetric_clip():
    data = batch()
    loss = MaxMinPPOLoss(categorical_actor(), critic(1), clip_epsilon=(0.1, 0.4))
    theirs = ClipPPOLoss(categorical_actor(), critic(1), clip_epsilon=(0.1, 0.4))
    assert torch.equal(loss(data)["loss_objective"], theirs(data)["loss_objective"])
    with pytest.raises(AttributeError, match="asymmetric"):
        loss.clip_epsilon = 0.1


def test_delay_actor():
    loss = MaxMinPPOLoss(categorical_actor(), critic(1), delay_actor=True, max_importance_ratio=100.0)
    theirs = ClipPPOLoss(categorical_actor(), critic(1), delay_actor=True, max_importance_ratio=100.0)
    for one in (loss, theirs):
        SoftUpdate(one, eps=0.9)
        one.target_actor_network_params.apply_(lambda p: p.data.mul_(1.5))
    data = batch()
    for key in ("loss_objective", "loss_entropy", "loss_critic"):
        assert torch.equal(loss(data)[key], theirs(data)[key])
    with pytest.raises(ValueError, match="delay_actor=True requires functional=True"):
        MaxMinPPOLoss(categorical_actor(), critic(1), delay_actor=True, functional=False)


def test_value_estimators():
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    assert isinstance(loss.value_estimator, VectorGAE)
    loss.make_value_estimator(gamma=0.5, lmbda=0.1)
    assert loss.value_estimator.gamma.item() == 0.5
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.25)
    assert isinstance(loss.value_estimator, VectorGAE)
    scalar = MaxMinPPOLoss(categorical_actor(), critic(1))
    data = rollout(columns=1, weights=(1.0,))
    with_vector = scalar(data)
    scalar.make_value_estimator(GAE, value_network=scalar.critic_network, gamma=0.99, lmbda=0.95)
    for key in ("loss_objective", "loss_critic"):
        torch.testing.assert_close(scalar(data)[key], with_vector[key])
    theirs = ClipPPOLoss(categorical_actor(), critic(1))
    for one in (scalar, theirs):
        one.make_value_estimator(ValueEstimators.TDLambda, lmbda=0.5)
    for key in ("loss_objective", "loss_critic"):
        assert torch.equal(scalar(data)[key], theirs(data)[key])


def test_computed_and_precomputed_advantages_agree():
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    data = rollout()
    inside = loss(data)
    with loss.critic_network_params.to_module(loss.critic_network):
        outside = VectorGAE(gamma=0.99, lmbda=0.95, value_network=loss.critic_network)(data.clone())
    for key, value in loss(outside).items():
        torch.testing.assert_close(value, inside[key])


def test_advantage_norm():
    make = {"advantage_norm": PercentileValueNorm(shape=1)}
    loss = MaxMinPPOLoss(categorical_actor(), critic(1), **make)
    theirs = ClipPPOLoss(categorical_actor(), critic(1), advantage_norm=PercentileValueNorm(shape=1))
    assert torch.equal(loss(batch())["loss_objective"], theirs(batch())["loss_objective"])
    per_column = MaxMinPPOLoss(categorical_actor(), critic(2), advantage_norm=PercentileValueNorm(shape=2))
    with pytest.raises(ValueError, match="scalarised before it is normalised"):
        per_column(batch(columns=2, weights=WEIGHTS))


@pytest.mark.parametrize("make_actor", [categorical_actor, gaussian_actor], ids=["discrete", "continuous"])
def test_compile(make_actor):
    torch._dynamo.reset()
    data = batch(columns=2, weights=WEIGHTS, continuous=make_actor is gaussian_actor)
    data["mask"] = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    entropy_bonus = make_actor is categorical_actor  # sampled for the Gaussian: another draw when compiled
    loss = MaxMinPPOLoss(
        make_actor(), critic(2), entropy_bonus=entropy_bonus, loss_mask_key="mask", kl_to_ref_coeff=0.1
    )
    eager, eager_grads = gradients(loss, data)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for parameter in loss.parameters():
        parameter.grad = None
    losses = compiled(data)
    total(losses).backward()
    for key, value in eager.items():
        torch.testing.assert_close(losses[key].detach(), value)
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter.grad, eager_grads[name])


def test_composite_actions():
    with set_composite_lp_aggregate(False):
        torch.manual_seed(0)
        module = TensorDictModule(
            nn.Linear(3, 6), in_keys=["observation"], out_keys=[("params", "all", "logits")]
        )
        split = TensorDictModule(
            lambda x: (x[..., :4], x[..., 4:]),
            in_keys=[("params", "all", "logits")],
            out_keys=[("params", "first", "logits"), ("params", "second", "logits")],
        )
        categorical = torch.distributions.Categorical
        actor = ProbabilisticTensorDictSequential(
            module,
            split,
            ProbabilisticTensorDictModule(
                in_keys=["params"],
                out_keys=["first", "second"],
                distribution_class=CompositeDistribution,
                distribution_kwargs={"distribution_map": {"first": categorical, "second": categorical}},
                return_log_prob=True,
            ),
        )
        data = TensorDict(
            {
                "observation": torch.randn(5, 3),
                "first": torch.randint(4, (5,)),
                "second": torch.randint(2, (5,)),
                "first_log_prob": torch.randn(5) - 1,
                "second_log_prob": torch.randn(5) - 1,
                "advantage": torch.randn(5, 1),
                "value_target": torch.randn(5, 1),
            },
            batch_size=[5],
        )
        ours, theirs = MaxMinPPOLoss(actor, critic(1)), ClipPPOLoss(actor, critic(1))
        for key in ("loss_objective", "loss_entropy", "loss_critic", "entropy", "kl_approx"):
            assert torch.equal(ours(data)[key], theirs(data)[key])
        assert "composite_entropy" in ours(data)


# -- errors ------------------------------------------------------------------------------------------------


def test_an_unweighted_vector_advantage_raises():
    loss = MaxMinPPOLoss(categorical_actor(), critic(2))
    with pytest.raises(ValueError, match=r"2 columns .* no 'group_weights'"):
        loss(batch(columns=2))
    with pytest.raises(ValueError, match="no 'group_weights'"):
        loss(rollout().exclude("group_weights"))


@pytest.mark.parametrize("batch_size", [(4, 6), (4,)], ids=["steps", "sequences"])
def test_an_advantage_without_its_last_dimension_raises(batch_size):
    data = batch()
    data = TensorDict(dict(data.items()), batch_size=batch_size)
    data["advantage"] = data["advantage"].squeeze(-1)
    with pytest.raises(ValueError, match="misses its last dimension"):
        MaxMinPPOLoss(categorical_actor(), critic(1))(data)


def test_missing_entries_raise():
    data = batch(columns=2, weights=WEIGHTS)
    loss = MaxMinPPOLoss(categorical_actor(), critic(2), clip_value=0.2, kl_to_ref_coeff=0.1)
    for key, match in (
        ("value_target", "value target"),
        ("state_value", "clip_value needs"),
        ("ref_log_prob", "kl_to_ref_coeff needs"),
        ("sample_log_prob", "log-prob"),
    ):
        with pytest.raises(KeyError, match=match):
            loss(data.exclude(key))
    with pytest.raises(RuntimeError, match="neither"):
        MaxMinPPOLoss(categorical_actor(), None)(data.exclude("advantage"))


def test_columns_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="one column per group each"):
        MaxMinPPOLoss(categorical_actor(), critic(1))(batch(columns=2, weights=WEIGHTS))
    with pytest.raises(ValueError, match="last dimension must be 3"):
        MaxMinPPOLoss(categorical_actor(), critic(2))(batch(columns=2, weights=(0.2, 0.3, 0.5)))


def test_constructor_errors():
    with pytest.raises(TypeError, match="unknown arguments: clip_eps"):
        MaxMinPPOLoss(categorical_actor(), critic(1), clip_eps=0.1)
    with pytest.raises(TypeError, match="removed"):
        MaxMinPPOLoss(categorical_actor(), critic(1), entropy_coef=0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        MaxMinPPOLoss(categorical_actor(), critic(1), kl_to_ref_coeff=-0.1)
    with pytest.raises(ValueError, match="clip_epsilon must be between 0 and 1"):
        MaxMinPPOLoss(categorical_actor(), critic(1), clip_epsilon=1.5)
    with pytest.raises(ValueError, match="loss_mask_key must be"):
        MaxMinPPOLoss(categorical_actor(), critic(1), loss_mask_key=3)


def test_actors_that_cannot_be_scored_raise():
    data = batch()
    mute = TensorDictModule(nn.Linear(3, 4), in_keys=["observation"], out_keys=["logits"])
    with pytest.raises(TypeError, match=r"writes the log-probability .* 'log_prob'"):
        MaxMinPPOLoss(mute, critic(1))(data)
    without_entropy = TensorDictModule(
        lambda observation, action: observation[..., 0], ["observation", "action"], ["log_prob"]
    )
    with pytest.raises(ValueError, match="entropy_bonus=False"):
        MaxMinPPOLoss(without_entropy, critic(1))(data)
    MaxMinPPOLoss(without_entropy, critic(1), entropy_bonus=False)(data)
    wide = TensorDictModule(lambda observation: observation[..., :1], ["observation"], ["log_prob"])
    with pytest.raises(ValueError, match="but 'sample_log_prob' has"):
        MaxMinPPOLoss(wide, critic(1), entropy_bonus=False)(data)


def test_a_named_mask_that_is_missing_raises():
    with pytest.raises(KeyError, match=r"'action_mask'.*not in the data"):
        MaxMinPPOLoss(categorical_actor(), critic(1), loss_mask_key="action_mask")(batch())


@pytest.mark.parametrize("clip_value", [None, False, 0.0])
def test_no_value_clip(clip_value):
    loss = MaxMinPPOLoss(categorical_actor(), critic(1), clip_value=clip_value)
    data = batch().exclude("state_value")
    assert torch.equal(
        loss(data)["loss_critic"], ClipPPOLoss(categorical_actor(), critic(1))(data)["loss_critic"]
    )
