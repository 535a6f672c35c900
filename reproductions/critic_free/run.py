"""MaxMin with a critic and without, at equal responses, on the embedded world.

    python reproductions/critic_free/run.py [--seeds 0 1 2 3 4 5] [--workers 2] [--smoke]

Every seed has its world, people and reward mixture as in the demo (10:1, 300 users, 20 pairs each). The
policy is then trained from the same reference and reward by the demo's settings: ``critic`` (every response
to a prompt of its own), ``critic_4`` (4 responses a prompt), and without a critic ``rloo`` and ``grpo`` (4
responses a prompt). Nothing else differs: as many responses and optimizer steps, one learning rate.
Policies are measured on held-out prompts by the groups' true utilities. Writes results.md, results.csv and
per_seed.csv. A run that was cut off goes on where it was; remove runs/critic_free to start over.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from torchrl_maxmin.core.tables import markdown_table, write_csv, write_paragraphs
from torchrl_maxmin.core.tasks import run_tasks
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.evaluation.policies import win_matrices
from torchrl_maxmin.evaluation.results import REFERENCE, SeedResult
from torchrl_maxmin.evaluation.summary import summarise
from torchrl_maxmin.stats.changes import relative_change
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import run_reward
from torchrl_maxmin.trainers.reward_config import RewardConfig
from torchrl_maxmin.trainers.sft import SFTConfig

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "frontier"))

from common import make_parser, run_main
from steps import Plan
from worlds import Prepare, prepare

HERE = Path(__file__).parent
Stages = Mapping[str, Mapping[str, Any]]

#: The policies, by the flags that differ.
POLICIES: dict[str, dict[str, Any]] = {
    "critic": {},
    "critic_4": {"num_generations": 4},
    "rloo": {"num_generations": 4, "advantage": "rloo"},
    "grpo": {"num_generations": 4, "advantage": "grpo"},
}
#: What the others are compared with.
YARDSTICK = "critic"
#: Of an interval, and what stands behind the name of its column.
ENDS = {"mean": "", "low": " low", "high": " high"}


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        stages: flags of the stages by section.
        num_users, pairs_per_user: who labels how much.
    """

    stages: Stages
    num_users: int = 300
    pairs_per_user: int = 20


#: The demo's own.
FULL = Sizes(yaml.safe_load((files("torchrl_maxmin") / "cli/configs/demo.yaml").read_text()))
_NEXT_TO_NOTHING: Stages = {
    "world": {"num_texts": 600, "num_prompts": 120, "num_test_prompts": 24, "test_pairs_per_user": 2},
    "sft": {"max_steps": 30, "per_device_train_batch_size": 32, "warmup_steps": 2},
    "reward": {"num_rounds": 1, "steps_per_round": 4, "num_restarts": 1, "calibration_prompts": 16},
    "ppo": {"num_iterations": 1, "rollout_batch_size": 16, "mini_batch_size": 16, "calibration_prompts": 16},
    "evaluate": {"num_samples": 2},
}
#: Every step once, on next to nothing.
SMOKE = Sizes({name: {**flags, **_NEXT_TO_NOTHING[name]} for name, flags in FULL.stages.items()}, 40, 5)


def plan_seed(plan: Plan, sizes: Sizes, home: Path, seed: int) -> None:
    """Add the steps of one seed: its world and reward, every policy, and their evaluation."""
    world, stages, name = home / "world", sizes.stages, f"seed {seed}"
    common: dict[str, Any] = {"seed": seed, "device": "cpu"}

    def add(where: str, function: Any, config: Any, *after: str) -> str:
        config.check()
        return plan.add(f"{name}/{where}", function, config, home / where, after)

    sft = SFTConfig(
        model_name_or_path=str(world / "base_model"),
        dataset_name=str(world / "sft.jsonl"),
        output_dir=str(world / "sft"),
        **stages["sft"],
        **common,
    )
    task = Prepare(world, seed, sizes.num_users, sizes.pairs_per_user, dict(stages["world"]), sft)
    ready = plan.add(f"{name}/world", prepare, task, world)
    reward = RewardConfig(
        model_name_or_path=str(world / "sft"),
        dataset_name=str(world / "preferences.jsonl"),
        eval_dataset_name=str(world / "preferences_test.jsonl"),
        output_dir=str(home / "reward"),
        num_groups="auto",
        identifiability=False,
        **stages["reward"],
        **common,
    )
    fitted = add("reward", run_reward, reward, ready)
    trained = [
        add(
            policy,
            run_ppo,
            PPOConfig(
                model_name_or_path=str(world / "sft"),
                dataset_name=str(world / "prompts.jsonl"),
                reward_model_path=str(home / "reward"),
                output_dir=str(home / policy),
                **stages["ppo"],
                **common,
                **flags,
            ),
            fitted,
        )
        for policy, flags in POLICIES.items()
    ]
    evaluation = EvaluateConfig(
        policies=[f"{REFERENCE}={world / 'sft'}", *(f"{policy}={home / policy}" for policy in POLICIES)],
        dataset_name=str(world / "prompts_test.jsonl"),
        output_dir=str(home / "evaluation"),
        judge=str(world / "world.json"),
        **stages["evaluate"],
        **common,
    )
    add("evaluation", measure_policies, evaluation, *trained)


def worst_group(means: np.ndarray) -> np.ndarray:
    """The smallest win rate over groups."""
    return means.min(-1)


def policy_rows(results: Sequence[SeedResult], seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """What each policy got: win rates against the reference with intervals, and its ratio to the yardstick.

    Args:
        results: all seeds.
        seconds: of each step that is done, by name.
    """
    summary = summarise(results)
    rows = []
    for policy in POLICIES:
        found = summary["policies"][policy]
        numbers = {
            **found["win_rate_vs_sft"],
            "worst group": found["worst_group_win_rate_interval"],
            "average over groups": found["average_over_groups_interval"],
        }
        # the yardstick has the change 0, and the ratio 1, by construction
        ours, theirs = (win_matrices(results, name, REFERENCE) for name in (policy, YARDSTICK))
        change = relative_change(ours, theirs, worst_group)
        ratio = {f"ratio{end}": float(getattr(change, part)) + 1 for part, end in ENDS.items()}
        times = [value for step, value in seconds.items() if step.partition("/")[2] == policy]
        rows.append(
            {"policy": policy}
            | {f"{key}{end}": n[part] for key, n in numbers.items() for part, end in ENDS.items()}
            | ratio
            | {"kl": found["kl"], "seconds": median(times)}
        )
    return rows


def seed_rows(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """The worst group's win rate of every policy, seed by seed, and its ratio to the yardstick's."""
    rows = []
    for result in results:
        worst = {name: float(result.win_matrix(name, REFERENCE).mean(0).min()) for name in POLICIES}
        ratio = {
            f"{name} ratio": rate / worst[YARDSTICK] if worst[YARDSTICK] else None
            for name, rate in worst.items()
        }
        rows.append({"seed": result.seed} | worst | ratio)
    return rows


def write_results(results: Sequence[SeedResult], seconds: Mapping[str, float], output: Path) -> Path:
    """Write the tables; returns results.md."""
    output.mkdir(parents=True, exist_ok=True)
    rows, names = policy_rows(results, seconds), results[0].group_names
    write_csv(output / "results.csv", rows, ".6g")
    write_csv(output / "per_seed.csv", seed_rows(results), ".6g")

    def cell(row: Mapping[str, Any], key: str) -> str:
        ends = (row[f"{key}{end}"] for end in ENDS.values())
        mean, low, high = ("?" if end is None else f"{end:.3f}" for end in ends)
        return f"{mean} [{low}, {high}]"

    columns = [*names, "worst group", "average over groups", "ratio"]
    table = markdown_table(
        [
            "policy",
            *names,
            "worst group",
            "average over groups",
            f"worst group over {YARDSTICK}'s",
            "KL",
            "seconds",
        ],
        (
            [row["policy"], *(cell(row, key) for key in columns), f"{row['kl']:.1f}", f"{row['seconds']:.0f}"]
            for row in rows
        ),
    )
    seeds = ", ".join(str(result.seed) for result in results)
    return write_paragraphs(
        output / "results.md",
        [
            "# MaxMin with a critic and without",
            "Written by `run.py`. Win rates against the supervised reference by the groups' true "
            "utilities, 95% intervals over seeds and the prompts that they share; the ratio is paired "
            f"by seed and prompt. 10:1, seeds {seeds}. All policies have the demo's settings, and as "
            "many responses and optimizer steps; `critic` has one response a prompt, the others four. "
            "Seconds are the median over seeds of the whole stage, on shared cores.",
            table,
            "[All numbers](results.csv), [seed by seed](per_seed.csv).",
        ],
    )


def main() -> None:
    """Run what is not done yet and write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="one whole run each")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--smoke", action="store_true", help="every step once, on next to nothing")
    parser.add_argument("--runs_dir", type=Path, help="models and measurements; runs/critic_free")
    parser.add_argument("--output_dir", type=Path, help="results; beside this file")
    given = parser.parse_args()
    if given.workers < 1 or min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        parser.error("--workers must be at least 1, and --seeds distinct numbers, none below 0")
    runs = given.runs_dir or Path("runs/critic_free-smoke" if given.smoke else "runs/critic_free")
    output = given.output_dir or (runs / "results" if given.smoke else HERE)
    plan, homes = Plan(), [runs / f"seed-{seed}" for seed in given.seeds]
    for seed, home in zip(given.seeds, homes, strict=True):
        plan_seed(plan, SMOKE if given.smoke else FULL, home, seed)
    run_tasks(plan.tasks, given.workers, overall="with a critic and without")
    results = [SeedResult.load(home / "evaluation/result") for home in homes]
    sys.stdout.write(f"critic_free done: {write_results(results, plan.seconds(), output)}\n")


if __name__ == "__main__":
    run_main("critic_free", main)
