"""Rollouts by workers: what each samples, with which weights, and what the trainer does in the meantime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.errors import EngineError

__all__ = ["VERSION", "Sampler", "WorkerBatches", "Workers"]

#: updates behind the policy that a row was sampled by
VERSION = "policy_version"


class Sampler(Protocol):
    """What a worker runs: a policy of its own, and what it acts in."""

    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the weights that ``Networks.policy_parameters`` of the trainer gave."""

    def sample(self, task: Any) -> TensorDictBase:
        """Sample what a task asks for, on the CPU."""


class Workers(Protocol):
    """Samplers in other processes.

    Attributes:
        size: how many.
        restarts: how often one was lost and replaced until now.
    """

    size: int
    restarts: int

    def ask(self, version: int, weights: Sequence[Tensor], tasks: Sequence[Any]) -> Any:
        """Give every worker a task, to be done by these weights; returns at once with what names the answers.

        The weights may change as soon as this returns; equal versions are equal weights.
        """

    def answers(self, request: Any) -> list[TensorDictBase]:
        """Wait for the answers, in the order of the tasks; who is lost is replaced, and asked again.

        Raises:
            EngineError: where a worker is lost for good.
        """

    def close(self) -> None:
        """End the workers, at work or not."""


class WorkerBatches:
    """Batches that workers sample, every row with the version of the policy that it is by.

    A batch is asked for as the one before it is trained on (``max_staleness`` 1) or when it is wanted (0).

    Args:
        workers: sample them.
        weights: gives those of the policy as it is; each batch that was yielded is followed by one update.
        tasks: what the workers are to do for a batch, by its index: one task a worker. Answers are joined in
            that order.
        num_batches: batches in all.
        start: batches that were drawn before.
        max_staleness: updates that the policy of a batch may lack when the batch is trained on, 0 or 1.
        ahead: what :meth:`checkpoint` gave of the batch of the index ``start``; None where there is none.
    """

    def __init__(
        self,
        workers: Workers,
        weights: Callable[[], Sequence[Tensor]],
        tasks: Callable[[int], Sequence[Any]],
        *,
        num_batches: int,
        start: int = 0,
        max_staleness: int = 0,
        ahead: dict[str, Any] | None = None,
    ):
        self.workers, self.weights, self.tasks = workers, weights, tasks
        self.num_batches, self.start, self.max_staleness = num_batches, start, max_staleness
        self.ahead: TensorDictBase | None = None
        if ahead is not None and max_staleness:
            self.ahead = TensorDict.from_dict(ahead["rows"], batch_size=ahead["batch_size"])
        self.request: Any = None
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[TensorDictBase]:
        for index in range(self.start, self.num_batches):
            if self.request is None and self.ahead is None:
                self._ask(index, version=index)
            batch, self.ahead = self._take(), None
            if self.max_staleness and index + 1 < self.num_batches:
                self._ask(index + 1, version=index)
            yield batch

    def _ask(self, index: int, version: int) -> None:
        self.request = version, self.workers.ask(version, self.weights(), self.tasks(index))

    def _take(self) -> TensorDictBase:
        begun = time.perf_counter()
        if self.ahead is None:
            (version, request), self.request = self.request, None
            self.ahead = torch.cat(self.workers.answers(request))
            self.ahead[VERSION] = torch.full(self.ahead.batch_size, version)
        self.wait_seconds = time.perf_counter() - begun
        return self.ahead

    def checkpoint(self) -> dict[str, Any] | None:
        """The batch that was asked for and not yielded yet, waited for; None where there is none.

        A run that goes on needs it: nobody has the weights any more that it is by. Where a worker is lost for
        good, it is left out.
        """
        if self.request is None and self.ahead is None:
            return None
        try:
            batch = self._take()
        except EngineError:
            return None
        return {"rows": batch.to_dict(), "batch_size": list(batch.batch_size)}

    def metrics(self, iteration: int, batch: TensorDictBase, metrics: dict[str, float]) -> dict[str, float]:
        """The updates that the policy of a batch lacked, what was waited for it, and workers replaced so far.

        To be logged of the batch that was yielded last, see :data:`~torchrl_maxmin.trainers.ppo.Monitor`.
        """
        staleness = iteration - 1 - batch[VERSION].double()
        return {
            "rollout/staleness": float(staleness.mean()),
            "rollout/wait_seconds": self.wait_seconds,
            "rollout/worker_restarts": float(self.workers.restarts),
        }
