"""Group statistics over environments in a row, in processes, and over TorchRL's multi-process collector.

On one seed all of them have the same data, and so the same statistics, where the policy draws nothing:
TorchRL hands the members' seeds on from one to the next in the same order. A policy that draws takes its
numbers from the process that it runs in: the collector's own for ``SerialEnv`` and ``ParallelEnv``, which
stay alike, and a generator seeded anew in every worker of ``MultiSyncCollector``, whose data then are those
of a single collector for a single worker only.
"""

import pytest
import torch
import torch.multiprocessing as mp
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import MOGymEnv, ParallelEnv, SerialEnv, TransformedEnv

from torchrl_maxmin.collectors import GroupStatistics, MaxMinCollector
from torchrl_maxmin.envs import FishwoodEnv, GroupReward, TabularEnv, VectorMDP, make_env
from torchrl_maxmin.welfare import ExponentiatedGradient, HardMin

FRAMES, BATCHES = 120, 3


@pytest.fixture
def forked():
    """Workers that start at once; TorchRL's own choice, spawn, imports everything again."""
    mp.set_start_method("fork", force=True)
    yield
    mp.set_start_method("spawn", force=True)


def fishwood():
    env = FishwoodEnv(1, horizon=9, fish_chance=0.5, wood_chance=0.5)
    return TransformedEnv(env, GroupReward())


def table():
    """Episodes of random length, in three copies."""
    full = VectorMDP.random(4, 2, 2, seed=1)
    mdp = VectorMDP(0.7 * full.transition, full.reward, full.initial, 1.0)
    return TransformedEnv(TabularEnv(mdp, 3), GroupReward())


def sure_policy():
    """Goes to the other place, or by the state's number."""
    return TensorDictModule(
        lambda observation: (observation.argmax(-1) + 1) % 2, in_keys=["observation"], out_keys=["action"]
    )


def drawing_policy():
    return TensorDictModule(
        lambda observation: torch.randint(2, observation.shape[:-1]),
        in_keys=["observation"],
        out_keys=["action"],
    )


def adversary():
    return ExponentiatedGradient(2, step_size=0.5)


def single(kind, make, policy, **options):
    """Two members under one collector in this process."""
    env = kind(2, make, **options)
    torch.manual_seed(5)
    env.set_seed(5)
    settings = {"frames_per_batch": FRAMES, "total_frames": FRAMES * BATCHES}
    collector = MaxMinCollector(env, policy(), adversary=adversary(), **settings)
    out = [batch.clone() for batch in collector]
    collector.shutdown()
    return out


def in_processes(workers, make, policy):
    """A member in each worker; the statistics in this process, over what all workers sent."""
    collector = MultiSyncCollector(
        [make] * workers,
        policy(),
        frames_per_batch=FRAMES,
        total_frames=FRAMES * BATCHES,
        postproc=GroupStatistics(adversary()),
        cat_results="stack",
    )
    collector.set_seed(5)
    out = [batch.clone() for batch in collector]
    collector.shutdown()
    return out


def statistics(batches):
    """Utilities and weights [batches, 2, K], which every row of a batch repeats."""
    keys = ("group_utilities", "group_weights")
    return torch.stack([torch.stack([b[key].flatten(0, -2)[0] for key in keys]) for b in batches])


def by_hand(batch):
    """Mean return of the episodes that end in a batch [K], from the running sums of rewards alone."""
    done = batch["next", "done"].squeeze(-1)
    return batch["next", "episode_group_reward"][done].double().mean(0)


@pytest.mark.parametrize("make", [fishwood, table])
def test_all_ways_of_collecting_give_the_same_statistics(make, forked):
    serial = single(SerialEnv, make, sure_policy)
    parallel = single(ParallelEnv, make, sure_policy)
    workers = in_processes(2, make, sure_policy)
    assert len(serial) == len(parallel) == len(workers) == BATCHES
    assert statistics(serial).unique(dim=0).shape[0] == BATCHES
    for other in (parallel, workers):
        for ours, theirs in zip(serial, other, strict=True):
            for key in ("observation", "action", ("next", "reward"), ("next", "done")):
                assert torch.equal(ours[key].flatten(), theirs[key].flatten())
        torch.testing.assert_close(statistics(serial), statistics(other))
    twin = adversary()
    for batch, (utilities, weights) in zip(workers, statistics(workers), strict=True):
        torch.testing.assert_close(utilities, by_hand(batch).float())
        torch.testing.assert_close(weights, twin.update(utilities))


def test_a_policy_that_draws_is_the_same_in_a_row_in_processes_and_in_one_worker(forked):
    serial, parallel = (single(kind, fishwood, drawing_policy) for kind in (SerialEnv, ParallelEnv))
    assert torch.equal(statistics(serial), statistics(parallel))
    collector = Collector(
        fishwood(),
        drawing_policy(),
        frames_per_batch=FRAMES,
        total_frames=FRAMES * BATCHES,
        postproc=GroupStatistics(adversary()),
    )
    # in a worker's order: the environment, then the process, then a fresh start
    collector.set_seed(5)
    torch.manual_seed(5)
    collector.reset()
    alone = [batch.clone() for batch in collector]
    collector.shutdown()
    torch.testing.assert_close(statistics(alone), statistics(in_processes(1, fishwood, drawing_policy)))


def test_the_adversary_of_this_process_answers_all_workers_together(forked):
    """Whatever the workers' policies draw, its weights move on the mean over all of their episodes."""
    out = in_processes(2, fishwood, drawing_policy)
    twin = adversary()
    for batch, (utilities, weights) in zip(out, statistics(out), strict=True):
        torch.testing.assert_close(utilities, by_hand(batch).float())
        torch.testing.assert_close(weights, twin.update(utilities))
    assert twin.weights.max() > 0.5


def test_mo_gymnasium_s_own_environment():
    def make():
        # TorchRL's wrapper as it is: one copy, an action one-hot
        return TransformedEnv(MOGymEnv("fruit-tree-v0", depth=5), GroupReward())

    collector = MaxMinCollector(make(), None, adversary=HardMin(6), frames_per_batch=100, total_frames=200)
    for batch in collector:
        assert batch["next", "done"].sum() == 20
        utilities = by_hand(batch).float()
        torch.testing.assert_close(batch["group_utilities"][0], utilities)
        assert batch["group_weights"][0].argmax() == utilities.argmin()
    collector.shutdown()


def test_mo_gymnasium_by_name_and_the_batched_one_agree_in_the_mean():
    """The same dynamics from two sources: random play has the same return within its sampling error."""
    found = {}
    for backend, copies in (("gym", 4), ("batched", 32)):
        env = TransformedEnv(make_env("fishwood-v0", copies, backend=backend, seed=1), GroupReward())
        torch.manual_seed(0)
        frames = 200 * copies * (2 if backend == "gym" else 1)
        collector = MaxMinCollector(
            env, None, adversary=HardMin(2), frames_per_batch=frames, total_frames=frames
        )
        batch = next(iter(collector))
        done = batch["next", "done"].squeeze(-1)
        returns = batch["next", "episode_reward"][done].double()
        torch.testing.assert_close(batch["group_utilities"][0, 0], returns.mean(0).float())
        found[backend] = returns.mean(0), returns.var(0) / len(returns)
        collector.shutdown()
    difference = found["gym"][0] - found["batched"][0]
    assert (difference.abs() < 4 * (found["gym"][1] + found["batched"][1]).sqrt()).all()
    # half of the steps at each place: 10 fish and 90 of wood
    assert ((found["batched"][0] - torch.tensor([10.0, 90.0])).abs() < torch.tensor([3.0, 12.0])).all()
