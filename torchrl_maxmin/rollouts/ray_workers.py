"""Workers on Ray: actors that sample, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.rollouts.workers import Sampler

__all__ = ["RayWorkers", "from_arrays", "ray_session", "require_ray", "to_arrays"]

#: how often Ray replaces each worker
MAX_RESTARTS = 3

Array = tuple[np.ndarray, str, tuple[int, ...]]


def require_ray() -> None:
    """Raise :class:`UserError` where Ray is not installed."""
    if find_spec("ray") is None:
        raise UserError("--rollout_workers needs Ray: pip install 'torchrl-maxmin[ray]'")


@contextmanager
def ray_session(num_workers: int, address: str | None = None, gpus: float = 0.0) -> Iterator[None]:
    """Be connected to Ray for as long, and leave nothing of it behind.

    Args:
        num_workers: that are to be started; with 0 nothing is done.
        address: of a cluster; None starts Ray on this machine, with a CPU for every worker and no dashboard.
            A connection that is there is taken.
        gpus: of each worker.

    Raises:
        UserError: where no cluster answers, or it has not what the workers need.
    """
    if not num_workers:
        yield
        return
    require_ray()
    import ray

    there_already = ray.is_initialized()
    if not there_already:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own: dict[str, Any] = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises plain ones, too
            ray.shutdown()
            words = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = f"no Ray cluster at --ray_address {address}" if address else "Ray does not start here"
            raise UserError(f"{where}: {words}") from error
    try:
        resources = ray.cluster_resources()
        for kind, needed in {"CPU": num_workers, "GPU": num_workers * gpus}.items():
            if resources.get(kind, 0) < needed:
                raise UserError(
                    f"--rollout_workers {num_workers} need {needed:g} {kind}s, and Ray has "
                    f"{resources.get(kind, 0):g}: ask for fewer workers, or for less of each"
                )
        yield
    finally:
        if not there_already:
            ray.shutdown()


def to_arrays(tensors: Sequence[Tensor]) -> list[Array]:
    """Tensors of any dtype as bytes, which Ray shares between processes without a copy.

    Example:
        >>> content, dtype, shape = to_arrays([torch.ones(2, dtype=torch.bfloat16)])[0]
        >>> content.nbytes, dtype, shape
        (4, 'bfloat16', (2,))
    """
    flat = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in tensors)
    return [
        (row.view(torch.uint8).numpy(), str(row.dtype).removeprefix("torch."), tuple(tensor.shape))
        for row, tensor in zip(flat, tensors, strict=True)
    ]


def from_arrays(arrays: Sequence[Array]) -> list[Tensor]:
    """The tensors that :func:`to_arrays` was given; they share the arrays' memory, which may be read-only."""
    return [
        torch.frombuffer(array, dtype=getattr(torch, dtype)).reshape(shape)
        if array.nbytes
        else torch.empty(shape, dtype=getattr(torch, dtype))
        for array, dtype, shape in arrays
    ]


class RayWorker:
    """A sampler in a process of Ray's; made at its first task, so that what it raises is the task's."""

    def __init__(self, make_sampler: Callable[[], Sampler]):
        self.make_sampler = make_sampler
        self.sampler: Sampler | None = None
        self.version: int | None = None

    def prepare(self) -> None:
        """Make the sampler."""
        if self.sampler is None:
            self.sampler = self.make_sampler()

    def sample(self, task: Any, version: int, weights: Sequence[Any]) -> tuple[TensorDictBase, str]:
        """Do a task by the weights of a version; gives the process, too.

        A reference to the weights is in a list, so that Ray leaves it one.
        """
        import ray

        self.prepare()
        assert self.sampler is not None
        if version != self.version:
            self.sampler.load(from_arrays(ray.get(weights[0])))
            self.version = version
        return self.sampler.sample(task), ray.get_runtime_context().get_worker_id()


class RayWorkers:
    """Actors of Ray, inside of :func:`ray_session`, see :class:`~torchrl_maxmin.rollouts.workers.Workers`.

    Ray starts a worker again that died, up to :data:`MAX_RESTARTS` times each; it is then asked once more.

    Args:
        make_samplers: each makes the sampler of a worker, in its process.
        gpus: of each; a fraction shares one.
    """

    def __init__(self, make_samplers: Sequence[Callable[[], Sampler]], *, gpus: float = 0.0):
        import ray

        self.size, self.restarts = len(make_samplers), 0
        self._version: int | None = None
        self._weights: Any = None
        self._processes: list[str | None] = [None] * self.size
        lives = {"max_restarts": MAX_RESTARTS, "max_task_retries": -1}
        actor = ray.remote(RayWorker).options(num_cpus=1, num_gpus=gpus, **lives)
        self.actors: list[Any] = [actor.remote(make_sampler) for make_sampler in make_samplers]
        for worker in self.actors:  # they load their models while the trainer loads its own
            worker.prepare.remote()

    def ask(self, version: int, weights: Sequence[Tensor], tasks: Sequence[Any]) -> list[Any]:
        """Give every worker a task; the weights are copied once, and sent to each machine once."""
        import ray

        if version != self._version:
            self._version, self._weights = version, ray.put(to_arrays(weights))
        pairs = zip(self.actors, tasks, strict=True)
        return [actor.sample.remote(task, version, [self._weights]) for actor, task in pairs]

    def answers(self, request: list[Any]) -> list[TensorDictBase]:
        """Wait for the answers.

        Raises:
            EngineError: where a worker died more often than Ray replaces it, or Ray itself fails.
        """
        return [self._answer(place, future) for place, future in enumerate(request)]

    def _answer(self, place: int, future: Any) -> TensorDictBase:
        import ray
        from ray.exceptions import RayError, RayTaskError

        name = f"rollout worker {place + 1} of {self.size}"
        try:
            answer, process = ray.get(future)
        except RayTaskError as error:  # what the sampler raised
            raise error.cause from None
        except RayError as error:
            raise EngineError(f"{name} is lost for good ({type(error).__name__})") from error
        if self._processes[place] not in (None, process):
            self.restarts += 1
            console.print(f"{name} was lost; another one took its place", markup=False, soft_wrap=True)
        self._processes[place] = process
        return answer

    def close(self) -> None:
        """End the workers, at work or not."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
