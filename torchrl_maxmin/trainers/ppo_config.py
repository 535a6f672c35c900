"""Settings of the policy stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.objectives.kl import KL_ESTIMATORS
from torchrl_maxmin.rewards.calibration import CALIBRATIONS

__all__ = ["PPOConfig"]

OBJECTIVES = ("min_of_means", "mean_of_prompt_mins", "mean_of_mins")
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
)
ADVERSARIES = ("entropy_regularized", "hard_min", "exponentiated_gradient", "projected_gradient")


@dataclass
class PPOConfig:
    """MaxMin PPO of a causal language model.

    Args:
        model_name_or_path: the reference policy, usually what sft wrote.
        dataset_name: prompts; json, jsonl, csv or parquet file, saved dataset or hub name with a
            column prompt.
        output_dir: folder for the policy; must be empty or absent, unless a run is resumed in it.
        reward_model_path: folder that reward wrote (or any sequence classifier with K labels).
        reward_funcs: instead of a reward model, functions by name, as module:function.
        monitor_funcs: functions by name, or a world's json, that are logged and never trained on.
        objective: min_of_means (the paper, the minimum over groups of the mean reward),
            mean_of_prompt_mins (the same for every prompt by itself, over its num_generations) or
            mean_of_mins (the mean of every response's smallest reward).
        num_generations: responses to every prompt of a rollout.
        welfare: egalitarian (max-min), utilitarian (mean weighted by population shares), or between the
            two soft_min, kl_ball, chi2_ball, cvar, generalized_gini, nash and alpha_fair (the last two
            with --calibration win_rate; they count from what a response pays that does not end).
        welfare_parameter: temperature of soft_min, radius of kl_ball and chi2_ball, level of cvar, alpha
            of alpha_fair, ratio of each coefficient of generalized_gini to the one before.
        adversary: who moves the group weights of egalitarian; entropy_regularized, hard_min (the paper),
            exponentiated_gradient or projected_gradient.
        tau: entropy weight of entropy_regularized, in standard deviations of the calibrated reward.
        adversary_step_size: step of exponentiated_gradient and projected_gradient.
        adversary_step_decay: the t-th step of the adversary is divided by sqrt(1 + this * t).
        adversary_optimistic: whether the adversary moves on a guess of the utilities to come.
        gap_steps: certify the distance to the optimum every so many iterations, logged as
            maxmin/duality_gap; 0 never does.
        stop_at_gap: stop once the upper end of that distance is at most this; 0 runs to the end.
        certificate_prompts: prompts behind it.
        certificate_samples: responses a prompt behind it, half of them the reference's; a multiple of 4.
        calibration: scale of the reward heads before any minimum; sft_std, sft_mean, win_rate, none.
        calibration_prompts: prompts of the reference samples for the calibration.
        calibration_samples: reference samples a prompt.
        beta: weight of the KL penalty to the reference, paid for every token.
        kl_estimator: of that penalty a token; k1 (unbiased), k2 or k3 (never negative).
        kl_controller: constant, or adaptive towards kl_target.
        kl_target: KL a response that the adaptive controller aims at, in nats.
        kl_horizon: responses over which the adaptive controller moves.
        num_iterations: rollouts, each followed by updates.
        rollout_batch_size: responses a rollout.
        num_ppo_epochs: passes over a rollout.
        mini_batch_size: responses an optimizer step.
        learning_rate: peak learning rate of the policy.
        critic_learning_rate: peak learning rate of the critic; 0 takes that of the policy.
        warmup_iterations: iterations of linear warm-up; then linear decay to 0.
        cliprange: clipping of the probability ratio.
        cliprange_value: clipping of the value update; 0 turns it off.
        lam: lambda of the advantage estimate.
        gamma: discount.
        entropy_coeff: weight of an entropy bonus.
        max_grad_norm: gradient clipping, for policy and critic apart.
        temperature: of sampling and scoring.
        response_length: most tokens of a response.
        max_prompt_length: longest prompt in tokens; longer ones lose their start.
        missing_eos_penalty: taken from every calibrated reward of a response that does not end.
        save_steps: write a checkpoint every so many iterations; 0 writes none.
        stop_at_iteration: stop there with a checkpoint, as if interrupted; 0 runs to the end.
        resume_from_checkpoint: checkpoint folder of output_dir, or last.
        report_to: also log to csv, tensorboard, wandb or mlflow.
        dataset_split: split of the prompts.
        seed: seed of everything random.
        device: cpu, cuda or auto.
    """

    model_name_or_path: str
    dataset_name: str
    output_dir: str
    reward_model_path: str | None = None
    reward_funcs: list[str] = field(default_factory=list)
    monitor_funcs: list[str] = field(default_factory=list)
    objective: str = "min_of_means"
    num_generations: int = 1
    welfare: str = "egalitarian"
    welfare_parameter: float = 0.1
    adversary: str = "entropy_regularized"
    tau: float = 0.1
    adversary_step_size: float = 0.5
    adversary_step_decay: float = 0.0
    adversary_optimistic: bool = False
    gap_steps: int = 0
    stop_at_gap: float = 0.0
    certificate_prompts: int = 64
    certificate_samples: int = 64
    calibration: str = "sft_std"
    calibration_prompts: int = 512
    calibration_samples: int = 2
    beta: float = 0.05
    kl_estimator: str = "k1"
    kl_controller: str = "constant"
    kl_target: float = 6.0
    kl_horizon: int = 10000
    num_iterations: int = 200
    rollout_batch_size: int = 64
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
    temperature: float = 1.0
    response_length: int = 53
    max_prompt_length: int = 512
    missing_eos_penalty: float = 1.0
    save_steps: int = 0
    stop_at_iteration: int = 0
    resume_from_checkpoint: str | None = None
    report_to: str | None = None
    dataset_split: str = "train"
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together."""
        for name, value, known in (
            ("objective", self.objective, OBJECTIVES),
            ("welfare", self.welfare, WELFARES),
            ("adversary", self.adversary, ADVERSARIES),
            ("calibration", self.calibration, CALIBRATIONS),
            ("kl_estimator", self.kl_estimator, KL_ESTIMATORS),
            ("kl_controller", self.kl_controller, ("constant", "adaptive")),
        ):
            if value not in known:
                raise UserError(f"--{name} {value!r} is none of {', '.join(known)}")
        if bool(self.reward_model_path) == bool(self.reward_funcs):
            raise UserError("give a reward: either --reward_model_path or --reward_funcs")
        for name in (
            "num_iterations",
            "rollout_batch_size",
            "num_ppo_epochs",
            "mini_batch_size",
            "response_length",
            "num_generations",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        if self.rollout_batch_size % self.num_generations:
            raise UserError("--rollout_batch_size must be a multiple of --num_generations")
        if self.objective == "mean_of_prompt_mins" and self.num_generations < 2:
            raise UserError("--objective mean_of_prompt_mins needs --num_generations of at least 2")
        if self.calibration == "sft_std" and self.calibration_samples < 2:
            raise UserError("--calibration sft_std needs --calibration_samples of at least 2")
        if self.stop_at_iteration > self.num_iterations:
            raise UserError("--stop_at_iteration is after --num_iterations")
        if self.kl_controller == "adaptive" and self.beta <= 0:
            raise UserError("--kl_controller adaptive starts from --beta, which must be positive")
        if self.temperature <= 0:
            raise UserError("--temperature must be positive")
        if self.welfare in ("nash", "alpha_fair") and self.calibration != "win_rate":
            raise UserError(f"--welfare {self.welfare} needs positive utilities: add --calibration win_rate")
        if self.welfare == "cvar" and not 0 < self.welfare_parameter <= 1:
            raise UserError("--welfare_parameter, the level of cvar, must be above 0 and at most 1")
        if self.welfare == "generalized_gini" and not 0 < self.welfare_parameter <= 1:
            raise UserError(
                "--welfare_parameter, the ratio of generalized_gini, must be above 0 and at most 1"
            )
        if self.welfare_parameter <= 0:
            raise UserError("--welfare_parameter must be positive")
        if self.adversary_step_decay < 0 or self.adversary_step_size < 0:
            raise UserError("--adversary_step_size and --adversary_step_decay must not be negative")
        self._check_certificate()

    def _check_certificate(self) -> None:
        if self.stop_at_gap and not self.gap_steps:
            raise UserError("--stop_at_gap needs --gap_steps, which says how often to look")
        if not self.gap_steps:
            return
        if self.gap_steps < 0 or self.stop_at_gap < 0:
            raise UserError("--gap_steps and --stop_at_gap must not be negative")
        if (self.welfare, self.objective) != ("egalitarian", "min_of_means"):
            raise UserError("--gap_steps certifies max-min: it needs --welfare egalitarian, min_of_means")
        if self.beta <= 0:
            raise UserError("--gap_steps needs --beta above 0: without a KL penalty there is no certificate")
        if self.certificate_samples < 4 or self.certificate_samples % 4 or self.certificate_prompts < 2:
            raise UserError("--certificate_samples must be a multiple of 4, --certificate_prompts 2 or more")
