"""The demo: a configuration of the ordinary stages on the embedded world."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from torchrl_maxmin.cli.stages import Task, run_tasks
from torchrl_maxmin.errors import UserError
from torchrl_maxmin.evaluation import SeedResult, rich_table, summarise, write_report, write_summary
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.preferences.world import World
from torchrl_maxmin.preferences.world_data import write_preferences, write_world
from torchrl_maxmin.progress import console
from torchrl_maxmin.trainers.ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.trainers.run import prepare_output_dir, read_metrics, resolve_device, write_config
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft

__all__ = ["DemoConfig", "run_demo"]

POLICIES = ("single", "maxmin", "oracle")


@dataclass
class DemoConfig:
    """People with two tastes, from their preferences to results by group.

    Args:
        output_dir: folder for everything; by default the first free one of runs/demo, runs/demo-2 ...
        world: 10:1 (a small minority, strong conflict) or 80:20 (milder).
        seeds: one whole run each.
        num_users: people who label pairs.
        pairs_per_user: pairs each labels for training.
        num_groups: groups K, or auto to let the likelihood of left-out users choose.
        policies: what is trained; single, maxmin, and oracle (MaxMin on the true utilities, a
            yardstick that sees what no user of the method has).
        num_workers: processes; 0 takes two on a CPU and one on a GPU.
        recipe: YAML with the stages' settings; the shipped one when left out.
        device: cpu, cuda or auto.
    """

    output_dir: str | None = None
    world: str = "10:1"
    seeds: list[int] = field(default_factory=lambda: [0])
    num_users: int = 300
    pairs_per_user: int = 20
    num_groups: str | int = "auto"
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    num_workers: int = 0
    recipe: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class _Prepare:
    folder: Path
    world: str
    seed: int
    num_users: int
    pairs_per_user: int
    sft: SFTConfig


def run_demo(config: DemoConfig) -> Path:
    """Run all seeds and write ``summary.json``, ``report.md`` and plots; returns the folder."""
    start = time.perf_counter()
    World.preset(config.world)
    unknown = [name for name in config.policies if name not in POLICIES]
    if unknown or not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(
            f"--policies knows {', '.join(POLICIES)}, not {unknown[0]!r}" if unknown else "--seeds takes distinct numbers"
        )
    if config.num_users < 2:
        raise UserError("--num_users must be at least 2: one user has no groups")
    device = resolve_device(config.device)
    recipe = _read_recipe(config.recipe)
    folder = prepare_output_dir(config.output_dir or _first_free(Path("runs/demo")))
    write_config(folder, config)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tasks: dict[str, Task] = {}
    for seed in config.seeds:
        tasks.update(_seed_tasks(config, recipe, folder, seed, str(device)))
    workers = config.num_workers or (1 if device.type == "cuda" else 2)
    seconds = run_tasks(tasks, workers)
    _write_results(config, folder, seconds, start)
    return folder


def _read_recipe(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return yaml.safe_load((files("torchrl_maxmin") / "cli/configs/demo.yaml").read_text())
    if not Path(path).is_file():
        raise UserError(f"no recipe file {path!r}")
    return yaml.safe_load(Path(path).read_text())


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _prepare(task: _Prepare) -> None:
    """The world's files, the reference policy, and people's preferences over its responses."""
    task.folder.mkdir(parents=True)
    write_world(task.folder, task.seed)
    run_sft(task.sft)
    world = World.preset(task.world)
    write_preferences(
        task.folder, world, task.sft.output_dir, task.seed, task.num_users, task.pairs_per_user, device=task.sft.device
    )


def _seed_tasks(
    config: DemoConfig, recipe: dict[str, dict[str, Any]], folder: Path, seed: int, device: str
) -> dict[str, Task]:
    home = folder / f"seed-{seed}"
    name = f"seed {seed}"
    common = {"seed": seed, "device": device}
    reference, world = str(home / "sft"), str(home / "world.json")

    def reward(kind: str, num_groups: int | str) -> RewardConfig:
        return RewardConfig(
            model_name_or_path=reference,
            dataset_name=str(home / "preferences.jsonl"),
            eval_dataset_name=str(home / "preferences_test.jsonl"),
            output_dir=str(home / f"reward_{kind}"),
            num_groups=num_groups,
            **common,
            **recipe["reward"],
        )

    def ppo(kind: str, **rewards: Any) -> PPOConfig:
        return PPOConfig(
            model_name_or_path=reference,
            dataset_name=str(home / "prompts.jsonl"),
            output_dir=str(home / kind),
            monitor_funcs=[world],
            **rewards,
            **common,
            **recipe["ppo"],
        )

    sft = SFTConfig(
        model_name_or_path=str(home / "base_model"),
        dataset_name=str(home / "sft.jsonl"),
        output_dir=reference,
        **common,
        **recipe["sft"],
    )
    prepared = _Prepare(home, config.world, seed, config.num_users, config.pairs_per_user, sft)
    tasks = {f"{name}/prepare": Task(_prepare, prepared)}
    ready = (f"{name}/prepare",)
    if "maxmin" in config.policies:
        tasks[f"{name}/reward_maxmin"] = Task(run_reward, reward("maxmin", config.num_groups), ready)
    if "single" in config.policies:
        tasks[f"{name}/reward_single"] = Task(run_reward, reward("single", 1), ready)
    for kind in config.policies:
        if kind == "oracle":
            tasks[f"{name}/oracle"] = Task(run_ppo, ppo("oracle", reward_funcs=[world]), ready)
        else:
            made = str(home / f"reward_{kind}")
            tasks[f"{name}/{kind}"] = Task(run_ppo, ppo(kind, reward_model_path=made), (f"{name}/reward_{kind}",))
    trained = {kind: str(home / kind) for kind in config.policies}
    evaluation = EvaluateConfig(
        policies=[f"{kind}={path}" for kind, path in {"sft": reference, **trained}.items()],
        dataset_name=str(home / "prompts_test.jsonl"),
        output_dir=str(home / "evaluation"),
        judge=world,
        reward_model_path=str(home / "reward_maxmin") if "maxmin" in config.policies else None,
        **common,
        **recipe["evaluate"],
    )
    tasks[f"{name}/evaluate"] = Task(measure_policies, evaluation, tuple(f"{name}/{kind}" for kind in config.policies))
    return tasks


def _write_results(config: DemoConfig, folder: Path, seconds: dict[str, float], start: float) -> None:
    results = []
    histories: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in config.policies}
    for seed in config.seeds:
        home = folder / f"seed-{seed}"
        result = SeedResult.load(home / "evaluation" / "result")
        timings = {name.split("/")[1]: s for name, s in seconds.items() if name.startswith(f"seed {seed}/")}
        result.extra["timings"] = timings
        results.append(result)
        start_from = result.utilities["sft"].mean((0, 1))
        for kind in config.policies:
            histories[kind].append([_true_utilities(row, start_from) for row in read_metrics(home / kind)])
    summary = summarise(results, wall_seconds=time.perf_counter() - start)
    write_summary(folder, summary)
    write_report(folder, summary, histories=histories)
    console.print(rich_table(summary))


def _true_utilities(row: dict[str, float], start_from: np.ndarray) -> dict[str, float]:
    """Metrics with the true utilities, less the reference's, where a policy logs its own rewards."""
    own = {name: value for name, value in row.items() if not name.startswith("rewards/")}
    truth = {f"rewards/{k}/mean": row[f"monitor/{k}/mean"] - mean for k, mean in enumerate(start_from)}
    return own | truth
