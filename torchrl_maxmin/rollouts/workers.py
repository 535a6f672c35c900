"""Rollouts by workers: what each samples, with which weights, and what the trainer does in the meantime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.core.errors import EngineError
from torchrl_maxmin.models.decoding import NUMBERS
from torchrl_maxmin.models.full import LanguageNetworks
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.rollouts.language import CalibratedRewards, token_env

__all__ = [
    "LanguageSampler",
    "Sampler",
    "WorkerBatches",
    "WorkerLanguageRollouts",
    "Workers",
    "numbers_of",
]

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
        models: whose policy they sample by; each batch that was yielded is followed by one update.
        tasks: what the workers are to do for a batch, by its index: one task a worker. Answers are joined in
            that order.
        num_batches: batches in all.
        start: batches that were drawn before.
        max_staleness: updates that the policy of a batch may lack when the batch is trained on, 0 or 1.
        ahead: the batch of the index ``start``, where a checkpoint holds it.
    """

    def __init__(
        self,
        workers: Workers,
        models: Networks,
        tasks: Callable[[int], Sequence[Any]],
        *,
        num_batches: int,
        start: int = 0,
        max_staleness: int = 0,
        ahead: TensorDictBase | None = None,
    ):
        self.workers, self.models, self.tasks = workers, models, tasks
        self.num_batches, self.start, self.max_staleness = num_batches, start, max_staleness
        self.ahead = ahead if max_staleness else None
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
        self.request = version, self.workers.ask(version, self.models.policy_parameters(), self.tasks(index))

    def _take(self) -> TensorDictBase:
        begun = time.perf_counter()
        if self.ahead is None:
            (version, request), self.request = self.request, None
            self.ahead = torch.cat(self.workers.answers(request))
            self.ahead[VERSION] = torch.full(self.ahead.batch_size, version)
        self.wait_seconds = time.perf_counter() - begun
        return self.ahead

    def checkpoint(self) -> TensorDictBase | None:
        """The batch that was asked for and not yielded yet, waited for; None where there is none.

        A run that goes on needs it: nobody has the weights any more that it is by. Where a worker is lost for
        good, it is left out.
        """
        if self.request is None and self.ahead is None:
            return None
        try:
            return self._take()
        except EngineError:
            return None

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


def numbers_of(seed: int, batch_index: int, shape: tuple[int, int]) -> Tensor:
    """Uniform numbers float64 [B, R] that draw the tokens of a batch: its own, whoever samples which row.

    Args:
        seed: of the run.
        batch_index: of the batch.
        shape: B and R.
    """
    return torch.from_numpy(np.random.default_rng([seed, batch_index]).random(shape))


@dataclass
class LanguageSampler:
    """A language model's policy that answers prompts by the numbers that it is given.

    Attributes:
        models: made by :func:`~torchrl_maxmin.models.making.make_sampler`.
    """

    models: LanguageNetworks

    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the trainer's weights."""
        self.models.load_policy_parameters(weights)

    def sample(self, task: TensorDictBase) -> TensorDictBase:
        """Answer prompts [n] that have ``drawn_by`` [n, R]; gives what the policy writes."""
        policy = self.models.policy
        device = next(policy.parameters()).device
        return policy(task.to(device)).select(*policy.out_keys).cpu()


class WorkerLanguageRollouts:
    """What :class:`~torchrl_maxmin.rollouts.language.LanguageRollouts` gives, from workers.

    Responses depend on the policy, the seed and the batch's index, not on the number of workers. They are
    scored here: a group without rewards in a batch is known of the whole batch alone.

    Args:
        models: the trainer's.
        workers: run a :class:`LanguageSampler` each.
        rewards: scores the responses.
        prompts: what :func:`~torchrl_maxmin.models.sampling.encode_prompts` gives.
        batch_size: responses a batch, B.
        num_batches: batches in all.
        num_generations: responses to every prompt.
        minimum: reward with the least of a response's group rewards.
        seed: of the order of prompts, and of the responses.
        start: batches that were drawn before.
        max_staleness: see :class:`WorkerBatches`.
        state: what :meth:`checkpoint` gave, where a run goes on.
    """

    def __init__(
        self,
        models: LanguageNetworks,
        workers: Workers,
        rewards: CalibratedRewards,
        prompts: TensorDict,
        *,
        batch_size: int,
        num_batches: int,
        num_generations: int = 1,
        minimum: bool = False,
        seed: int = 0,
        start: int = 0,
        max_staleness: int = 0,
        state: dict[str, Any] | None = None,
    ):
        self.rewards, self.prompts, self.seed = rewards, prompts, seed
        self.workers = workers
        self.env = token_env(
            models.policy,
            rewards,
            prompts,
            batch_size=batch_size,
            num_generations=num_generations,
            minimum=minimum,
            seed=seed,
            start=start,
        )
        self.max_new_tokens = models.policy.max_new_tokens
        self.batches = WorkerBatches(
            workers,
            models,
            self.tasks,
            num_batches=num_batches,
            start=start,
            max_staleness=max_staleness,
            ahead=(state or {}).get("ahead"),
        )

    def tasks(self, batch_index: int) -> list[TensorDictBase]:
        """The prompts of a batch with the numbers of its rows, a share for every worker."""
        index = self.env.prompts_of(batch_index)
        rows = self.prompts[index].select("prompt_tokens", "prompt_mask")
        rows[NUMBERS] = numbers_of(self.seed, batch_index, (len(index), self.max_new_tokens))
        bounds = [len(rows) * place // self.workers.size for place in range(self.workers.size + 1)]
        return [rows[a:b] for a, b in pairwise(bounds)]

    def __iter__(self) -> Iterator[TensorDictBase]:
        for responses in self.batches:
            with torch.no_grad():
                prompts = self.env.reset()
                batch = self.env.step(prompts.update(responses.to(prompts.device)))
            yield batch

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from after so many batches."""
        return self.rewards.state_dict() | {"ahead": self.batches.checkpoint()}

    def close(self) -> None:
        """End the workers."""
        self.workers.close()
