"""MaxMin PPO in environments with a vector reward; the loop itself is :class:`PPOLoop`'s."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs import Compose, EnvBase, StepCounter, TransformedEnv

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.collectors.episodes import episode_returns, episode_summary, exact_summary
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import (
    leave_no_empty_output,
    require_finite,
    seed_everything,
    write_config,
    write_json,
)
from torchrl_maxmin.envs import GroupReward, make_env
from torchrl_maxmin.modules.mlp import make_actor, make_critic
from torchrl_maxmin.objectives import VectorGAE, whiten
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.trainers.ppo_adversary import adversary_of
from torchrl_maxmin.trainers.ppo_loop import PPOLoop
from torchrl_maxmin.trainers.ppo_metrics import update_metrics

__all__ = ["EnvPPOTrainer", "load_env_policy", "run_env_ppo"]

POLICY_FILE = "policy.pt"


@leave_no_empty_output
def run_env_ppo(config: EnvPPOConfig) -> Path:
    """Train a policy in an environment and save it; returns its folder.

    Raises:
        UserError: before any work, for settings, environments or folders that cannot be used.
    """
    trainer = EnvPPOTrainer(config)
    trainer.train()
    trainer.env.close(raise_if_closed=False)
    return trainer.folder


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
    if not (folder / POLICY_FILE).is_file():
        raise UserError(f"no {POLICY_FILE} in {folder}; give the output folder of ppo --env_id")
    config = EnvPPOConfig(**yaml.safe_load((folder / "config.yaml").read_text()))
    env = make_group_env(config, config.seed)
    actor = make_actor(env, config.hidden_sizes)
    actor.load_state_dict(torch.load(folder / POLICY_FILE, weights_only=True, map_location="cpu"))
    return actor, env


def make_group_env(config: EnvPPOConfig, seed: int) -> TransformedEnv:
    """The environment that a config names, rewarding as its objective says."""
    env = make_env(
        config.env_id,
        config.num_envs,
        seed=seed,
        backend=config.env_backend,
        observation=config.observation,
        **config.env_options,
    )
    cut = [StepCounter(config.max_episode_steps)] if config.max_episode_steps else []
    return TransformedEnv(env, Compose(*cut, GroupReward(minimum=config.objective == "mean_of_mins")))


class EnvPPOTrainer(PPOLoop):
    """The policy stage in an environment, built from a config.

    Episodes run on from one rollout to the next. They start anew at a checkpoint, in the run that writes
    it as in the one that goes on from it, so that both go on alike.

    Args:
        config: see :class:`EnvPPOConfig`.
    """

    config: EnvPPOConfig
    more_iterations = "--total_frames"

    def __init__(self, config: EnvPPOConfig):
        super().__init__(config)
        self.started = time.perf_counter()
        self.num_iterations = config.num_iterations
        seed_everything(config.seed)
        self.env = make_group_env(config, config.seed).to(self.device)
        self.num_groups = self.env.output_spec["full_observation_spec", "group_reward"].shape[-1]
        if config.shares and len(config.shares) != self.num_groups:
            raise UserError(f"--shares has {len(config.shares)} numbers, the reward {self.num_groups} groups")
        self.policy = make_actor(self.env, config.hidden_sizes).to(self.device)
        columns = 1 if config.objective == "mean_of_mins" else self.num_groups
        self.critic = make_critic(self.env, columns, config.hidden_sizes).to(self.device)
        saved = self._saved()
        self.utility_scale = self._scale() if saved is None else saved["utility_scale"]
        shares = torch.tensor(config.shares) / sum(config.shares) if config.shares else None
        self.adversary = adversary_of(config, self.num_groups, shares, scale=self.utility_scale)
        self._build_learner()
        if saved is not None:
            self._restore(saved)
        self.collector = MaxMinCollector(
            self.env,
            self.policy,
            adversary=self.adversary,
            postproc=self._check_rewards,
            frames_per_batch=config.frames_per_batch,
            total_frames=config.frames_per_batch * (self.num_iterations - self.start),
        )
        self._start_episodes(self.start)
        if saved is not None:
            self._restore_random(saved)
        write_config(self.folder, config)

    # -- parts ------------------------------------------------------------------------------------

    def _scale(self) -> float:
        """The unit of the returns: as given, or their deviation under the first policy, mean over groups."""
        returns = episode_returns(self.env, self.policy, self.config.num_envs, max_steps=self._longest())
        means = returns.mean(0)
        if self.config.welfare in ("nash", "alpha_fair") and not (means > 0).all():
            raise UserError(
                f"--welfare {self.config.welfare} needs positive returns, and those of the first policy are "
                f"{', '.join(f'{mean:.3g}' for mean in means)}; add a constant to the reward"
            )
        scale = self.config.utility_scale or float(returns.std(0, correction=0).mean())
        return scale if scale > 0 else 1.0

    def _longest(self) -> int:
        """Steps after which an episode is taken for one that never ends."""
        return 10 * self.config.frames_per_batch // self.config.num_envs

    def _build_learner(self) -> None:
        config = self.config
        self._build_loss(self.policy)
        self.loss.set_keys(sample_log_prob="sample_log_prob")
        self.gae = VectorGAE(gamma=config.gamma, lmbda=config.lam, value_network=self.critic)
        self._build_optimizer(config.frames_per_batch)

    def _start_episodes(self, iteration: int) -> None:
        """New episodes, from a seed that the iteration decides."""
        self.env.set_seed(self.config.seed * 1_000_003 + iteration)
        self.collector.reset()

    def _check_rewards(self, rollout: TensorDictBase) -> TensorDictBase:
        """Before the adversary sees them, which refuses NaN without saving the batch."""
        require_finite(rollout["next", "reward"].sum().item(), rollout, self.folder, "a reward")
        return rollout

    # -- an iteration -----------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, rollout: TensorDictBase) -> TensorDict:
        """Advantages of every group on one scale, then the weighted sum."""
        steps = rollout.select(
            "observation", ("next", "observation"), ("next", "done"), ("next", "terminated")
        )
        steps["next", "reward"] = rollout["next", "reward"] / self.utility_scale
        steps["group_weights"] = rollout["group_weights"]
        self.gae(steps)
        rollout["advantage"] = whiten(steps["advantage"])
        rollout["value_target"], rollout["state_value"] = steps["value_target"], steps["state_value"]
        return rollout

    def _rows(self, batch: TensorDict) -> TensorDict:
        keys = ("observation", "action", "sample_log_prob", "advantage", "value_target", "state_value")
        return batch.select(*keys).flatten()

    def _measure(self, iteration: int, batch: TensorDict, losses: dict[str, Tensor]) -> dict[str, float]:
        first = (0,) * batch.ndim
        weights, done = batch["group_weights"][first], batch["next", "done"].squeeze(-1)
        returns = batch["next", "episode_group_reward"][done]
        utilities = batch["group_utilities"][first]
        metrics: dict[str, Any] = {
            "frames": (iteration + 1) * self.config.frames_per_batch,
            "episodes": len(returns),
        }
        if len(returns):
            means = returns.mean(0)
            metrics["objective/scores"] = (utilities * weights).sum()
            metrics["objective/welfare"] = utilities.min()
            metrics["maxmin/worst_group"] = means.argmin()
            metrics |= {f"rewards/{k}/mean": value for k, value in enumerate(means)}
            metrics |= {f"rewards/{k}/std": value for k, value in enumerate(returns.std(0, correction=0))}
        metrics |= update_metrics(losses, weights)
        return {name: float(value) for name, value in metrics.items()}

    def _note(self, metrics: dict[str, float]) -> str:
        return super()._note(metrics) if metrics["episodes"] else "no episode ended"

    # -- state ------------------------------------------------------------------------------------

    def _save(self, iteration: int) -> None:
        self._start_episodes(iteration)
        super()._save(iteration)

    def _state(self) -> dict[str, Any]:
        return {"utility_scale": self.utility_scale}

    def _load_state(self, state: dict[str, Any]) -> None:
        return None

    def _finish(self) -> None:
        config = self.config
        partial = self.folder / f".{POLICY_FILE}.partial"
        torch.save(self.policy.state_dict(), partial)
        os.replace(partial, self.folder / POLICY_FILE)
        trained = time.perf_counter()
        env = make_group_env(config, config.seed + 1).to(self.device)
        returns = episode_returns(env, self.policy, config.eval_episodes, max_steps=self._longest())
        frames = (self.num_iterations - self.start) * config.frames_per_batch
        summary = {
            "env_id": config.env_id,
            "objective": config.objective,
            "seed": config.seed,
            "frames": self.num_iterations * config.frames_per_batch,
            "wall_seconds": trained - self.started,
            "frames_per_second": frames / (trained - self.started),
            "utility_scale": self.utility_scale,
            "group_weights": self.adversary.weights.tolist(),
            "sampled": episode_summary(returns),
            **exact_summary(env, self.policy, config.objective),
        }
        env.close()
        write_json(self.folder / "summary.json", summary)
