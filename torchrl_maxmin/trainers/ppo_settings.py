"""Settings that every policy stage has, of a language model or in an environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import CheckedSettings

__all__ = ["PPOSettings"]

WELFARES = (
    "egalitarian",
    "utilitarian",
    "soft_min",
    "kl_ball",
    "chi2_ball",
    "cvar",
    "nash",
    "alpha_fair",
    "generalized_gini",
    "fixed",
)
#: loggers of TorchRL, and the packages that each needs
LOGGERS = {"csv": (), "tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow",)}
ADVERSARIES = ("entropy_regularized", "hard_min", "exponentiated_gradient", "projected_gradient")


@dataclass(kw_only=True)
class PPOSettings(CheckedSettings):
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
        learning_rate: peak learning rate of the policy.
        critic_learning_rate: peak learning rate of the critic; 0 takes that of the policy.
        warmup_iterations: iterations of linear warm-up; then linear decay to 0.
        cliprange: clipping of the probability ratio, at most 1.
        cliprange_value: clipping of the value update; 0 turns it off.
        lam: lambda of the advantage estimate.
        gamma: discount.
        entropy_coeff: weight of an entropy bonus.
        max_grad_norm: gradient clipping, for policy and critic apart; .inf turns it off.
        save_steps: write a checkpoint every so many iterations; 0 writes none.
        stop_at_iteration: stop there with a checkpoint, as if interrupted; 0 runs to the end.
        resume_from_checkpoint: checkpoint folder of output_dir, or last.
        report_to: also log to csv, tensorboard, wandb or mlflow.
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
    stop_at_iteration: int = 0
    resume_from_checkpoint: str | None = None
    report_to: str | None = None
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together."""
        self.require_known(welfare=WELFARES, adversary=ADVERSARIES)
        self.require_seed()
        self.require_at_least(1, "num_ppo_epochs", "mini_batch_size")
        self.require_at_least(
            0,
            "learning_rate", "critic_learning_rate", "warmup_iterations", "cliprange_value", "entropy_coeff",
            "adversary_step_size", "adversary_step_decay", "save_steps", "stop_at_iteration",
        )  # fmt: skip
        self.require_in_range(0, 1, "gamma", "lam")
        if self.report_to:
            self.require_known(report_to=tuple(LOGGERS))
            if not all(find_spec(package) for package in LOGGERS[self.report_to]):
                raise UserError(
                    f"--report_to {self.report_to} needs its package: pip install {self.report_to}"
                )
        self.require_positive("welfare_parameter", "tau")
        if self.welfare in ("cvar", "generalized_gini") and not 0 < self.welfare_parameter <= 1:
            name = "level" if self.welfare == "cvar" else "ratio"
            raise UserError(
                f"--welfare_parameter, the {name} of {self.welfare}, must be above 0 and at most 1"
            )
        if not 0 < self.cliprange <= 1:
            raise UserError(f"--cliprange must be above 0 and at most 1; it is {self.cliprange}")
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
        if self.adversary != ADVERSARIES[0] and not (plain and self.welfare == "egalitarian"):
            raise UserError(
                f"--adversary {self.adversary} moves the group weights of --welfare egalitarian with "
                "--objective min_of_means, and of no other: leave it out"
            )
