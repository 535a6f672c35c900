"""Settings that every policy stage has, of a language model or in an environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import ReportSettings
from torchrl_maxmin.rollouts.ray_workers import require_ray
from torchrl_maxmin.welfare import (
    ADVERSARIES,
    WELFARES,
    Adversary,
    FixedWeights,
    GeneralizedGini,
    Welfare,
    WelfareAdversary,
    make_adversary,
    make_welfare,
)

__all__ = ["MAY_CHANGE", "OBJECTIVES", "PPOSettings", "adversary_of"]

OBJECTIVES = ("min_of_means", "mean_of_prompt_mins", "mean_of_mins")
#: where rollouts come from and what is warned of, which may change where a run goes on
MAY_CHANGE = (
    "ray_address",
    "reward_timeout",
    "reward_timeout",
    "rollout_worker_gpus",
    "rollout_workers",
    "vllm_gpu_memory_utilization",
    "vllm_server_base_url",
    "warn_entropy",
    "warn_group",
    "warn_kl",
    "warn_kl_below_zero",
    "warn_kl_target",
    "warn_ratio",
    "warn_value",
)


@dataclass(kw_only=True)
class PPOSettings(ReportSettings):
    """MaxMin PPO.

    Args:
        output_dir: folder for the policy; must be empty or absent, unless a run is resumed in it.
        objective: min_of_means (the paper, the minimum over groups of the mean reward) or mean_of_mins.
        welfare: egalitarian (max-min), utilitarian (mean weighted by population shares), or between the
            two soft_min, kl_ball, chi2_ball, cvar, generalized_gini, nash and alpha_fair; or fixed.
        group_weights: of fixed, one number a group in the order of the reward heads, summing to 1.
        welfare_parameter: temperature of soft_min, radius of kl_ball and chi2_ball, level of cvar, alpha
            of alpha_fair, ratio of each coefficient of generalized_gini to the one before.
        adversary: who moves the group weights of egalitarian; entropy_regularized, hard_min (the paper),
            exponentiated_gradient or projected_gradient.
        tau: entropy weight of entropy_regularized, in standard deviations of the reward.
        adversary_step_size: step of exponentiated_gradient and projected_gradient.
        adversary_step_decay: the t-th step of the adversary is divided by sqrt(1 + this * t).
        adversary_optimistic: whether the adversary moves on a guess of the utilities to come.
        num_ppo_epochs: passes over a rollout.
        mini_batch_size: rows (responses, or steps of an environment) an optimizer step.
        per_device_train_batch_size: rows of these in memory at once, their gradients added up; 0 takes all.
        learning_rate: peak learning rate of the policy.
        critic_learning_rate: peak learning rate of the critic; 0 takes that of the policy.
        warmup_iterations: iterations of linear warm-up; then linear decay to 0.
        cliprange: clipping of the probability ratio, at most 1.
        cliprange_value: clipping of the value update; 0 turns it off.
        lam: lambda of the advantage estimate.
        gamma: discount.
        entropy_coeff: weight of an entropy bonus.
        max_grad_norm: gradient clipping, for policy and critic apart; .inf turns it off.
        save_steps: write a checkpoint every so many iterations; 0 writes none, but where Ctrl-C or SIGTERM
            ends the run.
        save_total_limit: checkpoints that stay, the latest ones; 0 keeps all.
        stop_at_iteration: stop there with a checkpoint, as if interrupted; 0 runs to the end.
        resume_from_checkpoint: go on with the run in output_dir, from its last checkpoint that is whole (or
            from the start where there is none) by last, or from the one whose folder is named.
        rollout_workers: processes of Ray that sample the rollouts, one trainer beside them; 0 samples in the
            trainer. What they sample does not depend on how many they are. A worker that dies is replaced; in
            an environment they move blocks of 8 copies, and those of one that died start new episodes.
        rollout_worker_gpus: GPUs of each worker; a fraction shares one, and 0 samples on the CPU.
        ray_address: a Ray cluster, by its address or auto, on whose machines this package is installed and
            model and data are found by the same names; Ray on this machine alone when left out.
        max_staleness: updates that the policy of a rollout may lack when it is trained on; 0 samples and
            trains in turns, 1 samples the next rollout during an update. Ratios are to the policy that
            sampled, or as importance_sampling_cap says.
        warn_kl_below_zero: warn where the mean KL of a response is below minus so many nats for 10
            iterations; of this and the other warnings (docs/numbers.md), each given once, 0 turns one off.
        warn_kl: warn where the KL is above so many nats a token.
        warn_kl_target: warn where the KL is above so many times kl_target, if it is steered towards one.
        warn_ratio: warn where the mean probability ratio of updates is above this, or below 1 divided by it.
        warn_entropy: warn where the policy's entropy is below this part of what it was at first.
        warn_group: warn where a group that has all the weight falls by so many of its standard deviations.
        warn_value: warn where the value loss is so many times what it was.
        seed: seed of everything random.
        device: cpu, cuda or auto.
    """

    output_dir: str
    objective: str = "min_of_means"
    welfare: str = "egalitarian"
    group_weights: list[float] = field(default_factory=list)
    welfare_parameter: float = 0.1
    adversary: str = "entropy_regularized"
    tau: float = 0.1
    adversary_step_size: float = 0.5
    adversary_step_decay: float = 0.0
    adversary_optimistic: bool = False
    num_ppo_epochs: int = 4
    mini_batch_size: int = 16
    per_device_train_batch_size: int = 0
    learning_rate: float = 3e-6
    critic_learning_rate: float = 0.0
    warmup_iterations: int = 5
    cliprange: float = 0.2
    cliprange_value: float = 0.0
    lam: float = 0.95
    gamma: float = 1.0
    entropy_coeff: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 0
    save_total_limit: int = 0
    stop_at_iteration: int = 0
    resume_from_checkpoint: str | None = None
    rollout_workers: int = 0
    rollout_worker_gpus: float = 0.0
    ray_address: str | None = None
    max_staleness: int = 0
    warn_kl_below_zero: float = 0.2
    warn_kl: float = 3.0
    warn_kl_target: float = 5.0
    warn_ratio: float = 2.0
    warn_entropy: float = 0.05
    warn_group: float = 0.5
    warn_value: float = 100.0
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together."""
        # a regret needs the best values, which nobody knows before; two of the adversaries are welfares
        welfares = (*(name for name in WELFARES if name != "regret"), "fixed")
        adversaries = tuple(name for name in ADVERSARIES if name not in ("welfare", "fixed"))
        self.require_known(welfare=welfares, adversary=adversaries)
        self.require_seed()
        self.require_at_least(1, "num_ppo_epochs", "mini_batch_size")
        self.require_at_least(
            0,
            "learning_rate", "critic_learning_rate", "warmup_iterations", "cliprange_value", "entropy_coeff",
            "adversary_step_size", "adversary_step_decay", "save_steps", "save_total_limit",
            "stop_at_iteration", "per_device_train_batch_size", "rollout_workers", "rollout_worker_gpus",
            "warn_kl_below_zero", "warn_kl", "warn_kl_target", "warn_ratio", "warn_entropy", "warn_group",
            "warn_value",
        )  # fmt: skip
        self.require_in_range(0, 1, "gamma", "lam", "max_staleness")
        self._check_workers()
        self.check_report()
        self.require_positive("welfare_parameter", "tau")
        if self.welfare in ("cvar", "generalized_gini") and not 0 < self.welfare_parameter <= 1:
            name = "level" if self.welfare == "cvar" else "ratio"
            raise UserError(
                f"--welfare_parameter, the {name} of {self.welfare}, must be above 0 and at most 1"
            )
        if not 0 < self.cliprange <= 1:
            raise UserError(f"--cliprange must be above 0 and at most 1; it is {self.cliprange}")
        if 0 < self.warn_ratio < 1:
            raise UserError(f"--warn_ratio must be at least 1, or 0 for no warning; it is {self.warn_ratio}")
        if not self.max_grad_norm > 0:
            raise UserError("--max_grad_norm must be positive; .inf turns it off")
        if bool(self.group_weights) != (self.welfare == "fixed"):
            raise UserError("--welfare fixed and --group_weights, its numbers, need each other")
        weights = self.group_weights
        if weights and not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-4):
            raise UserError("--group_weights must not be negative and must sum to 1")
        plain = self.objective == "min_of_means"
        if not plain and self.welfare != "egalitarian":
            raise UserError(
                f"--welfare {self.welfare} goes with --objective min_of_means: "
                f"{self.objective} is a welfare itself"
            )
        if self.adversary != "entropy_regularized" and not (plain and self.welfare == "egalitarian"):
            raise UserError(
                f"--adversary {self.adversary} moves the group weights of --welfare egalitarian with "
                "--objective min_of_means, and of no other: leave it out"
            )

    def _check_workers(self) -> None:
        if self.rollout_workers:
            require_ray()
            return
        for name in ("rollout_worker_gpus", "ray_address", "max_staleness"):
            if getattr(self, name):
                raise UserError(f"--{name} is of workers that sample: it needs --rollout_workers")


_PARAMETER = {
    "soft_min": "temperature",
    "kl_ball": "radius",
    "chi2_ball": "radius",
    "cvar": "level",
    "alpha_fair": "alpha",
}


def adversary_of(
    config: PPOSettings,
    num_groups: int,
    shares: Tensor | None,
    *,
    scale: float = 1.0,
    disagreement: float = 0.0,
) -> Adversary:
    """The adversary that ``--objective``, ``--welfare`` and ``--adversary`` ask for.

    Args:
        config: the stage's settings, checked.
        num_groups: K.
        shares: the groups' shares of the population [K]; None where they are not known (reward
            functions), which then count alike.
        scale: what the adversary divides utilities by; 1 where the reward is calibrated.
        disagreement: what a group gets in the worst case, from which Nash and alpha-fairness count.

    Raises:
        UserError: where ``--group_weights`` are not as many as the groups.
    """
    if config.welfare == "fixed":
        if len(config.group_weights) != num_groups:
            raise UserError(
                f"--group_weights gives {len(config.group_weights)} weights, but the reward has {num_groups} "
                "groups; give one a group"
            )
        return FixedWeights(config.group_weights)
    point = torch.full((num_groups,), 1.0 / num_groups) if shares is None else shares.cpu()
    if config.objective == "mean_of_mins":
        return FixedWeights([1.0])
    if config.welfare == "utilitarian" or config.objective == "mean_of_prompt_mins":
        # population shares where they are known: an equal-weight mean is another welfare;
        # weights by prompt need no adversary
        return FixedWeights(point)
    if num_groups == 1:
        return FixedWeights([1.0])
    options: dict[str, Any] = {
        "step_decay": config.adversary_step_decay,
        "optimistic": config.adversary_optimistic,
    }
    if config.welfare != "egalitarian":
        return WelfareAdversary(num_groups, _welfare(config, num_groups, point, disagreement), **options)
    settings: dict[str, dict[str, float]] = {
        "entropy_regularized": {"tau": config.tau, "scale": scale},
        "exponentiated_gradient": {"step_size": config.adversary_step_size, "scale": scale},
        "projected_gradient": {"step_size": config.adversary_step_size, "scale": scale},
        "hard_min": {},
    }
    return make_adversary(config.adversary, num_groups, **settings[config.adversary], **options)


def _welfare(config: PPOSettings, num_groups: int, shares: Tensor, disagreement: float) -> Welfare:
    if config.welfare == "generalized_gini":
        return GeneralizedGini.leximin(num_groups, config.welfare_parameter)
    settings: dict[str, Any] = {"prior" if config.welfare == "soft_min" else "shares": shares}
    if config.welfare in ("nash", "alpha_fair"):
        settings["disagreement"] = disagreement
    if config.welfare in _PARAMETER:
        settings[_PARAMETER[config.welfare]] = config.welfare_parameter
    return make_welfare(config.welfare, **settings)
