"""Actor and critic for environments: they fit the specs, start near uniform, and score what they gave."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import OneHotCategorical, TanhNormal

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs import GroupReward, TabularEnv, VectorMDP, make_env
from torchrl_maxmin.models.mlp import make_actor, make_critic


class Fake(EnvBase):
    """Only its specs matter."""

    def __init__(self, action, batch=(5,), looks=None):
        super().__init__(batch_size=batch)
        looks = Unbounded(shape=(*batch, 3)) if looks is None else looks
        entries = looks if isinstance(looks, dict) else {"observation": looks}
        self.observation_spec = Composite(entries, shape=batch)
        self.action_spec = action
        self.reward_spec = Unbounded(shape=(*batch, 2))

    def _reset(self, tensordict=None, **_):
        raise NotImplementedError

    _step = _reset

    def _set_seed(self, seed):
        """Nothing is random here."""


ACTIONS = {
    "numbers": (Categorical(4, shape=(5,)), torch.distributions.Categorical, ()),
    "one-hot": (OneHot(4, shape=(5, 4), dtype=torch.int64), OneHotCategorical, (4,)),
    "bounded": (Bounded(torch.tensor([-1.0, 2.0]).expand(5, 2), 3.0, shape=(5, 2)), TanhNormal, (2,)),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_fit_their_spec_and_are_scored_as_sampled(kind):
    spec, distribution, shape = ACTIONS[kind]
    torch.manual_seed(0)
    actor = make_actor(Fake(spec), [16])
    looks = TensorDict({"observation": torch.randn(5, 3)}, [5])
    given = actor(looks.clone())
    assert given["action"].shape == (5, *shape)
    assert given["action"].dtype is spec.dtype
    assert spec.is_in(given["action"])
    assert given["sample_log_prob"].shape == (5,)
    assert type(actor.get_dist(looks)) is distribution
    torch.testing.assert_close(actor.get_dist(looks).log_prob(given["action"]), given["sample_log_prob"])


def test_the_first_policy_is_near_uniform_or_wide():
    torch.manual_seed(0)
    looks = TensorDict({"observation": torch.randn(200, 3)}, [200])
    for kind in ("numbers", "one-hot"):
        chance = make_actor(Fake(ACTIONS[kind][0])).get_dist(looks).probs
        torch.testing.assert_close(chance, torch.full((200, 4), 0.25), atol=0.02, rtol=0)
    numbers = make_actor(Fake(ACTIONS["bounded"][0])).get_dist(looks)
    torch.testing.assert_close(numbers.scale, torch.ones(200, 2), atol=0.05, rtol=0)
    draws = numbers.sample((100,))
    assert (draws.amin((0, 1)) < torch.tensor([-0.5, 2.15])).all()
    assert (draws.amax((0, 1)) > torch.tensor([2.5, 2.85])).all()
    assert (draws >= torch.tensor([-1.0, 2.0])).all()
    assert (draws <= 3).all()


def test_log_probabilities_of_bounded_numbers_integrate_to_one():
    spec = Bounded(-1.0, 3.0, shape=(1, 1))
    torch.manual_seed(1)
    dist = make_actor(Fake(spec, batch=(1,))).get_dist(TensorDict({"observation": torch.ones(1, 3)}, [1]))
    grid = torch.linspace(-1 + 1e-4, 3 - 1e-4, 20001, dtype=torch.float64)[:, None, None].float()
    density = dist.log_prob(grid).exp().squeeze(-1).double()
    assert torch.trapezoid(density, grid[:, 0, 0].double()).item() == pytest.approx(1.0, abs=2e-3)


def test_layers_are_orthogonal_with_small_last_ones():
    torch.manual_seed(0)
    env = Fake(ACTIONS["numbers"][0])
    for module, gain in (
        (make_actor(env, [3, 3]).module[0].module, 0.01),
        (make_critic(env, 3, [3]).module, 1),
    ):
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        for layer, scale in zip(layers, [2**0.5] * (len(layers) - 1) + [gain], strict=True):
            rows = layer.weight @ layer.weight.T if layer.out_features <= 3 else layer.weight.T @ layer.weight
            torch.testing.assert_close(rows, scale**2 * torch.eye(len(rows)), atol=1e-5, rtol=1e-4)
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("sizes", [[], [7], [16, 8]])
def test_hidden_sizes(sizes):
    env = Fake(ACTIONS["numbers"][0])
    for module in (make_actor(env, sizes), make_critic(env, 2, sizes)):
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == sizes
        assert layers[0].in_features == 3


def test_the_critic_gives_a_value_for_every_group():
    env = TabularEnv(VectorMDP.random(4, 3, 2), num_envs=6)
    critic = make_critic(env, 3)
    data = critic(env.rollout(5))
    assert data["state_value"].shape == (6, 5, 3)
    one = critic(TensorDict({"observation": data["observation"][2, 3]}, []))
    torch.testing.assert_close(one["state_value"], data["state_value"][2, 3])


@pytest.mark.parametrize("name", ["fishwood-v0", "gridworld"])
def test_environments_roll_out_with_their_actor(name):
    env = make_env(name, 4).append_transform(GroupReward())
    data = env.rollout(6, make_actor(env, [8]))
    assert data["sample_log_prob"].shape == (4, 6)
    assert data["next", "group_reward"].shape == (4, 6, 2)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Unbounded(shape=(5, 2)), "actions of Unbounded"),
        (MultiCategorical([2, 3], shape=(5, 2)), "must be categorical, one-hot, or a bounded vector"),
        (Binary(2, shape=(5, 2)), "actions of Binary"),
        (Bounded(0, 4, shape=(5, 2), dtype=torch.int64), "actions of Bounded"),
        (Bounded(0.0, 1.0, shape=(5, 2, 2)), r"\(5, 2, 2\)"),
        (Categorical(3, shape=(5, 2)), "actions of Categorical"),
    ],
)
def test_actions_that_it_cannot_give(spec, told):
    with pytest.raises(UserError, match=told):
        make_actor(Fake(spec))


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        (
            {"pixels": Unbounded(shape=(5, 3))},
            "the environment gives pixels; the policy reads one entry named",
        ),
        (Unbounded(shape=(5, 3), dtype=torch.int64), "the observation is torch.int64 of shape"),
        (
            Unbounded(shape=(5, 3, 3)),
            r"of shape \(5, 3, 3\); the policy reads floats of shape \(5,\) and one",
        ),
    ],
)
def test_observations_that_it_cannot_read(looks, told):
    env = Fake(ACTIONS["numbers"][0], looks=looks)
    for make in (make_actor, lambda env: make_critic(env, 2)):
        with pytest.raises(UserError, match=told):
            make(env)
