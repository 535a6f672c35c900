"""Steps by workers: whose weights, which copies, which random numbers, and where episodes begin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts_fakes import FakeWorkers
from torchrl.envs import TransformedEnv

from torchrl_maxmin.envs import FishwoodEnv, GroupReward
from torchrl_maxmin.envs.gym import make_gym_env
from torchrl_maxmin.models.mlp import make_actor
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.rollouts.environment_workers import EnvSampler, WorkerEnvRollouts, block_sizes

#: blocks of 8, 8 and 3; episodes of 7 steps, batches of 5
NUM_ENVS, HORIZON, STEPS, BATCHES = 19, 7, 5, 4


def fishwood(num_envs):
    return TransformedEnv(FishwoodEnv(num_envs, horizon=HORIZON), GroupReward())


def treasure(num_envs):
    return TransformedEnv(make_gym_env("deep-sea-treasure-v0", num_envs), GroupReward())


@pytest.fixture
def models():
    torch.manual_seed(0)
    return Networks(make_actor(fishwood(1), [8]), None)


def make_sampler(make_env=fishwood):
    def make_block(num_envs):
        env = make_env(num_envs)
        return env, make_actor(env, [8])

    frames = NUM_ENVS * STEPS
    return EnvSampler(make_block, num_envs=NUM_ENVS, frames_per_batch=frames, num_batches=BATCHES, seed=3)


def rollouts_of(models, num_workers, path, make_env=fishwood, **options):
    workers = FakeWorkers([make_sampler(make_env) for _ in range(num_workers)])
    settings = {"num_envs": NUM_ENVS, "num_batches": BATCHES, "folder": path} | options
    return WorkerEnvRollouts(make_env(NUM_ENVS), workers, models.policy_parameters, **settings)


def updated(models):
    with torch.no_grad():
        for parameter in models.policy.parameters():
            parameter.mul_(1.5).add_(0.01)


def drawn(models, rollouts, count=BATCHES):
    """Batches, between which the policy moves."""
    batches = []
    for batch in rollouts:
        batches.append(batch.clone())
        updated(models)
        if len(batches) == count:
            break
    return batches


def same(one, other):
    entries = zip(one.flatten_keys().items(), other.flatten_keys().items(), strict=True)
    return all(name == theirs and torch.equal(a, b) for (name, a), (theirs, b) in entries)


@given(st.integers(1, 400))
def test_blocks_hold_every_copy_once(num_envs):
    sizes = block_sizes(num_envs)
    assert sum(sizes) == num_envs
    assert set(sizes[:-1]) <= {8}
    assert 1 <= sizes[-1] <= 8


@pytest.mark.parametrize("make_env", [fishwood, treasure])
def test_the_number_of_workers_changes_nothing(tmp_path, make_env):
    found = []
    for size in (1, 2, 3):
        torch.manual_seed(0)
        models = Networks(make_actor(make_env(1), [8]), None)
        found.append(drawn(models, rollouts_of(models, size, tmp_path, make_env)))
    for one, *others in zip(*found, strict=True):
        assert one.shape == (NUM_ENVS, STEPS)
        assert all(same(one, other) for other in others)
    first, last = found[0][0], found[0][-1]
    assert not torch.equal(first["action"], last["action"])
    assert not torch.equal(first["action"][:8], first["action"][8:16])  # nor do two blocks move alike


def test_episodes_run_on_and_are_by_the_weights_of_the_trainer(models, tmp_path):
    before = None
    for batch in rollouts_of(models, 2, tmp_path):
        scored = models.policy.get_dist(batch).log_prob(batch["action"])
        torch.testing.assert_close(scored, batch["sample_log_prob"], atol=1e-5, rtol=1e-5)
        if before is not None:
            going = ~before["next", "done"].squeeze(-1)
            last = before["next", "episode_group_reward"]
            torch.testing.assert_close(batch["episode_group_reward"][:, 0][going], last[going])
        before = batch[:, -1].clone()
        updated(models)
    assert batch["policy_version"].unique().tolist() == [BATCHES - 1]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_checkpoint_begins_episodes_in_the_run_that_goes_on_from_it_too(models, tmp_path, staleness):
    rollouts = rollouts_of(models, 2, tmp_path, max_staleness=staleness)
    running = iter(rollouts)
    drawn(models, running, 1)
    state = rollouts.checkpoint(1)
    assert (state["ahead"] is None) == (staleness == 0)
    weights = [weight.clone() for weight in models.policy_parameters()]
    after = drawn(models, running)
    assert len(after) == BATCHES - 1
    models.load_policy_parameters(weights)
    again = rollouts_of(models, 3, tmp_path, max_staleness=staleness, start=1, state=state)
    assert all(same(a, b) for a, b in zip(drawn(models, again), after, strict=True))
    assert (after[staleness]["episode_group_reward"][:, 0] == 0).all()
    assert (after[-1]["episode_group_reward"][:, 0] != 0).any()


def test_who_takes_a_lost_ones_place_starts_new_episodes(models, tmp_path):
    """The other worker's copies do as they would have done."""
    weights = [weight.clone() for weight in models.policy_parameters()]
    whole = drawn(models, rollouts_of(models, 2, tmp_path))
    models.load_policy_parameters(weights)
    rollouts = rollouts_of(models, 2, tmp_path)
    running = iter(rollouts)
    drawn(models, running, 2)
    rollouts.workers.samplers[1] = make_sampler()
    for batch, wanted in zip(drawn(models, running), whole[2:], strict=True):
        assert same(batch[:8], wanted[:8])
        assert not torch.equal(batch["observation"][8:], wanted["observation"][8:])
    assert rollouts.workers.samplers[1].began == {1: 0, 2: 0}


def test_a_nan_ends_it_with_the_batch_saved(models, tmp_path):
    class Poisoned(EnvSampler):
        def sample(self, task):
            batch = super().sample(task)
            batch["next", "reward"][0, 0, 1] = torch.nan
            return batch

    rollouts = rollouts_of(models, 1, tmp_path)
    rollouts.workers.samplers[0].__class__ = Poisoned
    with pytest.raises(FloatingPointError, match="a reward is nan"):
        next(iter(rollouts))
    assert (tmp_path / "nonfinite_batch.safetensors").is_file()
    rollouts.close()
    assert rollouts.workers.closed
