"""Rollouts in an environment by workers, which move blocks of its copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

from torchrl_maxmin.core.run import require_finite, seed_everything
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.rollouts.environment import EnvRollouts
from torchrl_maxmin.rollouts.workers import WorkerBatches, Workers

__all__ = ["BLOCK_SIZE", "EnvSampler", "EnvTask", "WorkerEnvRollouts", "block_sizes"]

#: copies that move together, whichever worker moves them
BLOCK_SIZE = 8

MakeBlock = Callable[[int], tuple[EnvBase, TensorDictModuleBase]]


def block_sizes(num_envs: int) -> list[int]:
    """Copies of every block.

    Example:
        >>> block_sizes(20)
        [8, 8, 4]
    """
    return [min(BLOCK_SIZE, num_envs - first) for first in range(0, num_envs, BLOCK_SIZE)]


@dataclass(frozen=True)
class EnvTask:
    """What a worker does for a batch.

    Attributes:
        batch_index: of the batch.
        began: index of the batch with which the episodes of all copies began.
        blocks: that it moves, the same ones in every batch.
    """

    batch_index: int
    began: int
    blocks: range


class EnvSampler:
    """A policy that acts in blocks of an environment's copies.

    Episodes run on from one batch to the next; in a worker that took a lost one's place they start anew.
    A block's random numbers are its own: those of the environment follow from the seed, the block and where
    its episodes began, those of the actions from the seed, the block and the batch.

    Args:
        make_block: makes an environment of so many copies, and a policy that acts in it.
        num_envs: copies of all blocks.
        frames_per_batch: steps of all copies together a batch.
        num_batches: batches in all.
        seed: of the run.
    """

    def __init__(
        self, make_block: MakeBlock, *, num_envs: int, frames_per_batch: int, num_batches: int, seed: int
    ):
        self.make_block, self.sizes, self.seed = make_block, block_sizes(num_envs), seed
        self.num_steps, self.num_batches = frames_per_batch // num_envs, num_batches
        self.weights: Sequence[Tensor] = ()
        self.blocks: dict[int, EnvRollouts] = {}
        self.batches: dict[int, Iterator[TensorDictBase]] = {}
        self.began: dict[int, int] = {}

    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the trainer's weights."""
        self.weights = weights

    def sample(self, task: EnvTask) -> TensorDictBase:
        """Move the task's blocks; gives their steps [copies, steps]."""
        return torch.cat([self._move(block, task) for block in task.blocks]).cpu()

    def _move(self, index: int, task: EnvTask) -> TensorDictBase:
        if index not in self.blocks:
            env, policy = self.make_block(self.sizes[index])
            self.blocks[index] = block = EnvRollouts(
                env,
                policy,
                num_envs=self.sizes[index],
                frames_per_batch=self.num_steps * self.sizes[index],
                num_batches=self.num_batches,
                seed=self.seed * len(self.sizes) + index,
            )
            self.batches[index] = iter(block)
        block = self.blocks[index]
        if self.began.get(index) != task.began:
            block.start_episodes(task.batch_index)
            self.began[index] = task.began
        Networks(block.policy, None).load_policy_parameters(self.weights)
        numbers = np.random.SeedSequence([self.seed, task.batch_index, index])
        seed_everything(int(numbers.generate_state(1)[0]))
        return next(self.batches[index]).exclude("collector")  # its numbers of episodes are a block's own


class WorkerEnvRollouts:
    """What :class:`~torchrl_maxmin.rollouts.environment.EnvRollouts` gives, from workers.

    Steps depend on the policy, the seed and the batch's index, not on the number of workers, as long as none
    is lost: who takes its place starts new episodes.

    Args:
        env: the environment as the trainer has it, which it does not move here.
        workers: run an :class:`EnvSampler` each.
        weights: gives those of the policy as it is.
        num_envs: copies of all workers.
        num_batches: batches in all.
        start: batches that were drawn before.
        max_staleness: see :class:`~torchrl_maxmin.rollouts.workers.WorkerBatches`.
        state: what :meth:`checkpoint` gave, where a run goes on.
        folder: where a batch with a NaN goes.
    """

    def __init__(
        self,
        env: EnvBase,
        workers: Workers,
        weights: Callable[[], Sequence[Tensor]],
        *,
        num_envs: int,
        num_batches: int,
        start: int = 0,
        max_staleness: int = 0,
        state: dict[str, Any] | None = None,
        folder: Path,
    ):
        self.env, self.workers, self.folder = env, workers, folder
        blocks, size = len(block_sizes(num_envs)), workers.size
        self.blocks = [range(blocks * k // size, blocks * (k + 1) // size) for k in range(size)]
        self.began: int | None = None
        self.batches = WorkerBatches(
            workers,
            weights,
            self.tasks,
            num_batches=num_batches,
            start=start,
            max_staleness=max_staleness,
            ahead=(state or {}).get("ahead"),
        )

    def tasks(self, batch_index: int) -> list[EnvTask]:
        """The blocks of every worker."""
        self.began = batch_index if self.began is None else self.began
        return [EnvTask(batch_index, self.began, blocks) for blocks in self.blocks]

    def __iter__(self) -> Iterator[TensorDictBase]:
        for rollout in self.batches:
            require_finite(rollout["next", "reward"].sum().item(), rollout, self.folder, "a reward")
            yield rollout.to(self.env.device)

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """The state to go on from: episodes begin anew with the next batch that is asked for."""
        self.began = None
        return {"ahead": self.batches.checkpoint()}

    def close(self) -> None:
        """End the workers; the environment stays open."""
        self.workers.close()
