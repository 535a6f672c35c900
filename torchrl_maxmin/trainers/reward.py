"""The reward stage: preference pairs in, a reward mixture and the users' groups out."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules.language import TokenPolicy
from torchrl_maxmin.modules.loading import is_encoder, load_tokenizer, require_trunk
from torchrl_maxmin.modules.sampling import encode_prompts
from torchrl_maxmin.modules.trunks import max_positions
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards import Calibration, MixtureFit, RewardMixture, fit_mixture
from torchrl_maxmin.rewards.source import MixtureRewards, reference_rewards
from torchrl_maxmin.trainers.checkpoint import find_checkpoint, save_checkpoint
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.run import (
    prepare_output_dir,
    resolve_device,
    seed_everything,
    write_config,
    write_json,
)

__all__ = ["RewardConfig", "run_reward", "user_accuracy"]


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
    model_config = require_trunk(config.model_name_or_path)
    data = config.load_pairs(config.dataset_name)
    if config.use_true_groups:
        if data.groups is None:
            raise UserError("--use_true_groups needs a group column in the data; name it with --group_column")
    else:
        data.require_users(groups or 2)
    if config.eval_dataset_name:
        heldout: PreferenceDataset | None = config.load_pairs(config.eval_dataset_name)
    else:
        data, heldout = data.split_heldout(config.heldout_fraction, config.seed)
    folder = Path(config.output_dir)
    saved = None
    if config.resume_from_checkpoint:
        saved = find_checkpoint(folder, config.resume_from_checkpoint)
    else:
        prepare_output_dir(folder)
    if not is_encoder(model_config) and config.calibration != "none":
        _require_reference(config, device)
    seed_everything(config.seed)

    def on_round(state: dict[str, Any]) -> None:
        if config.save_rounds and len(state["history"]) % config.save_rounds == 0:
            save_checkpoint(folder, len(state["history"]), state)

    fit = fit_mixture(
        data,
        config.model_name_or_path,
        groups or "auto",
        config.assignment,
        heldout=heldout,
        use_true_groups=config.use_true_groups,
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
        model_options=config.model_options(),
        identifiability=config.identifiability,
        seed=config.seed,
        device=device,
        on_round=on_round,
        resume=saved,
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


def _load_reference(config: RewardConfig, tokenizer: Any, device: torch.device) -> TokenPolicy:
    return TokenPolicy.from_pretrained(
        config.model_name_or_path, tokenizer, max_new_tokens=config.response_length, device=device
    )


def _require_reference(config: RewardConfig, device: torch.device) -> None:
    """Raise :class:`UserError`, before anything is trained, where calibration could not sample afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _load_reference(config, load_tokenizer(config.model_name_or_path), device)


def _calibrate(
    mixture: RewardMixture, data: PreferenceDataset, config: RewardConfig, device: torch.device
) -> Calibration:
    """Fit the heads' scale on samples of the trunk's own model; an encoder samples none, so on the pairs'."""
    if config.calibration == "none":
        return Calibration.identity(mixture.num_groups)
    if is_encoder(mixture.model.config):
        rows = slice(0, config.calibration_prompts)
        prompts = data.prompts[rows]
        sides = [mixture.score(prompts, side[rows]) for side in (data.chosen, data.rejected)]
        return Calibration.fit(torch.stack(sides, 1), config.calibration)
    tokenizer = load_tokenizer(config.model_name_or_path)
    reference = _load_reference(config, tokenizer, device)
    positions = max_positions(reference.model) or config.max_length
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
    if fit.identifiability is not None:
        figures["identifiability"] = fit.identifiability.to_dict()
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
