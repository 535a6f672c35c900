"""The model card of a policy that PPO trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchrl_maxmin.pages import model_card
from torchrl_maxmin.trainers.ppo_config import PPOConfig

__all__ = ["write_card"]

#: Settings that somebody who takes the policy may ask for.
_SETTINGS = (
    "objective",
    "welfare",
    "adversary",
    "calibration",
    "beta",
    "num_iterations",
    "rollout_batch_size",
    "learning_rate",
    "advantage",
    "seed",
)


def write_card(config: PPOConfig, group_weights: Sequence[float]) -> Path:
    """Write ``README.md`` of the policy's folder; results that an evaluation had added stay.

    Args:
        config: Of the stage.
        group_weights: Of the groups, when training ended.
    """
    folder, one = Path(config.output_dir), len(group_weights) == 1
    weights = "one reward for all" if one else ", ".join(f"{weight:.3f}" for weight in group_weights)
    data = Path(config.dataset_name)
    settings = {
        "base_model": config.model_name_or_path,
        "adapter": (folder / "adapter_config.json").is_file(),
        "title": "Policy trained on one reward for all"
        if one
        else "Policy trained for the group that is worst off",
        "data": data.name if data.exists() else config.dataset_name,
        "rows": {name: getattr(config, name) for name in _SETTINGS} | {"group weights at the end": weights},
    }
    return model_card(folder, settings)
