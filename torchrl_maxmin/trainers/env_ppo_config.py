"""Settings of the policy stage in an environment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.rollouts.environment_workers import BLOCK_SIZE, block_sizes
from torchrl_maxmin.trainers.ppo_settings import OBJECTIVES, PPOSettings

__all__ = ["EnvPPOConfig"]

BACKENDS = ("auto", "batched", "gym")
OBSERVATIONS = ("auto", "one_hot", "scale", "none")


@dataclass(kw_only=True)
class EnvPPOConfig(PPOSettings):
    """MaxMin PPO in an environment whose reward has a column for every group.

    A group's utility is its mean return, undiscounted, over the episodes that ended in a rollout. A
    rollout in which none ended leaves the group weights as they are. Checkpoints start episodes anew: see
    that ``--save_steps`` rollouts are longer than an episode. Nash and alpha_fair count from 0.

    Args:
        env_id: fishwood-v0, fruit-tree-v0, gridworld, any id of mo-gymnasium, or module:function that
            makes an environment from num_envs, seed and env_options.
        env_backend: batched (all copies in one tensor step), gym (mo-gymnasium one step at a time), or
            auto, which is batched where that is there.
        env_options: keywords of the environment, as a mapping, for instance {"depth": 5}.
        observation: what the policy sees of a gym environment; one_hot, scale, none or auto.
        num_envs: copies of the environment; workers move blocks of 8, each with random numbers of its own.
        max_episode_steps: cut episodes after so many steps; 0 leaves them as they are.
        frames_per_batch: steps of all copies together a rollout.
        total_frames: steps of all copies together.
        objective: min_of_means (the minimum over groups of the mean return) or mean_of_mins (the mean
            over episodes of the return of whoever got least).
        shares: the groups' shares of the population; alike when left out.
        utility_scale: what the groups' returns are divided by; 0 measures it, as the standard deviation
            of the first policy's returns within a group.
        hidden_sizes: units of the hidden layers of policy and critic.
        eval_episodes: episodes behind the results.
        distributed: none, or ddp: processes that torchrun starts (torchrun --nproc_per_node N -m
            torchrl_maxmin ppo ...) share the copies of the environment, the steps and the episodes; returns,
            the worst group and the whitening are those of all.
    """

    env_id: str
    env_backend: str = "auto"
    env_options: dict[str, Any] = field(default_factory=dict)
    observation: str = "auto"
    num_envs: int = 128
    max_episode_steps: int = 0
    frames_per_batch: int = 8192
    total_frames: int = 2_000_000
    shares: list[float] = field(default_factory=list)
    utility_scale: float = 0.0
    hidden_sizes: list[int] = field(default_factory=lambda: [64, 64])
    eval_episodes: int = 1000
    distributed: str = "none"
    # what suits small networks
    tau: float = 0.05
    mini_batch_size: int = 2048
    learning_rate: float = 3e-3
    warmup_iterations: int = 0
    entropy_coeff: float = 0.01
    max_grad_norm: float = 0.5

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together."""
        super().check()
        objectives = tuple(name for name in OBJECTIVES if name != "mean_of_prompt_mins")
        self.require_known(
            objective=objectives,
            env_backend=BACKENDS,
            observation=OBSERVATIONS,
            distributed=("none", "ddp"),  # networks of an environment are small
        )
        self.require_at_least(1, "num_envs", "frames_per_batch", "total_frames")
        self.require_at_least(0, "max_episode_steps", "utility_scale")
        if self.rollout_workers and self.distributed != "none":
            raise UserError("--rollout_workers sample for one trainer: leave --distributed or them out")
        if self.rollout_workers > len(block_sizes(self.num_envs)):
            raise UserError(
                f"--rollout_workers {self.rollout_workers} move {BLOCK_SIZE} copies each at least: raise "
                f"--num_envs to {BLOCK_SIZE * self.rollout_workers}, or take fewer"
            )
        if self.frames_per_batch % self.num_envs:
            raise UserError(
                f"--frames_per_batch must be a multiple of --num_envs: {self.frames_per_batch} steps do not "
                f"divide among {self.num_envs} copies"
            )
        if self.total_frames < self.frames_per_batch:
            raise UserError("--total_frames must be at least --frames_per_batch")
        if self.stop_at_iteration > self.num_iterations:
            raise UserError(f"--stop_at_iteration is after the last iteration, {self.num_iterations}")
        if self.eval_episodes < 2:
            raise UserError("--eval_episodes must be at least 2: one episode has no interval")
        if self.shares and not (min(self.shares) >= 0 and 0 < sum(self.shares) < math.inf):
            raise UserError("--shares must not be negative and not all 0, one for every group")
        if any(size < 1 for size in self.hidden_sizes):
            raise UserError("--hidden_sizes must be at least 1 each")
        self._check_options()

    def _check_options(self) -> None:
        flags = {name: f"--{name}" for name in ("num_envs", "seed", "device", "observation")}
        flags |= {"env_id": "--env_id", "backend": "--env_backend"}
        for name in self.env_options:
            if name in flags:
                raise UserError(f"--env_options must not hold {name}, which has a flag: {flags[name]}")
            if not isinstance(name, str):
                raise UserError(f"--env_options holds {name!r}, but its keys are names of options")

    @property
    def num_iterations(self) -> int:
        """Rollouts, each followed by updates."""
        return self.total_frames // self.frames_per_batch
