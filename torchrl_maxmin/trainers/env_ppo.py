"""MaxMin PPO in an environment: the parts that :func:`~torchrl_maxmin.trainers.ppo.train` takes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.envs import Compose, EnvBase, StepCounter, TransformedEnv

from torchrl_maxmin.collectors import GroupStatistics
from torchrl_maxmin.collectors.episodes import episode_returns, episode_summary, exact_summary
from torchrl_maxmin.core.distributed import (
    across_ranks,
    gather_rows,
    is_main_process,
    over_ranks,
    rank,
    seed_of_rank,
    share_of_rows,
    world_size,
)
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import resolve_device, seed_everything, write_config, write_json
from torchrl_maxmin.core.run_folder import require_finished, stage
from torchrl_maxmin.envs import GroupReward, make_env
from torchrl_maxmin.masks import whiten
from torchrl_maxmin.models.integrity import require_finite_weights
from torchrl_maxmin.models.mlp import make_actor, make_critic
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.objectives import VectorGAE
from torchrl_maxmin.rollouts.environment import EnvRollouts
from torchrl_maxmin.rollouts.environment_workers import EnvSampler, WorkerEnvRollouts
from torchrl_maxmin.rollouts.ray_workers import RayWorkers, ray_session
from torchrl_maxmin.stats.interval import SCHEMA_VERSION
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.monitors import Metrics, Monitor
from torchrl_maxmin.trainers.ppo import PPOParts, find_state, restore, train
from torchrl_maxmin.trainers.ppo_settings import MAY_CHANGE, adversary_of
from torchrl_maxmin.trainers.watch import warnings_of

__all__ = [
    "EnvParts",
    "StepAdvantages",
    "build_env_ppo",
    "load_env_policy",
    "make_env_sampler",
    "run_env_ppo",
    "train_env_policy",
]

POLICY_FILE = "policy.safetensors"


def load_env_policy(folder: str | Path) -> tuple[TensorDictModule, EnvBase]:
    """A trained policy, and the environment that it was trained in.

    Args:
        folder: what :func:`run_env_ppo` wrote.

    Returns:
        The policy, which reads ``observation`` and writes ``action``, and a fresh environment, on the CPU.

    Raises:
        UserError: if the folder holds no such policy.
    """
    folder = Path(folder)
    require_finished(folder)
    if not (folder / POLICY_FILE).is_file():
        raise UserError(f"no {POLICY_FILE} in {folder}; give the output folder of ppo --env_id")
    config = EnvPPOConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    env = make_group_env(config, config.seed)
    actor = make_actor(env, config.hidden_sizes)
    actor.load_state_dict(load_file(folder / POLICY_FILE))
    require_finite_weights(actor.named_parameters(), str(folder))
    return actor, env


def make_group_env(config: EnvPPOConfig, seed: int) -> TransformedEnv:
    """The environment that a config names, rewarding as its objective says.

    Of processes that work as one, each gets its share of the copies, with random numbers of their own.
    """
    index, _ = share_of_rows(config.num_envs)
    env = make_env(
        config.env_id,
        len(index),
        seed=seed,
        backend=config.env_backend,
        observation=config.observation,
        **config.env_options,
    )
    cut = [StepCounter(config.max_episode_steps)] if config.max_episode_steps else []
    env = TransformedEnv(env, Compose(*cut, GroupReward(minimum=config.objective == "mean_of_mins")))
    if world_size() > 1:  # not before: the seed may decide what the environment is
        env.set_seed(seed_of_rank(seed))
    return env


def make_env_sampler(config: EnvPPOConfig) -> EnvSampler:
    """Make what a worker runs, in its process."""
    device = "cuda" if config.rollout_worker_gpus else "cpu"

    def make_block(num_envs: int) -> tuple[EnvBase, TensorDictModuleBase]:
        env = make_group_env(replace(config, num_envs=num_envs), config.seed).to(device)
        return env, make_actor(env, config.hidden_sizes).to(device)

    return EnvSampler(
        make_block,
        num_envs=config.num_envs,
        frames_per_batch=config.frames_per_batch,
        num_batches=config.num_iterations,
        seed=config.seed,
    )


def start_workers(config: EnvPPOConfig) -> RayWorkers | None:
    """Start the workers that ``--rollout_workers`` asks for; None where it asks for none."""
    if not config.rollout_workers:
        return None
    make = partial(make_env_sampler, config)
    return RayWorkers([make] * config.rollout_workers, gpus=config.rollout_worker_gpus)


@dataclass
class EnvParts(PPOParts):
    """The parts of a run in an environment."""

    rollouts: EnvRollouts | WorkerEnvRollouts
    advantages: StepAdvantages


@across_ranks
@stage("ppo", may_change=MAY_CHANGE, length="total_frames")
def run_env_ppo(config: EnvPPOConfig) -> Path:
    """Train a policy in an environment and save it; returns its folder.

    Raises:
        UserError: before any work, for settings, environments or folders that cannot be used.
    """
    started = time.perf_counter()
    with ray_session(config.rollout_workers, config.ray_address, config.rollout_worker_gpus):
        return train_env_policy(config, build_env_ppo(config), started)


def build_env_ppo(config: EnvPPOConfig) -> EnvParts:
    """Build the parts of a run, and take back the state of the checkpoint that it goes on from.

    Raises:
        UserError: before any work, for settings, environments or folders that cannot be used.
    """
    config.check()
    device, folder = resolve_device(config.device), Path(config.output_dir)
    seed_everything(config.seed)
    env = make_group_env(config, config.seed).to(device)
    num_groups = env.output_spec["full_observation_spec", "group_reward"].shape[-1]
    if config.shares and len(config.shares) != num_groups:
        raise UserError(f"--shares has {len(config.shares)} numbers, the reward {num_groups} groups")
    actor = make_actor(env, config.hidden_sizes).to(device)
    columns = 1 if config.objective == "mean_of_mins" else num_groups
    models = Networks(actor, make_critic(env, columns, config.hidden_sizes).to(device))
    state = find_state(config, config.num_iterations)
    workers = start_workers(config)
    if rank():
        torch.manual_seed(seed_of_rank(config.seed))  # actions of other copies are others
    scale = measure_scale(config, env, actor) if state is None else state["utility_scale"]
    shares = torch.tensor(config.shares) / sum(config.shares) if config.shares else None
    adversary = adversary_of(config, num_groups, shares, scale=scale)
    start = 0 if state is None else state["iteration"]
    order: dict[str, Any] = {
        "num_envs": config.num_envs,
        "num_batches": config.num_iterations,
        "start": start,
        "folder": folder,
    }
    rollouts: EnvRollouts | WorkerEnvRollouts
    monitors: list[Monitor] = []
    if workers is None:
        size = config.frames_per_batch
        rollouts = EnvRollouts(env, actor, frames_per_batch=size, seed=config.seed, **order)
    else:
        order |= {"max_staleness": config.max_staleness, "state": state}
        rollouts = WorkerEnvRollouts(env, workers, models.policy_parameters, **order)
        monitors.append(rollouts.batches.metrics)
    parts = EnvParts(
        models=models,
        learner=Learner(config, models, config.num_iterations, config.frames_per_batch),
        rollouts=rollouts,
        statistics=GroupStatistics(adversary),
        advantages=StepAdvantages(models.critic, scale, gamma=config.gamma, lmbda=config.lam, start=start),
        monitors=monitors,
        start=start,
    )
    restore(state, parts, folder)
    write_config(folder, config)
    return parts


def train_env_policy(config: EnvPPOConfig, parts: EnvParts, started: float | None = None) -> Path:
    """Train what :func:`build_env_ppo` built; returns the policy's folder.

    Args:
        config: the stage's settings.
        parts: what was built.
        started: when, by ``time.perf_counter``, the run began; now, if None.
    """
    started, folder = started or time.perf_counter(), Path(config.output_dir)
    if train(config, **vars(parts)):
        actor = parts.models.policy
        if is_main_process():
            partial = folder / f".{POLICY_FILE}.partial"
            save_file({name: value.contiguous() for name, value in actor.state_dict().items()}, partial)
            os.replace(partial, folder / POLICY_FILE)
        seconds = time.perf_counter() - started
        env = make_group_env(config, config.seed + 1).to(next(actor.parameters()).device)
        returns = sample_returns(config, env, actor, config.eval_episodes)
        summary = {
            "env_id": config.env_id,
            "objective": config.objective,
            "seed": config.seed,
            "frames": config.num_iterations * config.frames_per_batch,
            "wall_seconds": seconds,
            "frames_per_second": (config.num_iterations - parts.start) * config.frames_per_batch / seconds,
            "utility_scale": parts.advantages.utility_scale,
            "group_weights": parts.statistics.adversary.weights.tolist(),
            "sampled": episode_summary(returns),
            **exact_summary(env, actor, config.objective),
            "warnings": warnings_of(config),
        }
        env.close()
        write_json(folder / "summary.json", {"schema_version": SCHEMA_VERSION, **summary})
    parts.rollouts.env.close(raise_if_closed=False)
    return folder


def sample_returns(
    config: EnvPPOConfig, env: EnvBase, policy: TensorDictModuleBase, num_episodes: int
) -> Tensor:
    """Returns [E, K] of at least so many episodes, of which every process plays its share."""
    # an episode of so many steps is taken for one that never ends
    longest = 10 * config.frames_per_batch // config.num_envs
    own = episode_returns(env, policy, -(-num_episodes // world_size()), max_steps=longest)
    return gather_rows(own, len(own) * world_size())


def measure_scale(config: EnvPPOConfig, env: EnvBase, policy: TensorDictModuleBase) -> float:
    """The unit of the returns: as given, or their deviation under the first policy, mean over groups.

    Raises:
        UserError: for returns of the first policy that the welfare is not defined at.
    """
    returns = sample_returns(config, env, policy, config.num_envs)
    means = returns.mean(0)
    if config.welfare in ("nash", "alpha_fair") and not (means > 0).all():
        raise UserError(
            f"--welfare {config.welfare} needs positive returns, and those of the first policy are "
            f"{', '.join(f'{mean:.3g}' for mean in means)}; add a constant to the reward"
        )
    scale = config.utility_scale or float(returns.std(0, correction=0).mean())
    return scale if scale > 0 else 1.0


class StepAdvantages:
    """Advantages of steps in an environment: of every group, on one scale, then their weighted sum.

    Args:
        critic: gives the values.
        utility_scale: what rewards are divided by.
        gamma: discount.
        lmbda: trace decay.
        start: rollouts that were done before.
    """

    def __init__(
        self, critic: TensorDictModule, utility_scale: float, *, gamma: float, lmbda: float, start: int = 0
    ):
        self.utility_scale, self.num_rollouts = utility_scale, start
        self.gae = VectorGAE(gamma=gamma, lmbda=lmbda, value_network=critic)

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> tuple[TensorDictBase, Metrics]:
        """Return the rows that the loss reads, one a step, and the rollout's metrics.

        Args:
            batch: batch size [N, T], with ``group_utilities`` and ``group_weights`` [N, T, K].
        """
        steps = batch.select("observation", "action", "sample_log_prob", "group_weights")
        steps["next"] = batch["next"].select("observation", "done", "terminated")
        steps["next", "reward"] = batch["next", "reward"] / self.utility_scale
        keys = ("observation", "action", "sample_log_prob", "advantage", "value_target", "state_value")
        rows = over_ranks(lambda part: self.gae(part).select(*keys), steps)
        rows["advantage"] = whiten(rows["advantage"])
        self.num_rollouts += 1
        return rows.flatten(), self.metrics(batch)

    def metrics(self, batch: TensorDictBase) -> Metrics:
        """Frames until now, and the returns of the episodes that ended in a rollout."""
        returns = batch["next", "episode_group_reward"][batch["next", "done"].squeeze(-1)]
        metrics: dict[str, Any] = {
            "frames": self.num_rollouts * batch.numel(),
            "episodes": len(returns),
        }
        if len(returns):
            first = (0,) * batch.ndim
            utilities, means = batch["group_utilities"][first], returns.mean(0)
            metrics["objective/scores"] = (utilities * batch["group_weights"][first]).sum()
            metrics["objective/welfare"] = utilities.min()
            metrics["maxmin/worst_group"] = means.argmin()
            metrics |= {f"rewards/{k}/mean": value for k, value in enumerate(means)}
            metrics |= {f"rewards/{k}/std": value for k, value in enumerate(returns.std(0, correction=0))}
        return {name: float(value) for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """What rewards are divided by."""
        return {"utility_scale": self.utility_scale}
