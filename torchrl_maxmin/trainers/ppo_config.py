"""Settings of the policy stage of a language model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.making import check_critic
from torchrl_maxmin.objectives.functional import KL_ESTIMATORS
from torchrl_maxmin.objectives.response_advantage import REWARD_SCALES
from torchrl_maxmin.preferences.chat import ChatSettings
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rollouts.settings import EngineSettings
from torchrl_maxmin.trainers.ppo_settings import OBJECTIVES, PPOSettings

__all__ = ["PPOConfig"]

ADVANTAGES = ("gae", "rloo", "grpo")


@dataclass
class PPOConfig(PPOSettings, EngineSettings, ChatSettings):
    """MaxMin PPO of a causal language model.

    Nash and alpha_fair need ``--calibration win_rate``, and count from what a response pays that does not
    end.

    Args:
        model_name_or_path: the reference policy, usually what sft wrote.
        dataset_name: prompts; json, jsonl, csv or parquet file, saved dataset or hub name with a
            column prompt of strings or lists of messages.
        reward_model_path: folder that reward wrote (or any sequence classifier with K labels).
        share_reward_trunk: with use_peft, read a reward model from the policy's own trunk where it is on
            the same one, weight by weight in the policy's dtype; its rewards are then read in that dtype too.
            False loads it by itself, in the dtype that it was saved in.
        reward_funcs: instead of a reward model, functions by name, as module:function; called as TRL does,
            with prompts, completions and those columns of the data that they take by name.
        monitor_funcs: functions by name, or a world's json, that are logged and never trained on; one that
            fails in a run is left out, with a warning.
        reward_timeout: seconds that one call of a reward or monitor function may take; 0 for no limit. A
            reward function that takes longer, fails, or gives other than it did ends the run behind a
            checkpoint of all updates.
        objective: min_of_means (the paper, the minimum over groups of the mean reward),
            mean_of_prompt_mins (the same for every prompt by itself, over its num_generations) or
            mean_of_mins (the mean of every response's smallest reward).
        critic: what gives the values of the groups; adapter (of its own, on the policy's trunk), heads (on
            the policy's states) or full (a trunk of its own). An adapter with use_peft, else full.
        merge_adapter: save the policy as a plain model, its adapter added to the weights; false saves the
            adapter alone.
        num_generations: responses to every prompt of a rollout.
        advantage: gae (a critic with values of every group) or, without a critic, from the other responses
            to the prompt, num_generations of 2 or more: rloo (leave one out, unbiased) or grpo.
            critic_learning_rate, cliprange_value, lam and gamma are of gae.
        scale_rewards: of grpo; group, its default, divides each group's rewards by their own deviation
            within the prompt (another unit a group and prompt than the one that max-min compares), none
            leaves them (Dr. GRPO).
        gap_steps: certify the distance to the optimum every so many iterations, logged as
            maxmin/duality_gap; 0 never does.
        stop_at_gap: stop once the upper end of that distance is at most this; 0 runs to the end. The error
            probability is shared among all looks of the run.
        certificate_prompts: prompts behind it, its units, 16 or more; the fewer the wider it is.
        certificate_samples: responses a prompt behind it, half of them the reference's; a multiple of 4.
        reward_bound: largest size that a calibrated reward of any response can have, missing_eos_penalty
            included; by default responses that nobody drew are taken to be worth no more than the best one
            drawn for their prompt.
        calibration: scale of the reward heads before any minimum; sft_std, sft_mean, win_rate, none.
            Where rewards have large offsets by prompt, sft_std and sft_mean take off each prompt's own mean
            over samples of the reference; win_rate compares with these.
        calibration_prompts: prompts of the reference samples for the calibration.
        calibration_samples: reference samples a prompt.
        baseline_samples: reference samples of every prompt, where prompts count one by one.
        beta: weight of the KL penalty to the reference, paid for every token.
        kl_estimator: of that penalty a token; k1 (unbiased), k2 or k3 (never negative).
        kl_controller: constant, or adaptive towards kl_target.
        kl_target: KL a response that the adaptive controller aims at, in nats.
        kl_horizon: responses over which the adaptive controller moves.
        num_iterations: rollouts, each followed by updates.
        rollout_batch_size: responses a rollout.
        response_length: most tokens of a response.
        max_prompt_length: longest prompt in tokens; longer ones lose their start.
        fixed_shapes: run all columns in every update, padding too, so that all have the same shapes, as
            CUDA graphs and torch.compile need them.
        missing_eos_penalty: taken from every calibrated reward of a response that does not end.
        dataset_split: split of the prompts.
    """

    model_name_or_path: str
    dataset_name: str
    reward_model_path: str | None = None
    share_reward_trunk: bool = True
    reward_funcs: list[str] = field(default_factory=list)
    monitor_funcs: list[str] = field(default_factory=list)
    reward_timeout: float = 1200.0
    critic: str | None = None
    merge_adapter: bool = True
    num_generations: int = 1
    advantage: str = "gae"
    scale_rewards: str | None = None
    gap_steps: int = 0
    stop_at_gap: float = 0.0
    certificate_prompts: int = 128
    certificate_samples: int = 64
    reward_bound: float | None = None
    calibration: str = "sft_std"
    calibration_prompts: int = 512
    calibration_samples: int = 2
    baseline_samples: int = 8
    beta: float = 0.05
    kl_estimator: str = "k1"
    kl_controller: str = "constant"
    kl_target: float = 6.0
    kl_horizon: int = 10000
    num_iterations: int = 200
    rollout_batch_size: int = 64
    response_length: int = 53
    max_prompt_length: int = 512
    fixed_shapes: bool = False
    missing_eos_penalty: float = 1.0
    dataset_split: str = "train"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work together."""
        super().check()
        self.check_model()
        self.check_sampling()
        self.check_engine()
        check_critic(self, self.critic)
        self.require_known(
            objective=OBJECTIVES,
            advantage=ADVANTAGES,
            calibration=CALIBRATIONS,
            kl_estimator=KL_ESTIMATORS,
            kl_controller=("constant", "adaptive"),
        )
        self.require_at_least(
            1,
            "num_iterations", "rollout_batch_size", "num_generations", "response_length", "max_prompt_length",
            "calibration_prompts", "calibration_samples", "baseline_samples", "certificate_prompts",
            "certificate_samples", "kl_horizon",
        )  # fmt: skip
        self.require_at_least(0, "beta", "missing_eos_penalty", "gap_steps", "stop_at_gap", "reward_timeout")
        self.require_positive("kl_target", "reward_bound")
        if bool(self.reward_model_path) == bool(self.reward_funcs):
            raise UserError("give a reward: either --reward_model_path or --reward_funcs")
        if self.rollout_batch_size % self.num_generations:
            raise UserError("--rollout_batch_size must be a multiple of --num_generations")
        if self.rollout_workers and self.distributed != "none":
            raise UserError("--rollout_workers sample for one trainer: leave --distributed or them out")
        if self.rollout_workers and self.samples_in_vllm:
            raise UserError("--rollout_workers sample by generate: leave --rollout_engine vllm or them out")
        if self.rollout_workers > self.rollout_batch_size:
            raise UserError(
                "--rollout_workers are more than the responses of a rollout, --rollout_batch_size"
            )
        if self.objective == "mean_of_prompt_mins" and self.num_generations < 2:
            raise UserError("--objective mean_of_prompt_mins needs --num_generations of at least 2")
        if self.calibration in ("sft_std", "sft_mean") and self.calibration_samples < 2:
            raise UserError(
                f"--calibration {self.calibration} needs --calibration_samples of at least 2, to tell a "
                "prompt's offset from its responses"
            )
        if self.stop_at_iteration > self.num_iterations:
            raise UserError("--stop_at_iteration is after --num_iterations")
        if self.kl_controller == "adaptive" and self.beta <= 0:
            raise UserError("--kl_controller adaptive starts from --beta, which must be positive")
        if self.welfare in ("nash", "alpha_fair") and self.calibration != "win_rate":
            raise UserError(f"--welfare {self.welfare} needs positive utilities: add --calibration win_rate")
        self._check_advantage()
        self._check_certificate()

    @property
    def shares_reward_trunk(self) -> bool:
        """Whether a reward model on the policy's trunk is read from it."""
        return self.use_peft and self.share_reward_trunk and self.reward_model_path is not None

    def _check_advantage(self) -> None:
        if self.scale_rewards is not None:
            if self.advantage != "grpo":
                raise UserError(
                    "--scale_rewards is of --advantage grpo, the only one that may divide: leave it out"
                )
            self.require_known(scale_rewards=REWARD_SCALES)
        if self.advantage == "gae":
            return
        if self.num_generations < 2:
            raise UserError(
                f"--advantage {self.advantage} compares responses to one prompt: it needs --num_generations "
                "of at least 2"
            )
        for name in ("critic", "critic_learning_rate", "cliprange_value", "lam", "gamma"):
            if getattr(self, name) != getattr(PPOConfig, name):
                raise UserError(
                    f"--{name} does nothing with --advantage {self.advantage}, which has no critic: "
                    "leave it out"
                )

    def _check_certificate(self) -> None:
        if self.stop_at_gap and not self.gap_steps:
            raise UserError("--stop_at_gap needs --gap_steps, which says how often to look")
        if self.reward_bound is not None and not self.gap_steps:
            raise UserError("--reward_bound is of the certificate: it needs --gap_steps")
        if not self.gap_steps:
            return
        if self.truncated:
            raise UserError(
                "--gap_steps certifies by samples of the whole policy: leave --top_k and --top_p out, or it"
            )
        if (self.welfare, self.objective) != ("egalitarian", "min_of_means"):
            raise UserError("--gap_steps certifies max-min: it needs --welfare egalitarian, min_of_means")
        if self.beta <= 0:
            raise UserError("--gap_steps needs --beta above 0: without a KL penalty there is no certificate")
        if self.certificate_samples < 4 or self.certificate_samples % 4 or self.certificate_prompts < 16:
            raise UserError("--certificate_samples must be a multiple of 4, --certificate_prompts 16 or more")
