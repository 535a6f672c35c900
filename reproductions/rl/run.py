"""MaxMin in reinforcement learning in general, against exact answers (``make rl``).

    python reproductions/rl/run.py [NAME ...] [--output FOLDER] [--runs FOLDER] [--frames N]

Trains every experiment of ``experiments.py``, two runs at a time, and writes ``results.csv``, ``results.md``,
the picture of the gridworld and the numbers behind it. A run that is there already is not done again; remove
its folder to repeat it. ``--frames`` shortens all runs, for a look whether everything works.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from experiments import EXPERIMENTS, smaller
from gridworld import draw_gridworld, visits
from tables import write_results
from tabular import play_random_processes
from torchrl.envs import TransformedEnv

from torchrl_maxmin.collectors.episodes import episode_returns, episode_summary, exact_summary
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import read_metrics, write_json
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.core.tasks import Task, run_tasks
from torchrl_maxmin.envs import GroupReward
from torchrl_maxmin.trainers.env_ppo import load_env_policy, run_env_ppo
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

HERE = Path(__file__).parent


def train(config: EnvPPOConfig) -> None:
    """One seed by the policy stage, and for a grid how often both goals were visited."""
    folder = run_env_ppo(config)
    if config.env_id == "gridworld":
        policy, env = load_env_policy(folder)
        write_json(folder / "visits.json", visits(env, policy, config.seed))


def train_plain(config: EnvPPOConfig) -> None:
    """One seed by TorchRL's own loss on the mean over groups, with the same numbers in ``summary.json``."""
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    import ppo_plain

    torch.set_num_threads(1)
    start = time.perf_counter()
    actor, env = ppo_plain.train(
        config.env_id,
        config.env_options,
        config.num_envs,
        config.frames_per_batch // config.num_envs,
        config.total_frames,
        gamma=config.gamma,
        entropy=config.entropy_coeff,
        minibatches=config.frames_per_batch // config.mini_batch_size,
        seed=config.seed,
        report=lambda line: None,
    )
    seconds = time.perf_counter() - start
    groups = TransformedEnv(env, GroupReward())
    summary: dict[str, Any] = {
        "frames": config.total_frames,
        "wall_seconds": seconds,
        "frames_per_second": config.total_frames / seconds,
        "group_weights": None,
        "sampled": episode_summary(episode_returns(groups, actor, config.eval_episodes)),
        **exact_summary(env, actor, config.objective),
    }
    Path(config.output_dir).mkdir(parents=True)
    write_json(Path(config.output_dir) / "summary.json", summary)


def main() -> None:
    """Train what is missing, then tables and pictures."""
    parser = make_parser(__doc__)
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(names)}; all when left out")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the tables and pictures")
    parser.add_argument("--runs", type=Path, default=Path("runs/rl"), help="folder of the runs")
    parser.add_argument("--frames", type=int, help="at most so many steps a run, of one seed")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [one for one in EXPERIMENTS if one.name in (given.names or names)]
    if given.frames:
        chosen = [smaller(one, given.frames) for one in chosen]
    tasks = {}
    for one in chosen:
        for seed in range(one.seeds):
            config = one.config(given.runs, seed)
            if not (Path(config.output_dir) / "summary.json").exists():
                tasks[f"{one.name}/{seed}"] = Task(train_plain if one.plain else train, config)
    start = time.perf_counter()
    run_tasks(tasks, num_workers=2)
    rows = [row(one, given.runs, seed) for one in chosen for seed in range(one.seeds)]
    given.output.mkdir(parents=True, exist_ok=True)
    write_csv(given.output / "results.csv", rows)
    processes = play_random_processes(10 if given.frames else 200)
    total = given.runs / "total.json"
    if len(tasks) == len(rows):  # else what an earlier call measured, if it trained all
        write_json(total, {"seconds": time.perf_counter() - start})
    seconds = json.loads(total.read_text())["seconds"] if total.exists() else None
    write_results(given.output, rows, processes, seconds)
    draw_gridworld(given.output, given.runs)
    console.print(f"results: {given.output / 'results.md'}", highlight=False)


def row(one: Any, runs: Path, seed: int) -> dict[str, Any]:
    """What one run came to."""
    config = one.config(runs, seed)
    folder = Path(config.output_dir)
    summary = json.loads((folder / "summary.json").read_text())
    exact = summary["exact"] or {}
    visited = folder / "visits.json"
    return {
        "experiment": one.name,
        "seed": seed,
        "frames": summary["frames"],
        "seconds": round(summary["wall_seconds"], 1),
        "frames_per_second": round(summary["frames_per_second"]),
        "worst_group": exact.get("worst_group"),
        "max_min": exact.get("max_min"),
        "utilities": " ".join(f"{value:.4f}" for value in exact.get("utilities", [])),
        "first_worst_group": None if one.plain else read_metrics(folder)[0]["objective/welfare"],
        "sampled_worst_group": summary["sampled"]["worst_group"],
        "sampled_interval": " to ".join(f"{end:.2f}" for end in summary["sampled"]["worst_group_interval"]),
        "sampled_mean_of_mins": summary["sampled"]["mean_of_mins"]["mean"],
        "visits_both": json.loads(visited.read_text())["both"] if visited.exists() else None,
        "settings": json.dumps({k: v for k, v in asdict(config).items() if k in one.settings}),
    }


if __name__ == "__main__":
    run_main("rl", main)
