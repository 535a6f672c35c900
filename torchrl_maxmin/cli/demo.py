"""The demo: a configuration of the ordinary stages on the embedded world."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from torchrl_maxmin.cli.parsing import config_from_mapping
from torchrl_maxmin.cli.tools import training_histories
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import resolve_device, write_config
from torchrl_maxmin.core.run_folder import continued, how_to_go_on, is_unfinished, stage
from torchrl_maxmin.core.settings import ReportSettings
from torchrl_maxmin.core.tasks import Task, run_tasks
from torchrl_maxmin.evaluation import SeedResult, rich_table, summarise, write_report, write_summary
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.evaluation.report import write_cards
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import run_reward
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import write_preferences, write_world

__all__ = ["DemoConfig", "run_demo"]

#: marks what comes before the reward models as whole
_PREPARED = ".prepared"
POLICIES = ("single", "maxmin", "oracle")


@dataclass
class DemoConfig(ReportSettings):
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
        recipe: YAML with the sections world, sft, reward, ppo and evaluate, each with flags of its stage;
            what it leaves out is as shipped.
        resume_from_checkpoint: last goes on with the demo in output_dir; what is finished stays.
        device: cpu, cuda or auto.
    """

    output_dir: str | None = None
    world: str = "10:1"
    seeds: list[int] = field(default_factory=lambda: [0])
    num_users: int = 300
    pairs_per_user: int = 20
    num_groups: int | str = "auto"
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    num_workers: int = 0
    recipe: str | None = None
    resume_from_checkpoint: str | None = None
    device: str = "auto"

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        World.preset(self.world)
        self.check_report()
        if self.resume_from_checkpoint and not (self.resume_from_checkpoint == "last" and self.output_dir):
            raise UserError("--resume_from_checkpoint of the demo is last, of the run in --output_dir")
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown:
            raise UserError(f"--policies knows {', '.join(POLICIES)}, not {unknown[0]!r}")
        if len(set(self.policies)) < len(self.policies):
            raise UserError("--policies names one twice")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError("--seeds takes one or more distinct numbers, none below 0")
        if self.num_users < 2:
            raise UserError("--num_users must be at least 2: one user has no groups")
        if self.pairs_per_user < 1:
            raise UserError("--pairs_per_user must be at least 1")
        if self.num_workers < 0:
            raise UserError("--num_workers must be at least 0")
        if str(self.num_groups).isdigit() and int(self.num_groups) > self.num_users:
            raise UserError(
                f"--num_groups {self.num_groups} is more than --num_users {self.num_users}; "
                f"give at most {self.num_users}"
            )
        missing = [name for name in ("transformers", "datasets") if find_spec(name) is None]
        if missing:
            raise UserError(f"the demo needs {missing[0]}: pip install 'torchrl-maxmin[llm]'")


@dataclass
class WorldSizes:
    """Size of the embedded world that a demo writes; the section ``world`` of a recipe.

    Args:
        num_texts: reviews that the reference policy is fine-tuned on.
        num_prompts: prompts of preferences and of PPO.
        num_test_prompts: held-out prompts of the evaluation, the same for every seed.
        test_pairs_per_user: pairs a user that the reward model is only scored on.
    """

    num_texts: int = 16_000
    num_prompts: int = 4_000
    num_test_prompts: int = 512
    test_pairs_per_user: int = 5

    def check(self) -> None:
        """Raise :class:`UserError` for an empty world."""
        if min(self.num_texts, self.num_prompts, self.num_test_prompts, self.test_pairs_per_user) < 1:
            raise UserError("recipe, section world: every size must be at least 1")


@dataclass(frozen=True)
class _Prepare:
    folder: Path
    world: str
    seed: int
    num_users: int
    pairs_per_user: int
    sizes: WorldSizes
    sft: SFTConfig


def run_demo(config: DemoConfig) -> Path:
    """Run all seeds and write ``summary.json``, ``report.md``, ``report.html`` and plots; returns the folder.

    Raises:
        UserError: before any work, for settings, a recipe or a folder that cannot be used.
    """
    config.check()
    folder = config.output_dir or str(_first_free(Path("runs/demo")))
    return _run(replace(config, output_dir=folder))


@stage("demo", may_change=("num_workers", "recipe"))  # the stages compare what it sets
def _run(config: DemoConfig) -> Path:
    start = time.perf_counter()
    device = resolve_device(config.device)
    recipe = _read_recipe(config.recipe)
    folder = Path(str(config.output_dir))
    tasks: dict[str, Task] = {}
    for seed in config.seeds:
        tasks.update(_seed_tasks(config, recipe, folder, seed, str(device)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    write_config(folder, replace(config, recipe=str(folder / "recipe.yaml")))
    seconds = run_tasks(tasks, config.num_workers or (1 if device.type == "cuda" else 2))
    results = [SeedResult.load(folder / f"seed-{seed}" / "evaluation" / "result") for seed in config.seeds]
    for result in results:
        own = f"seed {result.seed}/"
        timings = {name.removeprefix(own): s for name, s in seconds.items() if name.startswith(own)}
        result.extra["timings"] = timings
    summary = summarise(results, wall_seconds=time.perf_counter() - start)
    write_report(folder, summary, histories=training_histories(folder, summary))
    for seed in config.seeds:
        write_cards({kind: str(folder / f"seed-{seed}" / kind) for kind in config.policies}, summary)
    write_summary(folder, summary)
    console.print(rich_table(summary))
    return folder


def _read_recipe(path: str | None) -> dict[str, dict[str, Any]]:
    """Read the shipped recipe, and what the one at ``path`` sets otherwise."""
    shipped = yaml.safe_load((files("torchrl_maxmin") / "cli/configs/demo.yaml").read_text())
    if path is None:
        return shipped
    if not Path(path).is_file():
        raise UserError(f"no recipe file {path!r}")
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is no YAML: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(section, dict) for section in given.values()):
        raise UserError(f"recipe {path} must hold sections ({', '.join(shipped)}) of key: value lines")
    unknown = [str(name) for name in given if name not in shipped]
    if unknown:
        raise UserError(f"recipe {path} has a section {unknown[0]!r}; it may have {', '.join(shipped)}")
    return {name: {**section, **given.get(name, {})} for name, section in shipped.items()}


def _stage_config(config_class: type, recipe: dict[str, dict[str, Any]], section: str, **fixed: Any) -> Any:
    """Build a stage's config from its section of the recipe and what the demo itself sets."""
    taken = [name for name in recipe[section] if name in fixed]
    if taken:
        raise UserError(f"recipe, section {section}: {taken[0]!r} is set by the demo; remove it")
    return config_from_mapping(config_class, {**recipe[section], **fixed}, f"recipe, section {section}")


def _first_free(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        if is_unfinished(candidate):
            console.print(f"{candidate} holds a demo that was broken off; {how_to_go_on(candidate, 'demo')}")
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _prepare(task: _Prepare) -> None:
    """Write the world's files, the reference policy, and people's preferences over its responses."""
    task.folder.mkdir(parents=True, exist_ok=True)
    if (task.folder / _PREPARED).is_file():
        return
    sizes = task.sizes
    write_world(task.folder, task.seed, sizes.num_texts, sizes.num_prompts, sizes.num_test_prompts)
    _go_on(run_sft, task.sft)
    counts = task.num_users, task.pairs_per_user, sizes.test_pairs_per_user
    world, policy = World.preset(task.world), task.sft.output_dir
    write_preferences(task.folder, world, policy, task.seed, *counts, device=task.sft.device)
    (task.folder / _PREPARED).touch()


def _go_on(function: Callable[[Any], Path], config: Any) -> Path:
    """Run a stage, from where it was broken off if it was."""
    if continued(Path(config.output_dir)):
        config = replace(config, resume_from_checkpoint="last")
    return function(config)


def _seed_tasks(
    config: DemoConfig, recipe: dict[str, dict[str, Any]], folder: Path, seed: int, device: str
) -> dict[str, Task]:
    home, name = folder / f"seed-{seed}", f"seed {seed}"
    reference, world = str(home / "sft"), str(home / "world.json")

    def settings_of(config_class: type, section: str, output: str, dataset: str, **fixed: Any) -> Any:
        fixed |= {"output_dir": str(home / output), "dataset_name": str(home / dataset)}
        if config.report_to and issubclass(config_class, ReportSettings):  # what trains
            fixed["report_to"] = config.report_to
        settings = _stage_config(config_class, recipe, section, seed=seed, device=device, **fixed)
        settings.check()
        return settings

    def task(function: Callable[[Any], Path], settings: Any, after: tuple[str, ...]) -> Task:
        return Task(partial(_go_on, function), settings, after)

    def reward(kind: str, num_groups: int | str) -> RewardConfig:
        fixed = {"eval_dataset_name": str(home / "preferences_test.jsonl"), "num_groups": num_groups}
        fixed |= {"model_name_or_path": reference, "feature_cache": False}  # no run meets this model again
        return settings_of(RewardConfig, "reward", f"reward_{kind}", "preferences.jsonl", **fixed)

    def ppo(kind: str, **rewards: Any) -> PPOConfig:
        fixed = {"model_name_or_path": reference, "monitor_funcs": [world], **rewards}
        return settings_of(PPOConfig, "ppo", kind, "prompts.jsonl", **fixed)

    sft = settings_of(SFTConfig, "sft", "sft", "sft.jsonl", model_name_or_path=str(home / "base_model"))
    sizes = _stage_config(WorldSizes, recipe, "world")
    sizes.check()
    prepared = _Prepare(home, config.world, seed, config.num_users, config.pairs_per_user, sizes, sft)
    tasks = {f"{name}/prepare": Task(_prepare, prepared)}
    ready = (f"{name}/prepare",)
    if "maxmin" in config.policies:
        tasks[f"{name}/reward_maxmin"] = task(run_reward, reward("maxmin", config.num_groups), ready)
    if "single" in config.policies:
        tasks[f"{name}/reward_single"] = task(run_reward, reward("single", 1), ready)
    for kind in config.policies:
        if kind == "oracle":
            tasks[f"{name}/oracle"] = task(run_ppo, ppo("oracle", reward_funcs=[world]), ready)
        else:
            trained = ppo(kind, reward_model_path=str(home / f"reward_{kind}"))
            tasks[f"{name}/{kind}"] = task(run_ppo, trained, (f"{name}/reward_{kind}",))
    paths = {"sft": reference, **{kind: str(home / kind) for kind in config.policies}}
    evaluation = settings_of(
        EvaluateConfig,
        "evaluate",
        "evaluation",
        "prompts_test.jsonl",
        policies=[f"{kind}={path}" for kind, path in paths.items()],
        judge=world,
        reward_model_path=str(home / "reward_maxmin") if "maxmin" in config.policies else None,
    )
    needed = ready + tuple(f"{name}/{kind}" for kind in config.policies)
    tasks[f"{name}/evaluate"] = task(measure_policies, evaluation, needed)
    return tasks
