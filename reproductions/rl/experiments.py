"""What is trained: environments, settings and seeds, as configs of the policy stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

MILLION = 1_000_000

FRUIT_TREE: dict[str, Any] = {
    "env_id": "fruit-tree-v0",
    "num_envs": 512,
    "frames_per_batch": 512 * 6,
    "mini_batch_size": 512 * 3,
    "total_frames": MILLION,
}
FISHWOOD: dict[str, Any] = {
    "env_id": "fishwood-v0",
    "num_envs": 64,
    "frames_per_batch": 64 * 200,
    "mini_batch_size": 16 * 200,
    "gamma": 0.99,
    "tau": 0.1,
    "entropy_coeff": 0.0,
    "total_frames": MILLION,
}
GRIDWORLD: dict[str, Any] = {
    "env_id": "gridworld",
    "env_options": {"horizon": 12},
    "num_envs": 256,
    "frames_per_batch": 256 * 12,
    "mini_batch_size": 128 * 12,
    "total_frames": 400_000,
}
COSTS: dict[str, Any] = {"horizon": 12, "stay": True, "move_cost": 0.05}
MAJORITY: dict[str, Any] = {"welfare": "utilitarian", "shares": [1.0, 0.0]}
TEN_TO_ONE: dict[str, Any] = {"welfare": "utilitarian", "shares": [10.0, 1.0]}


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Attributes:
        name: of its folder and row.
        settings: of the policy stage.
        seeds: how many, from 0.
        plain: train by TorchRL's own ClipPPOLoss with LineariseRewards instead.
    """

    name: str
    settings: dict[str, Any]
    seeds: int = 5
    plain: bool = False

    def config(self, folder: Path, seed: int) -> EnvPPOConfig:
        """The settings of one seed."""
        return EnvPPOConfig(
            output_dir=str(folder / self.name / f"seed-{seed}"), seed=seed, device="cpu", **self.settings
        )


def depth(levels: int, **settings: Any) -> dict[str, Any]:
    """Fruit tree of this depth, the rollouts whole episodes."""
    steps = {"frames_per_batch": 512 * levels, "mini_batch_size": 256 * levels}
    return FRUIT_TREE | {"env_options": {"depth": levels}} | steps | settings


EXPERIMENTS = [
    Experiment("fruit-tree-6", depth(6)),
    Experiment("fruit-tree-6-linear", depth(6), plain=True),
    Experiment("fruit-tree-5", depth(5, total_frames=750_000)),
    Experiment("fruit-tree-5-linear", depth(5, total_frames=750_000), plain=True),
    Experiment("fruit-tree-7", depth(7)),
    Experiment("fruit-tree-7-mean-of-mins", depth(7, objective="mean_of_mins")),
    Experiment("fishwood", FISHWOOD),
    Experiment("fishwood-linear", FISHWOOD, plain=True),
    Experiment("gridworld", GRIDWORLD),
    Experiment("gridworld-majority", GRIDWORLD | MAJORITY),
    Experiment("gridworld-costs-10-1", GRIDWORLD | TEN_TO_ONE | {"env_options": COSTS}),
    Experiment("deliveries", GRIDWORLD | {"env_options": COSTS | {"once": True}}),
    Experiment("deliveries-10-1", GRIDWORLD | TEN_TO_ONE | {"env_options": COSTS | {"once": True}}),
    Experiment(
        "fishwood-gym",
        FISHWOOD
        | {
            "env_backend": "gym",
            "num_envs": 4,
            "frames_per_batch": 4 * 500,
            "mini_batch_size": 500,
            "total_frames": 50_000,
            "eval_episodes": 20,
        },
        seeds=1,
    ),
]


def smaller(experiment: Experiment, frames: int) -> Experiment:
    """The same with fewer steps, for a look whether all runs."""
    frames = max(frames, experiment.settings["frames_per_batch"])
    short = {"total_frames": frames, "eval_episodes": 4}
    return replace(experiment, settings=experiment.settings | short, seeds=1)
