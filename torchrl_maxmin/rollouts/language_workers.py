"""Rollouts of a language model by workers, which answer prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.models.decoding import NUMBERS
from torchrl_maxmin.models.full import LanguageNetworks
from torchrl_maxmin.rollouts.language import CalibratedRewards, token_env
from torchrl_maxmin.rollouts.workers import WorkerBatches, Workers

__all__ = ["LanguageSampler", "WorkerLanguageRollouts", "numbers_of"]


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
        max_staleness: see :class:`~torchrl_maxmin.rollouts.workers.WorkerBatches`.
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
        self.workers, self.unscored = workers, None
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
            models.policy_parameters,
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
            self.unscored = responses
            with torch.no_grad():
                prompts = self.env.reset()
                batch = self.env.step(prompts.update(responses.to(prompts.device)))
            self.unscored = None
            yield batch

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from after so many batches."""
        if self.unscored is not None and self.batches.max_staleness:
            self.batches.ahead = self.unscored  # where rewards cannot be had: nobody can sample it again
        return self.rewards.state_dict() | {"ahead": self.batches.checkpoint()}

    def close(self) -> None:
        """End the workers."""
        self.workers.close()
