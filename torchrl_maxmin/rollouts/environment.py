"""Rollouts in an environment with a vector reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_maxmin.core.distributed import gather_rows, seed_of_rank
from torchrl_maxmin.core.errors import RewardError
from torchrl_maxmin.core.finite import nonfinite_batch

__all__ = ["EnvRollouts"]


class EnvRollouts:
    """Batches of steps by the policy as it is at the time.

    Episodes run on from one batch to the next. They start anew at a checkpoint, in the run that writes it as
    in the one that goes on from it, so that both go on alike. Processes that work as one move a share of the
    copies each, by random numbers of their own; all get the batch of all copies.

    Args:
        env: the environment, with this process's share of the copies.
        policy: acts.
        num_envs: copies of all processes, N.
        frames_per_batch: steps of all copies together a batch, a multiple of N.
        num_batches: batches in all.
        seed: of the episodes.
        start: batches that were drawn before.
        folder: where a batch with a NaN goes; None lets it pass.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        *,
        num_envs: int,
        frames_per_batch: int,
        num_batches: int,
        seed: int,
        start: int = 0,
        folder: Path | None = None,
    ):
        self.env, self.policy, self.num_envs, self.seed, self.folder = env, policy, num_envs, seed, folder
        own_frames = frames_per_batch // num_envs * env.batch_size[0]
        self.collector = Collector(
            env,
            policy,
            frames_per_batch=own_frames,
            total_frames=own_frames * (num_batches - start),
            auto_register_policy_transforms=False,
        )
        self.start_episodes(start)

    def __iter__(self) -> Iterator[TensorDictBase]:
        for own in self.collector:
            rollout = gather_rows(own, self.num_envs)
            if self.folder is not None:  # here, for the adversary refuses NaN without saving the batch
                total = rollout["next", "reward"].sum().item()
                if not math.isfinite(total):
                    what = f"a reward is {total}"
                    raise nonfinite_batch(rollout, self.folder, what) from RewardError(what)
            yield rollout

    def start_episodes(self, iteration: int) -> None:
        """Start new episodes, from a seed that the iteration decides."""
        self.env.set_seed(seed_of_rank(self.seed * 1_000_003 + iteration))
        self.collector.reset()

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """Start episodes anew: the iteration is all the state that there is."""
        self.start_episodes(iteration)
        return {}

    def close(self) -> None:
        """Free what the collector holds; the environment stays open."""
        self.collector.shutdown(close_env=False)
