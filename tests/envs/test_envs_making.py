"""Environments by name: ours, MO-Gymnasium's with observations made fit, factories; and what is refused."""

import sys

import pytest
import torch
import torch.multiprocessing as mp
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, Unbounded
from torchrl.envs import SerialEnv, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.envs import FishwoodEnv, FruitTreeEnv, GridworldEnv, GroupReward, make_env
from torchrl_maxmin.envs.gym import FlatObservation

# name, columns of the observation, groups
LIGHT = [
    ("fishwood-v0", 2, 2),
    ("fruit-tree-v0", 128, 6),
    ("deep-sea-treasure-v0", 24, 2),
    ("deep-sea-treasure-concave-v0", 24, 2),
    ("four-room-v0", 196, 3),
    ("resource-gathering-v0", 24, 3),
    ("minecart-deterministic-v0", 7, 3),
    ("mo-mountaincar-v0", 2, 3),
    ("mo-mountaincarcontinuous-v0", 2, 2),
    ("water-reservoir-v0", 1, 2),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fishwood-v0", FishwoodEnv), ("fruit-tree-v0", FruitTreeEnv), ("gridworld", GridworldEnv)],
)
def test_what_is_batched_here(name, kind):
    env = make_env(name, 3, seed=4)
    assert type(env) is kind
    assert env.batch_size == (3,)
    assert type(make_env(name, 3, backend="batched")) is kind
    check_env_specs(env)


def test_options_and_the_seed_reach_the_environment():
    env = make_env("fishwood-v0", 50, seed=3, fish_chance=1.0, horizon=4)
    same, other = make_env("fishwood-v0", 50, seed=3, fish_chance=1.0, horizon=4), make_env("fishwood-v0", 50)
    woods = env.rollout(4)["observation"]
    assert woods.shape == (50, 4, 2)
    draws = [torch.rand(5, generator=one._generator) for one in (env, same, other)]
    assert not torch.equal(draws[0], draws[2])
    assert same.horizon == 4


@pytest.mark.parametrize(("name", "columns", "groups"), LIGHT)
def test_mo_gymnasium_s(name, columns, groups):
    options = {"normalized_action": True} if name == "water-reservoir-v0" else {}
    env = make_env(name, 2, seed=1, backend="gym", **options)
    assert isinstance(env, SerialEnv)
    check_env_specs(env)
    data = env.rollout(6, break_when_any_done=False)
    assert data["observation"].shape == (2, 6, columns)
    assert data["observation"].dtype is data["next", "reward"].dtype is torch.float32
    assert data["next", "reward"].shape == (2, 6, groups)
    assert data["next", "reward"].isfinite().all()
    if name != "water-reservoir-v0":  # the only one without bounds
        assert (data["next", "observation"] >= 0).all()
        assert (data["next", "observation"] <= 1).all()
    check_env_specs(TransformedEnv(env, GroupReward()))
    env.close()


def test_both_backends_look_alike_at_fishwood():
    def looks(backend):
        env, places = (
            make_env("fishwood-v0", 2, backend=backend),
            iter(torch.tensor([[0, 1], [1, 1], [0, 0]])),
        )
        return env.rollout(3, lambda td: td.set("action", next(places)))["next", "observation"]

    assert torch.equal(looks("gym"), looks("batched"))


def rollout(env):
    torch.manual_seed(0)
    data = env.rollout(30, break_when_any_done=False).contiguous()
    env.close()
    return data["next", "reward"]


def test_copies_are_seeded_apart_and_again_alike():
    first, again, other = (
        rollout(make_env("fishwood-v0", 3, backend="gym", seed=seed, fishproba=0.5, woodproba=0.5))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_processes_give_what_one_after_the_other_gives():
    mp.set_start_method("fork", force=True)
    try:
        serial, parallel = (
            rollout(make_env("fishwood-v0", 2, backend="gym", seed=1, parallel=parallel))
            for parallel in (False, True)
        )
    finally:
        mp.set_start_method("spawn", force=True)  # TorchRL's own choice
    assert torch.equal(serial, parallel)


@pytest.mark.parametrize(
    ("spec", "mode", "given", "expected"),
    [
        (Bounded(1, 3, shape=(2,), dtype=torch.int32), "auto", [1, 3], [1, 0, 0, 0, 0, 1]),
        (Bounded(0, 4, shape=(2,), dtype=torch.int32), "scale", [1, 4], [0.25, 1]),
        (Bounded(0, 4, shape=(2,), dtype=torch.int32), "none", [1, 4], [1, 4]),
        (Bounded(0, 999, shape=(2,), dtype=torch.int64), "auto", [0, 999], [0, 1]),
        (Bounded(-2.0, 2.0, shape=(2,)), "auto", [-2.0, 1.0], [0, 0.75]),
        (Bounded(torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 5.0])), "auto", [7.0, 2.0], [7, 0.25]),
        (Bounded(torch.tensor([-3.4e38, 2.0]), torch.tensor([3.4e38, 2.0])), "auto", [7.0, 2.0], [7, 0]),
        (Unbounded(shape=(2,), dtype=torch.float64), "auto", [7.0, -1.0], [7, -1]),
        (Unbounded(shape=(2,), dtype=torch.int64), "auto", [7, -1], [7, -1]),
        (Categorical(3), "auto", 2, [0, 0, 1]),
        (Categorical(3), "scale", 2, [1]),
        (MultiCategorical([2, 3]), "auto", [1, 0], [0, 1, 1, 0, 0]),
        (Binary(2, dtype=torch.int8), "auto", [1, 0], [0, 1, 1, 0]),
        (Bounded(0.0, 2.0, shape=(2, 2)), "auto", [[0.0, 1.0], [2.0, 1.0]], [0, 0.5, 1, 0.5]),
    ],
)
def test_observations_become_one_row(spec, mode, given, expected):
    flat = FlatObservation(spec, mode)
    given = torch.as_tensor(given, dtype=spec.dtype)
    assert flat._apply_transform(given).tolist() == expected
    assert flat._apply_transform(torch.stack([given] * 3)).tolist() == [expected] * 3
    assert flat._apply_transform(given).dtype is torch.float32
    assert flat.width == len(expected)


@pytest.mark.parametrize(
    ("spec", "mode", "match"),
    [
        (Bounded(0.0, 1.0, shape=(2,)), "one_hot", "one_hot needs bounded integers"),
        (Unbounded(shape=(2,), dtype=torch.int64), "one_hot", "one_hot needs bounded integers"),
        (Unbounded(shape=(2,)), "pixels", "one of auto, one_hot, scale, none, got 'pixels'"),
    ],
)
def test_observations_that_cannot(spec, mode, match):
    with pytest.raises(UserError, match=match):
        FlatObservation(spec, mode)


def my_grid(num_envs, seed, horizon=4):
    return GridworldEnv(num_envs, horizon=horizon, seed=seed)


def no_env(num_envs, seed):
    return "an environment"


def wrong_batch(num_envs, seed):
    return GridworldEnv(num_envs + 1, seed=seed)


def unnamed(num_envs, seed):
    from torchrl.envs import RenameTransform

    return TransformedEnv(GridworldEnv(num_envs), RenameTransform(["observation"], ["seen"]))


def test_a_factory_of_one_s_own(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    env = make_env("test_envs_making:my_grid", 3, horizon=2)
    assert env.rollout(9).shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("fishwod-v0", {}, "unknown environment 'fishwod-v0'; batched here.*close names: fishwood-v0"),
        ("xyzzy", {}, "unknown environment 'xyzzy'.*more from MO-Gymnasium; or module:function"),
        ("breakable-bottles-v0", {}, "observes bottles_carrying.*single array.*module:function"),
        ("minecart-rgb-v0", {}, "observes pixels"),
        ("deep-sea-treasure-v0", {"backend": "batched"}, "no batched form of deep-sea-treasure-v0; there is"),
        ("fishwood-v0", {"backend": "jax"}, "backend must be one of auto, batched, gym"),
        ("fishwood-v0", {"num_envs": 0}, "num_envs must be at least 1"),
        ("fishwood-v0", {"fishproba": 0.3}, "no option fishproba; it has fish_chance, wood_chance, horizon"),
        (
            "gridworld",
            {"backend": "gym"},
            "gridworld is no environment of MO-Gymnasium: leave backend at auto",
        ),
        ("fishwood-v0", {"backend": "gym", "colour": 1}, "MO-Gymnasium cannot make fishwood-v0: .*colour"),
        ("deep-sea-treasure-v0", {"observation": "rows"}, "observation must be one of auto"),
        ("no_such_module:f", {}, "cannot import the environment factory no_such_module:f"),
        ("test_envs_making:absent", {}, "cannot import the environment factory"),
        ("test_envs_making:my_grid", {"size": 3}, "no option size; it has horizon"),
        ("test_envs_making:no_env", {}, "must return a TorchRL environment, got str"),
        ("test_envs_making:wrong_batch", {}, r"batch size \[3\] instead of \[2\]"),
        ("test_envs_making:unnamed", {}, "no 'observation'"),
    ],
)
def test_mistakes(name, options, match, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    with pytest.raises(UserError, match=match):
        make_env(name, **{"num_envs": 2, **options})


def test_without_mo_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "mo_gymnasium", None)
    with pytest.raises(UserError, match=r"'four-room-v0', none of what is batched.*'torchrl-maxmin\[mo\]'"):
        make_env("four-room-v0", 2)
    assert make_env("fishwood-v0", 2).rollout(2).shape == (2, 2)
