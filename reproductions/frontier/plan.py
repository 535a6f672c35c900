"""What is trained and measured for one seed: the ordinary stages, a configuration each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from people import People, relabel
from short import TOKENS, Short, measure_short
from steps import Plan
from unseen import Unseen, measure_unseen
from worlds import SHIFTS, WORLD, CountGroups, Prepare, Prompts, count_groups, prepare, write_prompts

from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import run_reward
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.sft import SFTConfig
from torchrl_maxmin.world import World

#: Standard deviation of a win rate against the reference, about uniform on [0, 1]: Nash's unit.
WIN_RATE_UNIT = 12**-0.5


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the same budget for every policy.

    Attributes:
        stages: flags of the stages by section, over those of the shipped demo.
        num_users, pairs_per_user: who labels how much.
        weights: the minority's weight in the sweep of fixed weights.
        betas: KL weights of the sweeps, beside the demo's own.
        shares: of the minority.
        disturbances: name -> settings of :class:`~people.People`.
        short_prompts: prompts of the enumerable world.
        short: flags of its PPO; two tokens a response leave time for more iterations and a smaller tau.
        users_per_kind: unseen users.
        certificate_prompts, certificate_samples: behind a certificate, samples a prompt.
    """

    stages: Mapping[str, Mapping[str, Any]]
    num_users: int = 300
    pairs_per_user: int = 20
    weights: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.65)
    betas: tuple[float, ...] = (0.05, 0.15, 0.5)
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5)
    disturbances: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: {
            "noisier labels": {"tau": 1.0},
            "30% answer at random": {"random": 0.3},
            "5% answer adversarially": {"adversarial": 0.05},
            "15% answer adversarially": {"adversarial": 0.15},
        }
    )
    short_prompts: int = 16
    short: Mapping[str, Any] = field(default_factory=lambda: {"beta": 0.5, "tau": 0.05, "num_iterations": 80})
    users_per_kind: int = 100
    certificate_prompts: int = 16
    certificate_samples: int = 512


#: The shipped demo's flags by stage.
DEMO: dict[str, dict[str, Any]] = yaml.safe_load(
    (files("torchrl_maxmin") / "cli/configs/demo.yaml").read_text()
)


def _stages(**changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The shipped demo's flags, with what is said otherwise."""
    return {name: {**section, **changes.get(name, {})} for name, section in DEMO.items()}


#: The demo's own settings, but for three quarters of its PPO iterations.
FULL = Sizes(stages=_stages(ppo={"num_iterations": 30}))
#: Every step once, on next to nothing.
SMOKE = Sizes(
    stages=_stages(
        world={"num_texts": 600, "num_prompts": 120, "num_test_prompts": 24, "test_pairs_per_user": 2},
        sft={"max_steps": 30, "per_device_train_batch_size": 32, "warmup_steps": 2},
        reward={"num_rounds": 1, "steps_per_round": 4, "num_restarts": 1, "calibration_prompts": 16},
        ppo={"num_iterations": 1, "rollout_batch_size": 16, "mini_batch_size": 16, "calibration_prompts": 16},
        evaluate={"num_samples": 2},
    ),
    num_users=40,
    pairs_per_user=5,
    weights=(0.3, 0.5),
    betas=(0.5,),
    shares=(0.05, 0.5),
    disturbances={"noisier labels": {"tau": 1.0}, "20% answer adversarially": {"adversarial": 0.2}},
    short_prompts=2,
    short={"beta": 0.5, "num_iterations": 1},
    users_per_kind=4,
    certificate_prompts=2,
    certificate_samples=16,
)

#: Policies on the frontier that are no sweep, as the picture names them.
NAMED = ("single", "utilitarian", "nash", "soft_min", "maxmin")
#: Policies of the sweep of shares: name -> flags of their reward.
BY_SHARE = {
    "single": {"num_groups": 1},
    "maxmin": {"num_groups": 2},
    "low_rank": {"num_groups": 2, "head": "low_rank"},
    "true_groups": {"use_true_groups": True},
}
#: Policies of the enumerable world.
SHORT_POLICIES = ("utilitarian", "nash", "soft_min", "maxmin", "equal")


def weight_name(weight: float) -> str:
    """A policy of fixed weights, by the minority's."""
    return f"weight {weight:g}"


def beta_name(policy: str, beta: float) -> str:
    """A policy at another KL weight."""
    return f"{policy}, beta {beta:g}"


def policy_folder(name: str) -> str:
    """Where a policy lies, by its name."""
    return name.replace(", ", "_").replace(" ", "_")


def people_folder(disturbance: str) -> str:
    """Where disturbed people lie, by what is wrong with them."""
    return disturbance.replace("%", "").replace(" ", "_")


class SeedPlan:
    """The steps of one seed.

    Args:
        plan: where they go.
        sizes: how much.
        home: the seed's folder.
        seed: of everything.
    """

    def __init__(self, plan: Plan, sizes: Sizes, home: Path, seed: int):
        self.plan, self.sizes, self.home, self.seed = plan, sizes, home, seed
        self.name = f"seed {seed}"
        self.common: dict[str, Any] = {"seed": seed, "device": "cpu"}
        self.world = home / "world"
        self.base = (self._prepare(),)
        self.frontier()
        self.short()
        self.shares()
        self.disturbed()
        self.shifted()
        self.unseen()

    # -- parts ------------------------------------------------------------------------------------

    def _prepare(self) -> str:
        sizes = self.sizes
        sft = SFTConfig(
            model_name_or_path=str(self.world / "base_model"),
            dataset_name=str(self.world / "sft.jsonl"),
            output_dir=str(self.world / "sft"),
            **sizes.stages["sft"],
            **self.common,
        )
        files = dict(sizes.stages["world"])
        task = Prepare(self.world, self.seed, sizes.num_users, sizes.pairs_per_user, files, sft)
        return self.plan.add(f"{self.name}/world", prepare, task, self.world)

    def _reward(self, pairs: Path, where: str, after: tuple[str, ...], **flags: Any) -> str:
        config = RewardConfig(
            model_name_or_path=str(self.world / "sft"),
            dataset_name=str(pairs / "preferences.jsonl"),
            eval_dataset_name=str(pairs / "preferences_test.jsonl"),
            output_dir=str(self.home / where),
            identifiability=False,
            **self.sizes.stages["reward"],
            **flags,
            **self.common,
        )
        config.check()
        return self.plan.add(f"{self.name}/{where}", run_reward, config, self.home / where, after)

    def _ppo(self, where: str, after: tuple[str, ...], **flags: Any) -> str:
        settings: dict[str, Any] = {
            "model_name_or_path": str(self.world / "sft"),
            "dataset_name": str(self.world / "prompts.jsonl"),
            "output_dir": str(self.home / where),
        }
        config = PPOConfig(**(settings | self.sizes.stages["ppo"] | self.common | flags))
        config.check()
        return self.plan.add(f"{self.name}/{where}", run_ppo, config, self.home / where, after)

    def _evaluate(
        self, where: str, policies: Mapping[str, Path], after: tuple[str, ...], judge: Path, **flags: Any
    ) -> str:
        settings: dict[str, Any] = {
            "policies": [f"{name}={path}" for name, path in {"sft": self.world / "sft", **policies}.items()],
            "dataset_name": str(self.world / "prompts_test.jsonl"),
            "output_dir": str(self.home / where),
            "judge": str(judge / "world.json"),
        }
        config = EvaluateConfig(**(settings | self.sizes.stages["evaluate"] | self.common | flags))
        config.check()
        return self.plan.add(f"{self.name}/{where}", measure_policies, config, self.home / where, after)

    def _welfare(self, policy: str) -> dict[str, Any]:
        """Flags of a policy that is trained on the heads of two groups."""
        ppo = self.sizes.stages["ppo"]
        penalty = ppo.get("missing_eos_penalty", PPOConfig.missing_eos_penalty)
        return {
            "utilitarian": {"welfare": "utilitarian"},
            "soft_min": {"welfare": "soft_min", "welfare_parameter": 0.5},
            # a win rate has another unit than a standard deviation: beta and penalty go with it
            "nash": {
                "welfare": "nash",
                "calibration": "win_rate",
                "beta": ppo["beta"] * WIN_RATE_UNIT,
                "missing_eos_penalty": penalty * WIN_RATE_UNIT,
            },
            "maxmin": {},
            "equal": {"welfare": "fixed", "group_weights": [0.5, 0.5]},
        }[policy]

    # -- experiments ------------------------------------------------------------------------------

    def frontier(self) -> None:
        """All welfares, the sweeps of weights and of beta, and their evaluation and certificates."""
        sizes = self.sizes
        reward = {
            kind: self._reward(self.world, f"reward_{kind}", self.base, num_groups=groups)
            for kind, groups in (("single", 1), ("maxmin", 2))
        }
        runs: dict[str, tuple[str, dict[str, Any]]] = {
            name: ("single", {}) if name == "single" else ("maxmin", self._welfare(name)) for name in NAMED
        }
        for weight in sizes.weights:
            fixed = {"welfare": "fixed", "group_weights": [1 - weight, weight]}
            runs[weight_name(weight)] = ("maxmin", fixed)
        for beta in sizes.betas:
            runs |= {beta_name(kind, beta): (kind, {"beta": beta}) for kind in ("single", "maxmin")}
        self.policies: dict[str, Path] = {}
        self.trained: dict[str, str] = {}
        for name, (kind, flags) in runs.items():
            where = f"frontier/{policy_folder(name)}"
            path = str(self.home / f"reward_{kind}")
            self.trained[name] = self._ppo(where, (reward[kind],), reward_model_path=path, **flags)
            self.policies[name] = self.home / where
        self.rewards = reward
        self.evaluated = self._evaluate(
            "frontier/evaluation", self.policies, tuple(self.trained.values()), self.world
        )
        for name in ("maxmin", *(beta_name("maxmin", beta) for beta in sizes.betas)):
            self._evaluate(
                f"certificates/{self.policies[name].name}",
                {"maxmin": self.policies[name]},
                (self.trained[name],),
                self.world,
                reward_model_path=str(self.home / "reward_maxmin"),
                certificate_samples=sizes.certificate_samples,
                certificate_prompts=sizes.certificate_prompts,
                num_prompts=sizes.certificate_prompts,
            )

    def short(self) -> None:
        """The enumerable world."""
        sizes, folder = self.sizes, self.home / "short"
        prompts = Prompts(folder / "prompts", "unfinished", sizes.short_prompts)
        written = self.plan.add(f"{self.name}/short/prompts", write_prompts, prompts, prompts.folder)
        policies, trained = {}, []
        for name in SHORT_POLICIES:
            flags = self._welfare(name)
            if name == "utilitarian":  # functions have no shares of their own
                flags = {"welfare": "fixed", "group_weights": list(World.preset(WORLD).shares)}
            unit = WIN_RATE_UNIT if flags.get("calibration") == "win_rate" else 1.0
            flags |= {
                "dataset_name": str(prompts.folder / "prompts.jsonl"),
                "reward_funcs": [str(self.world / "world.json")],
                "response_length": TOKENS,
                **sizes.short,
                "beta": sizes.short["beta"] * unit,
                "missing_eos_penalty": 0.0,
                "calibration_samples": 64,  # there are few prompts
            }
            trained.append(self._ppo(f"short/{name}", (*self.base, written), **flags))
            policies[name] = folder / name
        task = Short(
            self.world / "sft",
            policies,
            prompts.folder / "prompts.jsonl",
            self.world / "world.json",
            sizes.short["beta"],
            folder / "exact",
        )
        self.plan.add(f"{self.name}/short/exact", measure_short, task, task.folder, tuple(trained))

    def shares(self) -> None:
        """Every reward at every share of the minority, on the same pairs."""
        for share in self.sizes.shares:
            where = f"shares/{share:g}"
            people = People(self.world, self.home / where / "people", self.seed, (1 - share, share))
            after = (self.plan.add(f"{self.name}/{where}/people", relabel, people, people.folder, self.base),)
            policies, trained = {}, []
            for name, flags in BY_SHARE.items():
                path = f"{where}/reward_{name}"
                reward = self._reward(people.folder, path, after, **flags)
                trained.append(
                    self._ppo(f"{where}/{name}", (reward,), reward_model_path=str(self.home / path))
                )
                policies[name] = self.home / where / name
            self._evaluate(f"{where}/evaluation", policies, tuple(trained), people.folder)
            length = self.sizes.stages["reward"]["max_length"]
            count = CountGroups(
                people.folder, self.world / "sft", self.home / where / "choice", self.seed, length
            )
            self.plan.add(f"{self.name}/{where}/choice", count_groups, count, count.folder, after)

    def disturbed(self) -> None:
        """Single and MaxMin, groups unknown in number, on labels of disturbed people."""
        for name, settings in self.sizes.disturbances.items():
            where = f"people/{people_folder(name)}"
            people = People(self.world, self.home / where / "people", self.seed, **settings)
            after = (self.plan.add(f"{self.name}/{where}/people", relabel, people, people.folder, self.base),)
            policies, trained = {}, []
            for kind, groups in (("single", 1), ("maxmin", "auto")):
                path = f"{where}/reward_{kind}"
                reward = self._reward(people.folder, path, after, num_groups=groups)
                trained.append(
                    self._ppo(f"{where}/{kind}", (reward,), reward_model_path=str(self.home / path))
                )
                policies[kind] = self.home / where / kind
            self._evaluate(f"{where}/evaluation", policies, tuple(trained), people.folder)

    def shifted(self) -> None:
        """The frontier's single and MaxMin on prompts of other kinds."""
        policies = {kind: self.policies[kind] for kind in ("single", "maxmin")}
        after = tuple(self.trained[kind] for kind in policies)
        for shift in SHIFTS:
            number = self.sizes.stages["world"]["num_test_prompts"]
            prompts = Prompts(self.home / "prompts" / shift / "prompts", shift, number)
            written = self.plan.add(
                f"{self.name}/prompts/{shift}/prompts", write_prompts, prompts, prompts.folder
            )
            self._evaluate(
                f"prompts/{shift}/evaluation",
                policies,
                (*after, written),
                self.world,
                dataset_name=str(prompts.folder / "prompts.jsonl"),
            )

    def unseen(self) -> None:
        """New users: their groups, and what they say of the frontier's single and MaxMin."""
        task = Unseen(
            self.world,
            (self.home / "reward_maxmin", self.home / "reward_single"),
            self.home / "frontier/evaluation/result",
            ("single", "maxmin"),
            self.home / "unseen",
            self.seed,
            self.sizes.users_per_kind,
        )
        self.plan.add(f"{self.name}/unseen", measure_unseen, task, task.folder, (self.evaluated,))
