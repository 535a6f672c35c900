"""What benchmarks of rollouts share: the embedded world, the figure of a run, an interval over seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import ttest_1samp, ttest_ind
from transformers import GPT2LMHeadModel

from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import build_config, write_preferences, write_world


def prepare(folder: Path, steps: int, **shape: Any) -> dict[str, Any]:
    """Write the world and its reference policy; returns settings as the demo's.

    Args:
        folder: where to.
        steps: of the reference's tuning.
        **shape: fields of the base model's config, in place of the world's own.
    """
    write_world(folder, 0, num_texts=16_000, num_prompts=4_000, num_test_prompts=10)
    base, reference = str(folder / "base_model"), str(folder / "sft")
    if shape:
        config = build_config()
        config.update(shape)
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(base)
    sft = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "max_length": 64}
    run_sft(SFTConfig(base, str(folder / "sft.jsonl"), output_dir=reference, device="cpu", seed=0, **sft))
    write_preferences(folder, World.preset("10:1"), reference, 0, 20, 5, 1, device="cpu")
    return {
        "model_name_or_path": reference,
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": [str(folder / "world.json")],
        "rollout_batch_size": 192,
        "mini_batch_size": 96,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "beta": 0.02,
        "tau": 0.5,
        "response_length": 24,
        "max_prompt_length": 16,
        "device": "cpu",
    }


def curve_of(output: str | Path) -> dict[str, Any]:
    """The worst group's reward of a run by iteration, and its mean over the last quarter of them."""
    welfare = [row["objective/welfare"] for row in read_metrics(output)]
    last = welfare[-max(len(welfare) // 4, 1) :]
    return {"welfare": statistics.mean(last), "curve": [round(value, 4) for value in welfare]}


def difference_interval(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The mean of values less that of others drawn apart from them, with Welch's 95% interval."""
    low, high = ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    return {"mean": statistics.mean(values) - statistics.mean(others), "low": float(low), "high": float(high)}


def t_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over seeds with its 95% t interval; its ends are null for one value."""
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95) if len(values) > 1 else (None, None)
    ends = {name: None if end is None else float(end) for name, end in (("low", low), ("high", high))}
    return {"mean": statistics.mean(values), **ends}
