"""Rollouts in an environment with a vector reward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_maxmin.core.run import require_finite

__all__ = ["EnvRollouts"]


class EnvRollouts:
    """Batches of steps by the policy as it is at the time.

    Episodes run on from one batch to the next. They start anew at a checkpoint, in the run that writes it as
    in the one that goes on from it, so that both go on alike.

    Args:
        env: the environment.
        policy: acts.
        frames_per_batch: steps of all copies together a batch.
        num_batches: batches in all.
        seed: of the episodes.
        start: batches that were drawn before.
        folder: where a batch with a NaN goes.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: int,
        num_batches: int,
        seed: int,
        start: int = 0,
        folder: Path,
    ):
        self.env, self.seed, self.folder = env, seed, folder
        self.collector = Collector(
            env,
            policy,
            frames_per_batch=frames_per_batch,
            total_frames=frames_per_batch * (num_batches - start),
            auto_register_policy_transforms=False,
        )
        self.start_episodes(start)

    def __iter__(self) -> Iterator[TensorDictBase]:
        for rollout in self.collector:
            # here, for the adversary refuses NaN without saving the batch
            require_finite(rollout["next", "reward"].sum().item(), rollout, self.folder, "a reward")
            yield rollout

    def start_episodes(self, iteration: int) -> None:
        """Start new episodes, from a seed that the iteration decides."""
        self.env.set_seed(self.seed * 1_000_003 + iteration)
        self.collector.reset()

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """Start episodes anew: the iteration is all the state that there is."""
        self.start_episodes(iteration)
        return {}

    def close(self) -> None:
        """Free what the collector holds; the environment stays open."""
        self.collector.shutdown(close_env=False)
