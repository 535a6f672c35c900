import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE

from torchrl_maxmin.objectives import VectorGAE, scalarise_advantage

GAMMA, LMBDA = 0.97, 0.9
SHAPES = [(1, 1, 1), (4, 9, 3), (2, 3, 8, 2), (7, 4)]  # [*B, T, K]


def rollout(shape, ends="mixed", seed=0, dtype=torch.float32):
    *batch, columns = shape
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flags = (*batch, 1)
    terminated = torch.rand(flags, generator=generator) < {"none": 0.0, "mixed": 0.2, "all": 1.1}[ends]
    truncated = torch.rand(flags, generator=generator) < {"none": 0.0, "mixed": 0.2, "all": 0.0}[ends]

    def normal(size):
        return torch.randn(*batch, size, generator=generator, dtype=dtype)

    return TensorDict(
        {
            "observation": normal(5),
            "state_value": normal(columns),
            "next": {
                "observation": normal(5),
                "state_value": normal(columns),
                "reward": normal(columns),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
        },
        batch_size=batch,
    )


def column(data, k):
    """The data of one scalar reward."""
    one = data.clone()
    for key in ("state_value", ("next", "state_value"), ("next", "reward")):
        one[key] = data[key][..., k : k + 1]
    return one


def k_scalar_estimates(data, make, **kwargs):
    """Advantage and target of K scalar estimators, side by side."""
    outputs = [make(k)(column(data, k), **kwargs) for k in range(data["next", "reward"].shape[-1])]
    return tuple(torch.cat([out[key] for out in outputs], -1) for key in ("advantage", "value_target"))


def check(estimated, expected):
    for key, value in zip(("advantage", "value_target"), expected, strict=True):
        torch.testing.assert_close(estimated[key], value, atol=2e-6, rtol=2e-6)


def scalar(k=None, **kwargs):
    return GAE(gamma=GAMMA, lmbda=LMBDA, value_network=None, **kwargs)


def vector(**kwargs):
    return VectorGAE(gamma=GAMMA, lmbda=LMBDA, value_network=None, **kwargs)


@pytest.mark.parametrize("ends", ["none", "mixed", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_k_scalar_estimates(shape, ends):
    data = rollout(shape, ends)
    expected = k_scalar_estimates(data, scalar)
    estimated = vector()(data.clone())
    assert estimated["advantage"].shape == shape
    check(estimated, expected)


def test_the_oracle_is_the_definition():
    data = rollout((2, 6, 2), seed=3, dtype=torch.float64)
    estimated = vector()(data.clone())
    reward, value, following = (data[k] for k in (("next", "reward"), "state_value", ("next", "state_value")))
    done, terminated = (data["next", key].double() for key in ("done", "terminated"))
    for t in range(6):
        total, weight = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
        for s in range(t, 6):
            delta = reward[:, s] + GAMMA * (1 - terminated[:, s]) * following[:, s] - value[:, s]
            total = total + weight * delta
            weight = weight * GAMMA * LMBDA * (1 - done[:, s])
        torch.testing.assert_close(estimated["advantage"][:, t], total)


@pytest.mark.parametrize("time_dim", [0, 1, -2])
def test_another_time_dimension(time_dim):
    data = rollout((4, 5, 6, 2))
    check(vector()(data.clone(), time_dim=time_dim), k_scalar_estimates(data, scalar, time_dim=time_dim))


@pytest.mark.parametrize("shape", [(4, 9, 3), (7, 4)], ids=str)
def test_average_gae_standardises_every_column_by_itself(shape):
    data = rollout(shape)
    data["next", "reward"] *= 10.0 ** torch.arange(shape[-1])
    expected = k_scalar_estimates(data, lambda k: scalar(average_gae=True))
    check(vector(average_gae=True)(data.clone()), expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_k_head_value_network(shifted):
    data = rollout((4, 9, 3)).exclude("state_value", ("next", "state_value"))
    data.names = [None, "time"]
    # Between resets the next observation is that of the next step, as in any rollout.
    steady = ~data["next", "done"][:, :-1]
    data["next", "observation"][:, :-1] = torch.where(
        steady, data["observation"][:, 1:], data["next", "observation"][:, :-1]
    )
    torch.manual_seed(0)
    heads = torch.nn.Linear(5, 3)

    def network(rows):
        head = torch.nn.Linear(5, rows.stop - rows.start)
        head.weight.data, head.bias.data = heads.weight.data[rows], heads.bias.data[rows]
        return TensorDictModule(head, in_keys=["observation"], out_keys=["state_value"])

    def scalar_with_network(k):
        return GAE(
            gamma=GAMMA, lmbda=LMBDA, value_network=network(slice(k, k + 1)), shifted=shifted,
            shifted_budget=9,
        )  # fmt: skip

    expected = []
    for k in range(3):
        one = data.clone()
        one["next", "reward"] = data["next", "reward"][..., k : k + 1]
        expected.append(scalar_with_network(k)(one))
    estimated = VectorGAE(
        gamma=GAMMA, lmbda=LMBDA, value_network=network(slice(0, 3)), shifted=shifted, shifted_budget=9
    )(data.clone())
    check(
        estimated,
        [torch.cat([one[key] for one in expected], -1) for key in ("advantage", "value_target")],
    )
    assert not estimated["advantage"].requires_grad
    assert heads.weight.grad is None


@pytest.mark.parametrize("option", ["auto_reset_env", "steps_to_next_obs", "differentiable"])
def test_options_of_gae(option):
    data = rollout((4, 9, 3))
    kwargs = {}
    if option == "steps_to_next_obs":
        data["steps_to_next_obs"] = torch.randint(1, 4, (4, 9, 1), generator=torch.Generator().manual_seed(0))
    else:
        kwargs[option] = True
    if option == "differentiable":
        data["state_value"].requires_grad_()
    expected = k_scalar_estimates(data, lambda k: scalar(**kwargs))
    estimated = vector(**kwargs)(data.clone())
    check(estimated, expected)
    assert estimated["advantage"].requires_grad == (option == "differentiable")


def test_value_estimate_agrees_with_the_value_target():
    data = rollout((4, 9, 3))
    estimator = vector()
    target = estimator(data.clone())["value_target"]
    torch.testing.assert_close(estimator.value_estimate(data.clone()), target, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kl_column", [False, True])
def test_group_weights_scalarise(kl_column):
    groups = 3
    data = rollout((4, 9, groups + kl_column))
    plain = vector()(data.clone())
    weights = torch.rand(4, 9, groups).softmax(-1)
    estimated = vector()(data.clone().set("group_weights", weights))
    assert torch.equal(estimated["advantage_per_group"], plain["advantage"])
    assert torch.equal(estimated["value_target"], plain["value_target"])
    assert estimated["advantage"].shape == (4, 9, 1)
    assert torch.equal(estimated["advantage"], scalarise_advantage(plain["advantage"], weights))


def test_average_gae_standardises_the_scalarised_advantage():
    data = rollout((4, 9, 3)).set("group_weights", torch.tensor([0.2, 0.3, 0.5]).expand(4, 9, 3))
    raw = vector()(data.clone())["advantage"]
    estimated = vector(average_gae=True)(data.clone())
    torch.testing.assert_close(estimated["advantage"], (raw - raw.mean()) / raw.std())


def test_configurable_keys():
    data = rollout((4, 9, 2)).rename_key_("state_value", "v").set("w", torch.full((4, 9, 2), 0.5))
    data["next"].rename_key_("state_value", "v")
    estimator = vector()
    estimator.set_keys(value="v", group_weights="w", advantage_per_group="columns", advantage="a")
    out = estimator(data)
    torch.testing.assert_close(out["a"], out["columns"].mean(-1, keepdim=True))
    with pytest.raises(KeyError, match="is not an accepted tensordict key"):
        estimator.set_keys(weight="w")


def test_keyword_call():
    data = rollout((4, 9, 2))
    advantage, value_target = vector()(
        state_value=data["state_value"],
        next_state_value=data["next", "state_value"],
        next_reward=data["next", "reward"],
        next_done=data["next", "done"],
        next_terminated=data["next", "terminated"],
    )
    check(vector()(data.clone()), (advantage, value_target))


def test_padding_is_as_if_it_were_not_there():
    data = rollout((3, 9, 2), ends="none")
    lengths = torch.tensor([9, 4, 1])
    data["action_mask"] = torch.arange(9) < lengths.unsqueeze(1)
    data["next", "done"][torch.arange(3), lengths - 1] = True
    padded = data.clone()
    for key in ("state_value", ("next", "state_value"), ("next", "reward")):
        padded[key][~data["action_mask"]] = torch.nan
    estimated = vector(mask_key="action_mask")(padded)
    for row, length in enumerate(lengths):
        alone = vector()(data[row : row + 1, :length].clone())
        for key in ("advantage", "value_target"):
            torch.testing.assert_close(estimated[key][row, :length], alone[key][0])
    assert (estimated["advantage"][~data["action_mask"]] == 0).all()


@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 1)], ids=str)
def test_masked_average_gae_uses_valid_steps(shape):
    data = rollout((4, 9, 2)).set("mask", torch.rand(shape) > 0.3)
    mask = data["mask"].reshape(4, 9)
    estimated = vector(mask_key="mask", average_gae=True)(data)["advantage"][mask]
    torch.testing.assert_close(estimated.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(estimated.std(0, correction=0), torch.ones(2))


def test_bad_data_raise():
    data = rollout((4, 9, 3))
    with pytest.raises(ValueError, match="the same columns"):
        vector()(data.clone().set("state_value", torch.zeros(4, 9, 1)))
    with pytest.raises(ValueError, match="one for all columns"):
        vector()(data.clone().set(("next", "done"), torch.zeros(4, 9, 3, dtype=torch.bool)))
    with pytest.raises(ValueError, match="Without a value network"):
        vector()(data.exclude("state_value"))
    with pytest.raises(ValueError, match="last dimension must be 5"):
        vector()(data.clone().set("group_weights", torch.ones(4, 9, 5)))
    with pytest.raises(ValueError, match="needs a time dimension"):
        vector()(data[0, 0])
