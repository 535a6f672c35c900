"""Settings of the reward stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.settings import ReportSettings
from torchrl_maxmin.models.settings import ModelSettings, check_stop_strings
from torchrl_maxmin.rewards.adapters import ADAPTERS
from torchrl_maxmin.rewards.base import HEADS
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE
from torchrl_maxmin.rewards.settings import MixtureSettings

__all__ = ["RewardConfig"]


@dataclass
class RewardConfig(ModelSettings, MixtureSettings, ReportSettings):
    """A reward mixture learned from who preferred what.

    Args:
        model_name_or_path: language model that gives the trunk, usually what sft wrote; an encoder
            (BERT, MiniLM ...) will do too.
        dataset_name: pairs; json, jsonl, csv or parquet file, saved dataset or hub name with columns
            prompt, chosen, rejected and a user.
        output_dir: folder for the reward model; must be empty or absent.
        eval_dataset_name: pairs of the same users that are only scored; by default a share of
            every user's pairs is held out.
        use_true_groups: train one head on each true group instead of finding groups: a yardstick.
        assignment: soft (EM) or hard (the paper).
        num_rounds: EM rounds at most.
        steps_per_round: optimizer steps a round.
        per_device_train_batch_size: pairs that are in memory with their gradients at once.
        gradient_accumulation_steps: batches of so many pairs that make an optimizer step.
        generation_batch_size: most responses sampled at once for the calibration.
        scoring_batch_size: texts that are scored at once where no gradient is wanted.
        learning_rate: peak learning rate of the trunk.
        head_learning_rate: peak learning rate of the heads.
        reward_l2: penalty on squared rewards.
        weight_decay: AdamW weight decay.
        num_restarts: random starts of the linear warm start; the best likelihood wins.
        warm_start_l2: penalty on its squared weights, in units of choices. A model with hundreds of features
            and more overfits some hundred pairs unless this is some tenths. K is chosen by a search of its
            own over penalties, as diagnose does.
        head: linear, mlp or low_rank (groups share a few features, for small minorities).
        head_rank: features of low_rank; as many as groups when left out.
        adapters: per_group (an adapter a group) or shared.
        identifiability: whether to report if these pairs tell the users apart.
        convergence_tolerance: stop when no user changed group and the log-likelihood a pair rose by less.
        calibration: scale that the heads are saved with, fitted on samples of model_name_or_path (on the
            pairs' own responses where that is an encoder); sft_std, sft_mean, win_rate or none. The
            policy stage fits its own.
        calibration_prompts: prompts of the data that the samples answer.
        calibration_samples: samples a prompt.
        response_length: most tokens of a sample.
        stop_strings: strings that end a sample, beside the end tokens.
        save_rounds: write a checkpoint every so many EM rounds; 0 writes none, but where Ctrl-C or SIGTERM
            ends the run.
        save_total_limit: checkpoints that stay, the latest ones; 0 keeps all.
        resume_from_checkpoint: go on with the run in output_dir, from its last checkpoint that is whole (or
            from the start where there is none) by last, or from the one whose folder is named.
    """

    model_name_or_path: str
    dataset_name: str
    output_dir: str
    eval_dataset_name: str | None = None
    use_true_groups: bool = False
    assignment: str = "soft"
    num_rounds: int = 4
    steps_per_round: int = 200
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    generation_batch_size: int = 512
    scoring_batch_size: int = SCORED_AT_ONCE
    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-4
    reward_l2: float = 1e-3
    weight_decay: float = 0.01
    num_restarts: int = 4
    warm_start_l2: float = 1e-4
    head: str = "linear"
    head_rank: int | None = None
    adapters: str = "per_group"
    identifiability: bool = True
    convergence_tolerance: float = 1e-4
    calibration: str = "sft_std"
    calibration_prompts: int = 512
    calibration_samples: int = 2
    response_length: int = 53
    stop_strings: list[str] = field(default_factory=list)
    save_rounds: int = 0
    save_total_limit: int = 0
    resume_from_checkpoint: str | None = None

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        super().check()
        self.check_model()
        self.check_report()
        check_stop_strings(self.stop_strings)
        self.require_at_least(
            1,
            "num_rounds", "steps_per_round", "per_device_train_batch_size", "gradient_accumulation_steps",
            "generation_batch_size", "scoring_batch_size", "num_restarts", "calibration_prompts",
            "calibration_samples", "response_length",
        )  # fmt: skip
        self.require_at_least(
            0,
            "learning_rate", "head_learning_rate", "reward_l2", "weight_decay", "convergence_tolerance",
            "save_rounds", "save_total_limit", "warm_start_l2",
        )  # fmt: skip
        self.require_known(
            assignment=("soft", "hard"),
            head=tuple(HEADS),
            adapters=tuple(ADAPTERS),
            calibration=tuple(CALIBRATIONS),
        )
        if self.head_rank is not None and (self.head != "low_rank" or self.head_rank < 1):
            raise UserError("--head_rank is a positive number that goes with --head low_rank")
        if self.adapters != type(self).adapters and not self.use_peft:
            raise UserError("--adapters goes with --use_peft")
        if self.calibration == "sft_std" and self.calibration_samples < 2:
            raise UserError("--calibration sft_std needs --calibration_samples of at least 2")

    def model_options(self) -> dict[str, Any]:
        """Arguments of :meth:`~torchrl_maxmin.rewards.RewardMixture.from_backbone`."""
        options: dict[str, Any] = {"head": self.head, "rank": self.head_rank}
        options |= self.reading_options() | self.load_options()
        options |= {"autocast": self.bf16, "gradient_checkpointing": self.gradient_checkpointing}
        if self.use_peft:
            lora = ("adapters", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            options |= {"use_peft": True, **{name: getattr(self, name) for name in lora}}
        return options
