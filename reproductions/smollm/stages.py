"""What is trained and measured: the ordinary stages, a configuration each, for every run of a recipe."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pairs import Labels, Pairs, Reference, label_pairs, make_reference, sample_pairs
from recipes import Recipe
from steps import Plan
from tastes import TASTES, judge_name

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import run_reward
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.sft import SFTConfig

__all__ = ["POLICIES", "Launch", "Ranked", "RecipePlan", "Run", "launch", "measure_ranking", "require_flags"]

#: policies and the groups that their rewards know of; training is not told how many there are
POLICIES: dict[str, int | str] = {"single": 1, "maxmin": "auto"}


def require_flags(config: type, flags: Mapping[str, Any], stage: str) -> None:
    """Raise :class:`UserError` for flags that a stage does not have."""
    unknown = sorted(flags.keys() - {item.name for item in fields(config)})
    if unknown:
        raise UserError(
            f"{stage} has no flag {', '.join(unknown)}; take it out of the recipe, or leave adapters away "
            "by --use_peft false"
        )


@dataclass(frozen=True)
class Launch:
    """A verb in processes of its own: see :func:`launch`."""

    command: tuple[str, ...]
    verb: str
    config: Any


def launch(task: Launch) -> None:
    """Run a verb by a command, with a config file that lies beside its output folder.

    Raises:
        UserError: where it ends otherwise than well.
    """
    folder = Path(task.config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(asdict(task.config), sort_keys=False))
    command = [*task.command, task.verb, "--config", str(path)]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}; what it said stands above")


#: stages that several GPUs share, and the verbs that run them
_VERBS = {run_reward: "reward", run_ppo: "ppo"}


@dataclass(frozen=True)
class Run:
    """One pair of tastes at one ratio with one seed.

    Attributes:
        tastes: their name.
        ratio: users of the majority for each of the minority.
        seed: of everything.
        folder: with ``labels``, ``reward_*``, policies, ``ranking`` and ``evaluation``.
        steps: its last steps; they wait for all others.
    """

    tastes: str
    ratio: float
    seed: int
    folder: Path
    steps: tuple[str, ...]


class RecipePlan:
    """The steps of a recipe.

    Args:
        plan: where they go.
        recipe: what is done.
        home: the recipe's folder.
        device: where models compute.

    Raises:
        UserError: for flags that a stage does not take.
    """

    def __init__(self, plan: Plan, recipe: Recipe, home: Path, device: str):
        self.plan, self.recipe, self.home, self.device = plan, recipe, home, device
        configs = {"reward": RewardConfig, "ppo": PPOConfig, "evaluate": EvaluateConfig, "sft": SFTConfig}
        for stage, config in configs.items():
            require_flags(config, recipe.flags(stage), stage)
        self.runs: list[Run] = []
        for seed in recipe.seeds:
            self._base(seed)
            self.runs += [
                self._run(seed, tastes, ratio) for tastes in recipe.tastes for ratio in recipe.ratios
            ]

    def _add(self, where: str, function: Any, config: Any, after: tuple[str, ...] = ()) -> str:
        if hasattr(config, "check"):
            config.check()
        if self.recipe.launch and function in _VERBS:
            function, config = (
                launch,
                Launch(tuple(shlex.split(self.recipe.launch)), _VERBS[function], config),
            )
        name = f"{self.recipe.name} {where}"
        return self.plan.add(name, function, config, self.home / where, after)

    # -- what all runs of a seed share ------------------------------------------------------------

    def _base(self, seed: int) -> None:
        """Prompts, reference and pairs."""
        recipe, folder = self.recipe, self.home / f"seed-{seed}/reference"
        sft = None
        if recipe.flags("sft"):
            sft = SFTConfig(
                recipe.model_name_or_path,
                str(folder / "sft.jsonl"),
                str(folder / "model"),
                seed=seed,
                device=self.device,
                **recipe.flags("sft"),
            )
            sft.check()
        reference = Reference(
            folder,
            recipe.kind,
            recipe.model_name_or_path,
            sft=sft,
            seed=seed,
            device=self.device,
            **recipe.flags("reference"),
        )
        made = self._add(f"seed-{seed}/reference", make_reference, reference)
        pairs = Pairs(
            self.home / f"seed-{seed}/pairs",
            folder / "prompts.jsonl",
            self._policy(seed),
            max(map(recipe.people.num_pairs, recipe.ratios)),
            recipe.flags("ppo")["response_length"],
            seed,
            self.device,
            reference.dtype,
        )
        self._add(f"seed-{seed}/pairs", sample_pairs, pairs, (made,))

    def _policy(self, seed: int) -> str:
        """The reference policy."""
        if self.recipe.flags("sft"):
            return str(self.home / f"seed-{seed}/reference/model")
        return self.recipe.model_name_or_path

    # -- one run ----------------------------------------------------------------------------------

    def _run(self, seed: int, tastes: str, ratio: float) -> Run:
        where = f"seed-{seed}/{tastes}-{ratio:g}-1"
        home, people = self.home / where, self.recipe.people
        labels = Labels(
            home / "labels",
            self.home / f"seed-{seed}/pairs",
            tastes,
            people.users(ratio),
            people.pairs_per_user,
            people.test_pairs_per_user,
            people.tau,
            seed,
            people.skip_ties,
        )
        base = f"{self.recipe.name} seed-{seed}/pairs"
        labelled = self._add(f"{where}/labels", label_pairs, labels, (base,))
        rewards = {name: self._reward(where, name, seed, labelled) for name in POLICIES}
        trained = tuple(self._ppo(where, name, tastes, seed, rewards[name]) for name in POLICIES)
        ranking = Ranked(
            home / "ranking", home / "labels/preferences_test.jsonl", home / "reward_single", tastes
        )
        ranked = self._add(f"{where}/ranking", measure_ranking, ranking, (rewards["single"],))
        return Run(tastes, ratio, seed, home, (ranked, self._evaluate(where, tastes, seed, trained)))

    def _common(self, seed: int, stage: str) -> dict[str, Any]:
        return {"seed": seed, "device": self.device, **self.recipe.flags(stage)}

    def _reward(self, where: str, name: str, seed: int, labelled: str) -> str:
        home = self.home / where
        config = RewardConfig(
            model_name_or_path=self._policy(seed),
            dataset_name=str(home / "labels/preferences.jsonl"),
            eval_dataset_name=str(home / "labels/preferences_test.jsonl"),
            output_dir=str(home / f"reward_{name}"),
            num_groups=POLICIES[name],
            identifiability=False,
            **self._common(seed, "reward"),
        )
        return self._add(f"{where}/reward_{name}", run_reward, config, (labelled,))

    def _ppo(self, where: str, name: str, tastes: str, seed: int, reward: str) -> str:
        home = self.home / where
        config = PPOConfig(
            model_name_or_path=self._policy(seed),
            dataset_name=str(self.home / f"seed-{seed}/reference/prompts.jsonl"),
            output_dir=str(home / name),
            reward_model_path=str(home / f"reward_{name}"),
            monitor_funcs=[judge_name(tastes)],
            **self._common(seed, "ppo"),
        )
        return self._add(f"{where}/{name}", run_ppo, config, (reward,))

    def _evaluate(self, where: str, tastes: str, seed: int, trained: tuple[str, ...]) -> str:
        policies = {"sft": self._policy(seed)} | {n: str(self.home / where / n) for n in POLICIES}
        judge = dict(self.recipe.judge) or {"judge": judge_name(tastes)}
        if self.recipe.judge:
            pair = TASTES[tastes]
            judge["judge_criteria"] = [
                f"{name}={words}" for name, words in zip(pair.names, pair.wants, strict=True)
            ]
        config = EvaluateConfig(
            policies=[f"{name}={folder}" for name, folder in policies.items()],
            dataset_name=str(self.home / f"seed-{seed}/reference/prompts_test.jsonl"),
            output_dir=str(self.home / where / "evaluation"),
            **judge,
            **self._common(seed, "evaluate"),
        )
        return self._add(f"{where}/evaluation", measure_policies, config, trained)


@dataclass(frozen=True)
class Ranked:
    """Held-out pairs as a reward ranks them: see :func:`measure_ranking`."""

    folder: Path
    pairs: Path
    reward: Path
    tastes: str


def measure_ranking(task: Ranked) -> None:
    """Write ``ranking.json``: by held-out pair whether the reward ranks it as its user did.

    ``right`` [P] is 1, 0, or one half for equal rewards; ``users`` [P] and ``groups`` [U] are numbers, groups
    in the order of the tastes.
    """
    data = PreferenceDataset.load(str(task.pairs), conversations="messages")
    reward = load_reward_model(str(task.reward))
    chosen, rejected = (
        reward.score(data.prompts, side)[:, 0].double().cpu().numpy() for side in (data.chosen, data.rejected)
    )
    names = TASTES[task.tastes].names
    ranking = {
        "right": (np.sign(chosen - rejected) / 2 + 0.5).tolist(),
        "users": data.row_users.tolist(),
        "groups": [names.index(group) for group in data.groups or []],
    }
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "ranking.json").write_text(json.dumps(ranking) + "\n")
