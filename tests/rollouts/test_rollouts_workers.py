"""Rollouts by workers: whose weights, which rows, and what a checkpoint holds of a batch under way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts_fakes import FakeWorkers, number
from tensordict import TensorDict

from torchrl_maxmin.rollouts.ray_workers import from_arrays, to_arrays
from torchrl_maxmin.rollouts.workers import WorkerBatches


class Reader:
    """Gives, a row, the batch that it was asked for and the weight that it had."""

    def load(self, weights):
        self.weight = weights[0].item()

    def sample(self, task):
        return TensorDict({"index": torch.tensor([task]), "weight": torch.tensor([self.weight])}, [1])


def batches(models, lost_at=(), **options):
    workers = FakeWorkers([Reader(), Reader()], lost_at)
    return WorkerBatches(
        workers, models.policy_parameters, lambda index: [index, index], num_batches=4, **options
    )


def trained(source, models, stop=4):
    """Every batch's index, version and weight, where an update adds 1 to the weight."""
    seen = []
    for batch in source:
        assert len(batch) == 2
        seen.append(tuple(batch[key][1].item() for key in ("index", "policy_version", "weight")))
        with torch.no_grad():
            models.policy.weight.add_(1)
        if len(seen) == stop:
            break
    return seen


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_batch_is_by_the_policy_that_its_version_says(staleness):
    models = number()
    source = batches(models, max_staleness=staleness)
    versions = [0, 1, 2, 3] if staleness == 0 else [0, 0, 1, 2]
    assert trained(source, models) == [(index, v, v) for index, v in enumerate(versions)]
    assert source.workers.requests == 4  # none beyond the end


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_checkpoint_holds_the_batch_that_nobody_can_sample_again(staleness):
    models = number()
    source = batches(models, max_staleness=staleness)
    running = iter(source)
    trained(running, models, stop=2)
    ahead = source.checkpoint()
    assert (ahead is None) == (staleness == 0)
    weight = models.policy.weight.item()
    after = trained(running, models)
    assert [index for index, _, _ in after] == [2, 3]
    again = number(weight)
    resumed = batches(again, max_staleness=staleness, start=2, ahead=ahead)
    assert trained(resumed, again) == after


def test_another_staleness_leaves_what_is_ahead():
    models = number(5.0)
    ahead = {"rows": {"index": torch.zeros(2)}, "batch_size": [2]}
    assert trained(batches(models, start=2, ahead=ahead), models)[0] == (2, 2, 5)


def test_a_checkpoint_goes_without_a_batch_whose_worker_is_lost():
    models = number()
    source = batches(models, lost_at=[3], max_staleness=1)
    trained(source, models, stop=2)
    assert source.checkpoint() is None


def test_metrics_say_how_many_updates_the_policy_lacked():
    source = batches(number(), max_staleness=1)
    found = []
    for iteration, batch in enumerate(source, 1):
        metrics = source.metrics(iteration, batch, {})
        assert 0 <= metrics["rollout/wait_seconds"] < 60
        assert metrics["rollout/worker_restarts"] == 0
        found.append(metrics["rollout/staleness"])
    assert found == [0, 1, 1, 1]


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]),
)
def test_tensors_come_out_of_bytes_as_they_were(shape, dtype):
    tensor = torch.arange(-3, -3 + int(np.prod(shape))).reshape(shape).to(dtype)
    turned = tensor.T if tensor.ndim == 2 else tensor
    for given_one, found in zip((tensor, turned), from_arrays(to_arrays([tensor, turned])), strict=True):
        assert found.dtype == dtype
        assert found.shape == given_one.shape
        assert torch.equal(found, given_one)
