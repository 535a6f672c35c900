"""Workers on a real Ray: two processes, one of which is killed at work."""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from rollouts_fakes import FakeWorkers
from rollouts_samplers import Adder

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.rollouts import ray_workers
from torchrl_maxmin.rollouts.environment_workers import EnvTask
from torchrl_maxmin.rollouts.ray_workers import RayWorkers, ray_session
from torchrl_maxmin.trainers.env_ppo import make_env_sampler
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'torchrl-maxmin[ray]'")


@pytest.fixture(scope="module")
def session():
    with pytest.MonkeyPatch.context() as patch:
        here = str(Path(__file__).parent)  # the samplers' module
        patch.setenv("PYTHONPATH", ":".join([here, *sys.path]))
        with ExitStack() as stack:
            try:
                stack.enter_context(ray_session(2))
            except (
                UserError
            ) as error:  # a machine too busy for Ray's own time limit, or without shared memory
                if "Ray does not start here" not in str(error):
                    raise
                pytest.skip(str(error))
            yield
    assert not ray.is_initialized()


def sums(workers, version, weight, orders=("", "")):
    tasks = [(place, order) for place, order in enumerate(orders)]
    answers = workers.answers(workers.ask(version, [torch.tensor(weight)], tasks))
    return [answer["sum"].item() for answer in answers], {answer["process"].item() for answer in answers}


def test_workers_answer_in_order_and_one_that_is_killed_is_replaced(session, tmp_path, monkeypatch):
    """And one that dies once too often ends it."""
    monkeypatch.setattr(ray_workers, "MAX_RESTARTS", 1)
    workers = RayWorkers([Adder, Adder])
    found, processes = sums(workers, 0, 10.0)
    assert found == [10, 11]
    assert len(processes) == 2
    # equal versions are equal weights: they are not sent again
    assert sums(workers, 0, 99.0)[0] == [10, 11]
    assert sums(workers, 1, 20.0)[0] == [20, 21]
    # the new process has no weights, and gets those of the version
    found, others = sums(workers, 1, 20.0, ["", str(tmp_path / "died")])
    assert found == [20, 21]
    assert workers.restarts == 1
    assert len(others - processes) == 1
    with pytest.raises(UserError, match=r"^no such number$"):
        sums(workers, 1, 20.0, ["refuse", ""])
    with pytest.raises(EngineError, match="rollout worker 2 of 2 is lost for good"):
        sums(workers, 1, 20.0, ["", str(tmp_path / "died too")])
    workers.close()


def test_an_environment_moves_in_other_processes_as_in_this_one(session):
    config = EnvPPOConfig(
        env_id="fishwood-v0", output_dir="", num_envs=20, frames_per_batch=100, total_frames=300, device="cpu"
    )
    make = partial(make_env_sampler, config)
    _, policy = make().make_block(8)
    weights = [parameter.detach() for parameter in policy.parameters()]
    far, near = RayWorkers([make, make]), FakeWorkers([make(), make()])
    for index in range(3):
        tasks = [EnvTask(index, 0, range(2)), EnvTask(index, 0, range(2, 3))]
        answers = [workers.answers(workers.ask(index, weights, tasks)) for workers in (far, near)]
        for one, other in zip(*(torch.cat(parts) for parts in answers), strict=True):
            assert (one == other).all()
    far.close()


def test_what_ray_has_not_is_refused(session):
    with pytest.raises(UserError, match="--rollout_workers 3 need 3 CPUs, and Ray has 2"), ray_session(3):
        pass
    with pytest.raises(UserError, match="--rollout_workers 1 need 64 GPUs"), ray_session(1, gpus=64):
        pass
    assert ray.is_initialized()  # it was there before


def test_no_cluster_at_an_address_is_one_line(monkeypatch):
    def refuse(address, **options):
        assert "num_cpus" not in options  # a cluster has its own
        raise ConnectionError(f"cannot connect to {address}\nat all")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    words = "no Ray cluster at --ray_address there:1: cannot connect to there:1$"
    with pytest.raises(UserError, match=words), ray_session(2, "there:1"):
        pass
