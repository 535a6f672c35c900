"""Settings of the reward stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards.adapters import ADAPTERS
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.heads import HEADS
from torchrl_maxmin.rewards.layouts import LAYOUTS
from torchrl_maxmin.rewards.reader import POOLINGS

__all__ = ["RewardConfig"]


@dataclass
class RewardConfig:
    """A reward mixture learned from who preferred what.

    Args:
        model_name_or_path: language model that gives the trunk, usually what sft wrote; an encoder
            (BERT, MiniLM ...) will do too.
        dataset_name: pairs; json, jsonl, csv or parquet file, saved dataset or hub name with columns
            prompt, chosen, rejected and a user.
        output_dir: folder for the reward model; must be empty or absent.
        eval_dataset_name: pairs of the same users that are only scored; by default a share of
            every user's pairs is held out.
        heldout_fraction: that share.
        user_column: column that says who chose, or column.field; found by its usual names when left
            out; none makes every row a user.
        group_column: ground truth for evaluation, never for training; "group" where it exists.
        layout: how the rows hold pairs; told from the columns when left out (see data check).
        ties: drop, or halve: keep a tie as both orders, each counted one half.
        tie_margin: scores that differ by no more than this tie.
        max_pairs: pairs at most that one user's scores of one prompt make.
        use_true_groups: train one head on each true group instead of finding groups: a yardstick.
        num_groups: groups K, or auto to choose; 1 is single-reward RLHF.
        max_groups: largest K that auto tries.
        assignment: soft (EM) or hard (the paper).
        num_rounds: EM rounds at most.
        steps_per_round: optimizer steps a round.
        per_device_train_batch_size: pairs a step.
        learning_rate: peak learning rate of the trunk.
        head_learning_rate: peak learning rate of the heads.
        reward_l2: penalty on squared rewards.
        weight_decay: AdamW weight decay.
        num_restarts: random starts of the linear warm start; the best likelihood wins.
        head: linear, mlp or low_rank (groups share a few features, for small minorities).
        head_rank: features of low_rank; as many as groups when left out.
        use_peft: freeze the trunk and train LoRA adapters on it.
        adapters: per_group (an adapter a group) or shared.
        lora_r: rank of the adapters.
        lora_alpha: scale of the adapters.
        lora_dropout: dropout on the adapters' inputs.
        lora_target_modules: layers that get adapters; peft's choice when left out.
        pooling: where the trunk is read: last, mean or cls token; what suits the trunk when left out.
        text_layout: how prompt and completion become one text: continuation, chat, concat, text_pair,
            response, or a template with {prompt} and {completion}; what suits the trunk when left out.
        identifiability: whether to report if these pairs tell the users apart.
        convergence_tolerance: stop when no user changed group and the log-likelihood a pair rose by less.
        calibration: scale that the heads are saved with, fitted on samples of model_name_or_path (on the
            pairs' own responses where that is an encoder); sft_std, sft_mean, win_rate or none. The
            policy stage fits its own.
        calibration_prompts: prompts of the data that the samples answer.
        calibration_samples: samples a prompt.
        response_length: most tokens of a sample.
        max_length: longest text in tokens; longer ones lose their start.
        dataset_split: split of the pairs.
        save_rounds: write a checkpoint every so many EM rounds; 0 writes none.
        resume_from_checkpoint: checkpoint folder of output_dir, or last.
        seed: seed of everything random.
        device: cpu, cuda or auto.
    """

    model_name_or_path: str
    dataset_name: str
    output_dir: str
    eval_dataset_name: str | None = None
    heldout_fraction: float = 0.1
    user_column: str | None = None
    group_column: str | None = None
    layout: str | None = None
    ties: str = "drop"
    tie_margin: float = 0.0
    max_pairs: int = 64
    use_true_groups: bool = False
    num_groups: int | str = "auto"
    max_groups: int = 3
    assignment: str = "soft"
    num_rounds: int = 4
    steps_per_round: int = 200
    per_device_train_batch_size: int = 16
    learning_rate: float = 1e-5
    head_learning_rate: float = 1e-4
    reward_l2: float = 1e-3
    weight_decay: float = 0.01
    num_restarts: int = 4
    head: str = "linear"
    head_rank: int | None = None
    use_peft: bool = False
    adapters: str = "per_group"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    pooling: str | None = None
    text_layout: str | None = None
    identifiability: bool = True
    convergence_tolerance: float = 1e-4
    calibration: str = "sft_std"
    calibration_prompts: int = 512
    calibration_samples: int = 2
    response_length: int = 53
    max_length: int = 1024
    dataset_split: str = "train"
    save_rounds: int = 0
    resume_from_checkpoint: str | None = None
    seed: int = 0
    device: str = "auto"

    def groups(self) -> int | str:
        """``num_groups`` as a number, or ``"auto"``; raises :class:`UserError` for anything else."""
        if str(self.num_groups) == "auto":
            return "auto"
        if not str(self.num_groups).isdigit() or int(self.num_groups) < 1:
            raise UserError(f"--num_groups is a positive number or auto, not {self.num_groups!r}")
        return int(self.num_groups)

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        self.groups()
        if self.assignment not in ("soft", "hard"):
            raise UserError(f"--assignment {self.assignment!r} is none of soft, hard")
        for name in (
            "max_groups",
            "num_rounds",
            "steps_per_round",
            "per_device_train_batch_size",
            "num_restarts",
            "max_length",
            "calibration_prompts",
            "calibration_samples",
            "response_length",
            "lora_r",
            "max_pairs",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        if self.ties not in ("drop", "halve"):
            raise UserError(f"--ties {self.ties!r} is none of drop, halve")
        if self.head not in HEADS:
            raise UserError(f"--head {self.head!r} is none of {', '.join(HEADS)}")
        if self.head_rank is not None and (self.head != "low_rank" or self.head_rank < 1):
            raise UserError("--head_rank is a positive number that goes with --head low_rank")
        if self.pooling not in (None, *POOLINGS):
            raise UserError(f"--pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")
        if self.text_layout and self.text_layout not in LAYOUTS and "{completion}" not in self.text_layout:
            raise UserError(
                f"--text_layout {self.text_layout!r} is none of {', '.join(LAYOUTS)}, "
                "and no template with {completion} in it"
            )
        if self.adapters not in ADAPTERS:
            raise UserError(f"--adapters {self.adapters!r} is none of {', '.join(ADAPTERS)}")
        if self.save_rounds < 0:
            raise UserError("--save_rounds must be at least 0")
        if self.calibration not in CALIBRATIONS:
            raise UserError(f"--calibration {self.calibration!r} is none of {', '.join(CALIBRATIONS)}")
        if self.calibration == "sft_std" and self.calibration_samples < 2:
            raise UserError("--calibration sft_std needs --calibration_samples of at least 2")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError("--heldout_fraction must be at least 0 and below 1")

    def load_pairs(self, name: str) -> PreferenceDataset:
        """Load pairs as these settings say."""
        return PreferenceDataset.load(
            name,
            self.user_column,
            self.group_column,
            self.dataset_split,
            layout=self.layout,
            ties=self.ties,
            tie_margin=self.tie_margin,
            max_pairs=self.max_pairs,
        )

    def model_options(self) -> dict[str, Any]:
        """What :meth:`~torchrl_maxmin.rewards.RewardMixture.from_backbone` takes."""
        options: dict[str, Any] = {"head": self.head, "rank": self.head_rank}
        options |= {"pooling": self.pooling, "layout": self.text_layout}
        if self.use_peft:
            lora = ("adapters", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            options |= {"use_peft": True, **{name: getattr(self, name) for name in lora}}
        return options
