"""The reward stage: preference pairs in, a reward mixture and the users' groups out."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.modules.loading import load_tokenizer, require_model
from torchrl_maxmin.modules.sampling import encode_prompts
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards import Calibration, MixtureFit, RewardMixture, fit_mixture
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.source import MixtureRewards, reference_rewards
from torchrl_maxmin.trainers.run import (
    prepare_output_dir,
    resolve_device,
    seed_everything,
    write_config,
    write_json,
)

__all__ = ["RewardConfig", "run_reward", "user_accuracy"]


@dataclass
class RewardConfig:
    """A reward mixture learned from who preferred what.

    Args:
        model_name_or_path: causal language model that gives the trunk, usually what sft wrote.
        dataset_name: pairs; json, jsonl, csv or parquet file, saved dataset or hub name with columns
            prompt, chosen, rejected and a user.
        output_dir: folder for the reward model; must be empty or absent.
        eval_dataset_name: pairs of the same users that are only scored; by default a share of
            every user's pairs is held out.
        heldout_fraction: that share.
        user_column: column that says who chose; found by its usual names when left out.
        group_column: ground truth for evaluation, never for training; "group" where it exists.
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
        convergence_tolerance: stop when no user changed group and the log-likelihood a pair rose by less.
        calibration: scale that the heads are saved with, fitted on samples of model_name_or_path;
            sft_std, sft_mean, win_rate or none. The policy stage fits its own.
        calibration_prompts: prompts of the data that the samples answer.
        calibration_samples: samples a prompt.
        response_length: most tokens of a sample.
        max_length: longest text in tokens; longer ones lose their start.
        dataset_split: split of the pairs.
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
    convergence_tolerance: float = 1e-4
    calibration: str = "sft_std"
    calibration_prompts: int = 512
    calibration_samples: int = 2
    response_length: int = 53
    max_length: int = 1024
    dataset_split: str = "train"
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
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        if self.calibration not in CALIBRATIONS:
            raise UserError(f"--calibration {self.calibration!r} is none of {', '.join(CALIBRATIONS)}")
        if self.calibration == "sft_std" and self.calibration_samples < 2:
            raise UserError("--calibration sft_std needs --calibration_samples of at least 2")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError("--heldout_fraction must be at least 0 and below 1")


def run_reward(config: RewardConfig) -> Path:
    """Fit a reward mixture and save it with what was learned about the users; returns its folder.

    The folder is a Hugging Face sequence classifier with K labels; beside it lie
    ``mixture.json`` (mixing weights and calibration), ``groups.csv`` (responsibilities by user) and
    ``summary.json`` (figures).

    Raises:
        UserError: before any work, for models, data or folders that cannot be used.
    """
    config.check()
    groups = config.groups()
    device = resolve_device(config.device)
    require_model(config.model_name_or_path)
    data = PreferenceDataset.load(
        config.dataset_name, config.user_column, config.group_column, config.dataset_split
    )
    data.require_users(2 if groups == "auto" else int(groups))
    if config.eval_dataset_name:
        heldout: PreferenceDataset | None = PreferenceDataset.load(
            config.eval_dataset_name, config.user_column, config.group_column, config.dataset_split
        )
    else:
        data, heldout = data.split_heldout(config.heldout_fraction, config.seed)
    folder = prepare_output_dir(config.output_dir)
    seed_everything(config.seed)
    fit = fit_mixture(
        data,
        config.model_name_or_path,
        groups,
        config.assignment,
        heldout=heldout,
        num_rounds=config.num_rounds,
        steps_per_round=config.steps_per_round,
        batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        head_learning_rate=config.head_learning_rate,
        reward_l2=config.reward_l2,
        weight_decay=config.weight_decay,
        convergence_tolerance=config.convergence_tolerance,
        num_restarts=config.num_restarts,
        max_groups=config.max_groups,
        max_length=config.max_length,
        seed=config.seed,
        device=device,
    )
    figures = _figures(fit, data)
    try:
        fit.model.calibration = _calibrate(fit.model, data, config, device)
    except UserError as error:  # a head without a scale is still a head: keep what was trained, and say so
        figures["calibration_error"] = str(error)
    fit.model.save_pretrained(folder)
    _write_groups(folder / "groups.csv", fit)
    write_json(folder / "summary.json", figures)
    write_config(folder, config)
    return folder


def _calibrate(
    mixture: RewardMixture, data: PreferenceDataset, config: RewardConfig, device: torch.device
) -> Calibration:
    """Fit the heads' scale on samples of the model that the trunk came from."""
    tokenizer = load_tokenizer(config.model_name_or_path)
    reference = TokenPolicy.from_pretrained(
        config.model_name_or_path, tokenizer, max_new_tokens=config.response_length
    ).to(device)
    positions = getattr(reference.model.config, "max_position_embeddings", None) or config.max_length
    longest = max(1, min(config.max_length, positions - config.response_length))
    asked = [prompt for prompt in dict.fromkeys(data.prompts) if tokenizer(prompt).input_ids]
    if not asked:
        raise UserError("no pair has a prompt, so there is nothing to sample responses to")
    prompts = asked[: config.calibration_prompts]
    with progress_bar("calibrating the heads", 1) as advance:
        raw = reference_rewards(
            reference,
            encode_prompts(tokenizer, prompts, longest),
            MixtureRewards(mixture, tokenizer),
            config.calibration_samples,
        )
        advance()
    return Calibration.fit(raw, config.calibration)


def _write_groups(path: Path, fit: MixtureFit) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "group", *(f"responsibility_{k}" for k in range(fit.model.num_groups))])
        for user, row in fit.responsibilities.items():
            writer.writerow([user, int(np.argmax(row)), *(f"{value:.6g}" for value in row)])


def _figures(fit: MixtureFit, data: PreferenceDataset) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "num_groups": fit.model.num_groups,
        "mixing_weights": fit.log_prior.exp().tolist(),
        "users": fit.responsibilities_matrix.argmax(-1).bincount(minlength=fit.model.num_groups).tolist(),
        "heldout": fit.heldout,
        "history": fit.history,
        "report": fit.report(),
    }
    if fit.choice is not None:
        figures["choice"] = {
            "heldout_log_likelihood": fit.choice.heldout_log_likelihood,
            "standard_error": fit.choice.standard_error,
        }
    if data.groups is not None:
        accuracy, heads = user_accuracy(fit.responsibilities_matrix, data.groups)
        figures["user_accuracy"], figures["head_of_group"] = accuracy, heads
    return figures


def user_accuracy(responsibilities: torch.Tensor, groups: list[str]) -> tuple[float, dict[str, int]]:
    """Share of users put in the right group, balanced over true groups, under the best matching.

    Args:
        responsibilities: [U, K].
        groups: true group of every user.

    Returns:
        The balanced accuracy, and the head that was matched to each true group.
    """
    from scipy.optimize import linear_sum_assignment

    names = [name for name, _ in Counter(groups).most_common()]
    found = responsibilities.argmax(-1).numpy()
    truth = np.array([names.index(group) for group in groups])
    share = np.array(
        [
            [(found[truth == g] == k).mean() for k in range(responsibilities.shape[1])]
            for g in range(len(names))
        ]
    )
    rows, columns = linear_sum_assignment(-share)
    return float(share[rows, columns].sum() / len(names)), {
        names[g]: int(k) for g, k in zip(rows, columns, strict=True)
    }
