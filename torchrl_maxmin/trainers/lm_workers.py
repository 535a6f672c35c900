"""Workers that sample a language model's rollouts: how each makes the policy that the trainer has."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchrl_maxmin.core.run import seed_everything
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.making import make_sampler
from torchrl_maxmin.rollouts.language_workers import LanguageSampler
from torchrl_maxmin.rollouts.ray_workers import RayWorkers
from torchrl_maxmin.trainers.ppo_config import PPOConfig

__all__ = ["load_reference", "make_language_sampler", "start_workers"]


def load_reference(config: PPOConfig, tokenizer: Any, device: torch.device | str) -> TokenPolicy:
    """Load the policy that a run starts from, alike in every process: a new pad token's row is random.

    Raises:
        UserError: for a model that cannot be had or served.
    """
    seed_everything(config.seed)
    return TokenPolicy.from_pretrained(
        config.model_name_or_path,
        tokenizer,
        max_new_tokens=config.response_length,
        device=device,
        **config.sampling_options(),
        **config.load_options(),
    )


def make_language_sampler(config: PPOConfig) -> LanguageSampler:
    """Make what a worker runs, in its process."""
    tokenizer = config.apply_chat(load_tokenizer(config.model_name_or_path))
    policy = load_reference(config, tokenizer, "cuda" if config.rollout_worker_gpus else "cpu")
    return LanguageSampler(make_sampler(config, policy, tokenizer))


def start_workers(config: PPOConfig) -> RayWorkers | None:
    """Start the workers that ``--rollout_workers`` asks for; None where it asks for none."""
    if not config.rollout_workers:
        return None
    path = Path(config.model_name_or_path)
    if path.is_dir():  # a worker may be in another folder
        config = replace(config, model_name_or_path=str(path.resolve()))
    make = partial(make_language_sampler, config)
    return RayWorkers([make] * config.rollout_workers, gpus=config.rollout_worker_gpus)
