"""Recipes: an experiment as a YAML file, flags of the stages by section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from tastes import TASTES

from torchrl_maxmin.core.errors import UserError

__all__ = ["KINDS", "STAGES", "People", "Recipe", "load_recipe", "shrink"]

#: prompts of an experiment: openings of reviews as strings, or instructions as messages
KINDS = ("film", "chat")
STAGES = ("reference", "sft", "reward", "ppo", "evaluate")


@dataclass(frozen=True)
class People:
    """Who labels how much.

    Attributes:
        majority_users: users of the majority at every ratio; the minority has so many less.
        pairs_per_user, test_pairs_per_user: of everyone, to train on and held out.
        tau: inverse noise of Bradley-Terry labels; None for users without noise.
        skip_ties: whether nobody labels two answers that are worth the same to them; else a coin does.
    """

    majority_users: int = 40
    pairs_per_user: int = 16
    test_pairs_per_user: int = 8
    tau: float | None = None
    skip_ties: bool = False

    def users(self, ratio: float) -> tuple[int, int]:
        """Users of the majority and of the minority at a ratio of so many to one."""
        return self.majority_users, max(1, round(self.majority_users / ratio))

    def num_pairs(self, ratio: float) -> int:
        """Pairs that are labelled at a ratio."""
        return sum(self.users(ratio)) * (self.pairs_per_user + self.test_pairs_per_user)


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        name: of its folder, its CSV and its section of the results.
        title: that section's.
        kind: one of :data:`KINDS`.
        tastes: names of pairs of tastes, a run each.
        ratios: users of the majority for each of the minority, a run each.
        seeds: of everything, a run each.
        model_name_or_path: the base model; one that is not there is made of PyPI's package.
        people: who labels.
        stages: flags by one of :data:`STAGES`; an empty ``sft`` keeps the base model as the reference.
        use_peft: train adapters in ``reward`` and ``ppo``, with the flags that ``lora`` adds to theirs.
        lora: these flags by stage.
        judge: of the answers, flags of ``evaluate``; empty for the tastes themselves.
        launch: command that ``reward`` and ``ppo`` run by, such as torchrun with ``-m torchrl_maxmin``; verb
            and ``--config`` are put behind it. Empty runs them in the step's own process.
    """

    name: str
    title: str
    kind: str
    tastes: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    model_name_or_path: str = "runs/smollm2"
    people: People = People()
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use_peft: bool = True
    lora: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is none of {', '.join(KINDS)}")
        if unknown := [name for name in self.tastes if name not in TASTES]:
            raise UserError(f"tastes {unknown[0]!r} are none of {', '.join(TASTES)}")
        if not (self.tastes and self.ratios and self.seeds) or min(self.ratios) < 1:
            raise UserError("a recipe needs tastes, seeds, and ratios of 1 and more")

    def flags(self, stage: str) -> dict[str, Any]:
        """Flags of a stage, those of its adapters among them."""
        adapters = self.lora.get(stage, {}) if self.use_peft else {}
        return {**self.stages.get(stage, {}), **adapters}

    def with_parts(self, **parts: Any) -> Recipe:
        """The same with fewer (or other) tastes, ratios or seeds; None leaves them."""
        return replace(self, **{name: tuple(value) for name, value in parts.items() if value is not None})


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; its name is the file's.

    Raises:
        UserError: for a file that is none, and for keys that no recipe has.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"no recipe {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no recipe: a recipe is a table of keys")
    known = {item.name for item in fields(Recipe)} - {"name", "stages"}
    if unknown := found.keys() - known - set(STAGES):
        raise UserError(f"{path}: {', '.join(sorted(unknown))} is no key of a recipe")
    stages = {name: found.pop(name) or {} for name in STAGES if name in found}
    try:
        people = People(**found.pop("people", {}))
        for name in ("tastes", "ratios", "seeds"):
            if name in found:
                found[name] = tuple(found[name])
        return Recipe(path.stem, people=people, stages=stages, **found)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from error


#: what a trial run has of everything, over a recipe's own
_SMOKE: dict[str, dict[str, Any]] = {
    "reference": {"num_prompts": 8, "num_test_prompts": 3, "num_samples": 8, "max_new_tokens": 16},
    "sft": {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    "reward": {
        "num_rounds": 1, "steps_per_round": 1, "per_device_train_batch_size": 2, "num_restarts": 1,
        "gradient_accumulation_steps": 1, "calibration_prompts": 4, "response_length": 6,
    },
    "ppo": {
        "num_iterations": 1, "rollout_batch_size": 4, "mini_batch_size": 4, "num_ppo_epochs": 1,
        "calibration_prompts": 4, "response_length": 6, "warmup_iterations": 0, "num_generations": 2,
    },
    "evaluate": {"num_samples": 2, "response_length": 6},
}  # fmt: skip


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe on next to nothing: every kind of step, of one pair of tastes at its last ratio."""
    stages = {
        stage: {**flags, **_SMOKE[stage]} if flags else {}
        for stage, flags in ((name, recipe.stages.get(name, {})) for name in STAGES)
    }
    people = replace(
        recipe.people, majority_users=4, pairs_per_user=3, test_pairs_per_user=2, skip_ties=False
    )
    small = replace(recipe, people=people, stages=stages)
    return small.with_parts(tastes=recipe.tastes[:1], ratios=recipe.ratios[-1:], seeds=recipe.seeds[:1])
