"""The reward stage: preference pairs in, a reward mixture and the users' groups out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.clustering.unseen import left_out_text
from torchrl_maxmin.core.checkpoint import save_checkpoint, saved_state
from torchrl_maxmin.core.distributed import across_ranks, is_main_process, world_size
from torchrl_maxmin.core.errors import UnservedModelError, UserError
from torchrl_maxmin.core.json_text import plain
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.core.run import MetricsLog, resolve_device, seed_everything, write_json
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import is_encoder, load_tokenizer, require_trunk
from torchrl_maxmin.models.lora import require_adaptable
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.models.sequences import max_positions
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.chat import Text
from torchrl_maxmin.preferences.texts import TextEncoder, text_key
from torchrl_maxmin.rewards import Calibration, MixtureFit, RewardMixture, fit_mixture
from torchrl_maxmin.rewards.mixture_fit import held_pairs
from torchrl_maxmin.rewards.report import write_reward_report
from torchrl_maxmin.rewards.source import MixtureRewards, reference_rewards
from torchrl_maxmin.rewards.user_groups import write_groups
from torchrl_maxmin.stats.interval import SCHEMA_VERSION
from torchrl_maxmin.trainers.reward_config import RewardConfig

__all__ = ["RewardConfig", "run_reward", "user_accuracy"]

# Settings that fit_mixture takes under the same name.
_OPTIONS = (
    "use_true_groups",
    "num_rounds",
    "steps_per_round",
    "scoring_batch_size",
    "learning_rate",
    "head_learning_rate",
    "reward_l2",
    "weight_decay",
    "optim",
    "convergence_tolerance",
    "num_restarts",
    "warm_start_l2",
    "max_groups",
    "max_length",
    "identifiability",
    "seed",
)


@across_ranks
@stage("reward", inputs=("model_name_or_path", "dataset_name", "eval_dataset_name"), length="num_rounds")
def run_reward(config: RewardConfig) -> Path:
    """Fit a reward mixture and save it with what was learned about the users; returns its folder.

    The folder is a Hugging Face sequence classifier with K labels; beside it lie
    ``mixture.json`` (mixing weights and calibration), ``groups.csv`` (responsibilities by user,
    :func:`~torchrl_maxmin.rewards.user_groups.read_groups`), ``summary.json`` (figures),
    ``report.md`` and ``report.html``.

    Raises:
        UserError: before any work, for models, data or folders that cannot be used.
    """
    config.check()
    groups = config.groups()
    device = resolve_device(config.device)
    model_config = require_trunk(config.model_name_or_path)
    if config.use_peft:
        require_adaptable(model_config, config.lora_settings())
    data = config.load_pairs(config.dataset_name, config.model_name_or_path)
    if config.use_true_groups:
        if data.groups is None:
            raise UserError("--use_true_groups needs a group column in the data; name it with --group_column")
    else:
        data.require_users(groups or 2)
    if config.eval_dataset_name:
        heldout: PreferenceDataset | None = config.load_pairs(
            config.eval_dataset_name, config.model_name_or_path
        )
    else:
        data, heldout = data.split_heldout(config.heldout_fraction, config.seed)
    folder = Path(config.output_dir)
    saved = saved_state(config)
    seed_everything(config.seed)
    reference = None
    if config.calibration != "none" and not is_encoder(model_config):
        reference = _Reference(config, data, device)

    def save(state: dict[str, Any]) -> Path:
        return save_checkpoint(folder, len(state["history"]), state, config.save_total_limit or None)

    log: MetricsLog | None = None

    def on_round(state: dict[str, Any]) -> None:
        nonlocal log
        earlier, record = len(state["history"]) - 1, state["history"][-1]
        log = log or MetricsLog(folder, config.report_to, keep=earlier)
        names = {"loss": "loss/reward"}
        metrics = {names.get(name, name): value for name, value in record.items() if name != "round"}
        metrics["em/repaired_groups"] = len(record["em/repaired_groups"])
        log.write(earlier, metrics)
        if config.save_rounds and len(state["history"]) % config.save_rounds == 0:
            save(state)

    fit = fit_mixture(
        data,
        config.model_name_or_path,
        groups or "auto",
        config.assignment,
        heldout=heldout,
        batch_size=config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size(),
        micro_batch_size=config.per_device_train_batch_size,
        model_options=config.model_options(),
        feature_options=config.feature_options(),
        device=device,
        on_round=on_round,
        on_interruption=save,
        resume=saved,
        sharded=config.distributed == "fsdp2",
        **{name: getattr(config, name) for name in _OPTIONS},
    )
    fit.left_out["pairs"] = held_pairs(data, heldout, config.heldout_fraction, config.eval_dataset_name)
    figures = _figures(fit, data)
    if config.calibration != "none":
        raw = _pair_rewards(fit.model, data, config) if reference is None else reference.rewards(fit.model)
        try:
            dtype = next(fit.model.parameters()).dtype
            fit.model.calibration = Calibration.fit(raw, config.calibration, dtype=dtype)
        except (
            UserError
        ) as error:  # a head without a scale is still a head: keep what was trained, and say so
            figures["calibration_error"] = str(error)
    fit.model.save_pretrained(folder)
    if is_main_process():
        write_groups(folder / "groups.csv", list(fit.responsibilities), fit.responsibilities_matrix)
        write_reward_report(folder, plain(figures))
    write_json(folder / "summary.json", figures)
    return folder


class _Reference:
    """The policy whose samples put the heads on one scale: the trunk's own model.

    Args:
        config: of the stage.
        data: whose prompts are answered.
        device: where it samples.

    Raises:
        UserError: for a model that cannot be sampled from, and for data without a prompt.
    """

    def __init__(self, config: RewardConfig, data: PreferenceDataset, device: torch.device):
        self.config, self.device = config, device
        self.tokenizer = config.apply_chat(load_tokenizer(config.model_name_or_path))
        self.prompts = self._answerable_prompts(data)
        if not self.prompts:
            raise UserError(
                "no pair has a prompt, so there are no samples to calibrate on; give prompts, or "
                "--calibration none"
            )
        # found out now, before hours of training; its weights are loaded again when they are needed
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self.load()
        except UnservedModelError as error:  # it may well give rewards
            raise UserError(
                f"{error}; or train rewards without samples of it, by --calibration none"
            ) from error

    def _answerable_prompts(self, data: PreferenceDataset) -> list[Text]:
        """The first distinct prompts with a token."""
        encoder = TextEncoder(self.tokenizer)
        found: dict[str, Text] = {}
        for prompt in data.prompts:
            if len(found) == self.config.calibration_prompts:
                break
            if text_key(prompt) not in found and encoder.prompts([prompt], answerable=False)[0]:
                found[text_key(prompt)] = prompt
        return list(found.values())

    def load(self) -> TokenPolicy:
        """Load the policy."""
        return TokenPolicy.from_pretrained(
            self.config.model_name_or_path,
            self.tokenizer,
            max_new_tokens=self.config.response_length,
            generation_batch_size=self.config.generation_batch_size,
            stop_strings=self.config.stop_strings,
            device=self.device,
            **self.config.load_options(),
        )

    def rewards(self, mixture: RewardMixture) -> torch.Tensor:
        """Raw rewards [X, n, K] of the reference's samples."""
        config, reference = self.config, self.load()
        positions = max_positions(reference.model) or config.max_length
        longest = max(1, min(config.max_length, positions - config.response_length))
        with progress_bar("calibrating the heads", 1) as advance:
            raw = reference_rewards(
                reference,
                encode_prompts(self.tokenizer, self.prompts, longest),
                MixtureRewards(mixture, self.tokenizer, self.prompts, reference.ends),
                config.calibration_samples,
                config.scoring_batch_size,
            )
            advance()
        return raw


def _pair_rewards(mixture: RewardMixture, data: PreferenceDataset, config: RewardConfig) -> torch.Tensor:
    """Raw rewards [X, 2, K] of the pairs' own responses, for an encoder, which samples none."""
    rows = slice(0, config.calibration_prompts)
    prompts = data.prompts[rows]
    size = config.scoring_batch_size
    sides = (data.chosen[rows], data.rejected[rows])
    return torch.stack([mixture.score(prompts, side, batch_size=size) for side in sides], 1)


def _figures(fit: MixtureFit, data: PreferenceDataset) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "num_groups": fit.model.num_groups,
        "mixing_weights": fit.log_prior.exp().tolist(),
        "users": fit.responsibilities_matrix.argmax(-1).bincount(minlength=fit.model.num_groups).tolist(),
        "searched_users": fit.searched_users,
        "heldout": fit.heldout,
        "repeated_pairs": data.judgements.num_repeats,
        "restarts": None if fit.restarts is None else fit.restarts.to_dict(),
        "left_out": fit.left_out | {"report": left_out_text(fit.left_out)},
        "wants": fit.wants,
        "history": fit.history,
        "report": fit.report(),
    }
    if fit.choice is not None:
        figures["choice"] = fit.choice.to_dict()
    if fit.establishment is not None:
        figures["established"], figures["evidence"] = (
            fit.establishment.established,
            fit.establishment.to_dict(),
        )
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
