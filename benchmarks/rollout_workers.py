"""What Ray's workers cost a rollout, and what they do to a learning curve: the embedded world, and fishwood.

    python benchmarks/rollout_workers.py                              # both, into results/PROCESSOR/
    python benchmarks/rollout_workers.py --seeds                      # rollouts alone, on a quiet machine
    python benchmarks/rollout_workers.py --rollouts 0                 # curves alone
    python benchmarks/rollout_workers.py --only environment           # or language
    python benchmarks/rollout_workers.py --seeds 0 --iterations 3 --sft_steps 5 --rollouts 5 --output FILE

A fine-tuned tiny GPT-2 is trained on the world's own rewards by rollouts of the trainer itself, of workers
in turns with it (``--max_staleness 0``) and of workers beside it (1). A seed's figure is the worst group's
reward, mean over the last quarter of its iterations; differences to the trainer's own are paired by seed,
with a t interval. What Ray costs a rollout is the time of one worker's, weights included, less that of the
same sampler in the trainer's process. Fishwood is rolled out as a batched environment and as
MO-Gymnasium's own.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from facts import facts, results_file, write
from learning_curve import curve_of, prepare, t_interval

from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rollouts.language_workers import WorkerLanguageRollouts
from torchrl_maxmin.rollouts.ray_workers import ray_session
from torchrl_maxmin.rollouts.workers import Workers
from torchrl_maxmin.trainers.env_ppo import build_env_ppo, train_env_policy
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy
from torchrl_maxmin.trainers.lm_workers import make_language_sampler, start_workers
from torchrl_maxmin.trainers.ppo import Rollouts
from torchrl_maxmin.trainers.ppo_config import PPOConfig

#: episodes of 20 steps: the worst group gets 1.8 at most, by 18 of them at the river
FISHWOOD: dict[str, Any] = {
    "env_id": "fishwood-v0",
    "env_options": {"horizon": 20, "fish_chance": 0.1, "wood_chance": 0.9},
    "num_envs": 64,
    "frames_per_batch": 64 * 40,
    "total_frames": 40 * 64 * 40,
    "mini_batch_size": 640,
    "gamma": 0.99,
    "tau": 0.1,
    "entropy_coeff": 0.0,
    "eval_episodes": 200,
    "device": "cpu",
}
SOURCES = {"trainer": {}, "turns": {"max_staleness": 0}, "beside": {"max_staleness": 1}}


def curve(settings: dict, source: str, seed: int, folder: Path, workers: int) -> dict:
    """Train a language model once, see :func:`measured`."""
    config = PPOConfig(**settings, **run_of(source, seed, folder, workers))
    return {"source": source, "seed": seed} | measured(config, build_ppo, train_policy)


def env_curve(source: str, seed: int, folder: Path, workers: int) -> dict:
    """Train in an environment once, see :func:`measured`."""
    config = EnvPPOConfig(**FISHWOOD, **run_of(source, seed, folder / "env", workers))
    return {"source": source, "seed": seed} | measured(config, build_env_ppo, train_env_policy)


def run_of(source: str, seed: int, folder: Path, workers: int) -> dict:
    """Settings of a run."""
    options = SOURCES[source] | ({"rollout_workers": workers} if SOURCES[source] else {})
    return options | {"seed": seed, "output_dir": str(folder / f"{source}-{seed}")}


def measured(config: Any, build: Callable[[Any], Any], finish: Callable[[Any, Any], Path]) -> dict:
    """Train; returns the worst group's reward, and the seconds of an iteration and of its rollout."""
    ends: list[float] = []
    with ray_session(config.rollout_workers):
        parts = build(config)
        parts.monitors = [*parts.monitors, lambda *_: ends.append(time.perf_counter()) or {}]
        finish(config, parts)
    rows = read_metrics(config.output_dir)
    found = curve_of(config.output_dir)
    found["iteration_seconds"] = statistics.median(b - a for a, b in itertools.pairwise(ends))
    if config.rollout_workers:
        found["staleness"] = statistics.mean(row["rollout/staleness"] for row in rows)
        found["wait_seconds"] = statistics.median(row["rollout/wait_seconds"] for row in rows[1:])
    return found


class InProcess:
    """A worker's sampler in the trainer's process, see :class:`~torchrl_maxmin.rollouts.workers.Workers`."""

    size, restarts = 1, 0

    def __init__(self, config: PPOConfig):
        self.sampler = make_language_sampler(config)

    def ask(self, version: int, weights: list, tasks: list) -> list:
        """Sample now."""
        self.sampler.load(weights)
        return [self.sampler.sample(task) for task in tasks]

    def answers(self, request: list) -> list:
        """What was sampled."""
        return request

    def close(self) -> None:
        """Nothing is held."""


def rollout_milliseconds(settings: dict, folder: Path, rollouts: int, workers: int) -> dict:
    """Median milliseconds of a rollout after the first: the trainer's, a sampler's beside it, workers'."""
    config = PPOConfig(**settings | {"num_iterations": rollouts + 1}, output_dir=str(folder / "rollouts"))
    parts = build_ppo(config)
    sources: dict[str, Callable[[], Workers]] = {
        "sampler_in_process": lambda: InProcess(config),
        "one_worker": lambda: start_workers(replace(config, rollout_workers=1)),
        f"workers_{workers}": lambda: start_workers(replace(config, rollout_workers=workers)),
    }
    milliseconds = {"trainer": median_milliseconds(parts.rollouts)}
    with ray_session(workers):
        for name, start in sources.items():
            source = WorkerLanguageRollouts(
                parts.models,
                start(),
                parts.rollouts.rewards,
                parts.rollouts.prompts,
                batch_size=config.rollout_batch_size,
                num_batches=config.num_iterations,
            )
            milliseconds[name] = median_milliseconds(source)
    return milliseconds | {"overhead": milliseconds["one_worker"] - milliseconds["sampler_in_process"]}


def env_steps_a_second(backend: str, folder: Path, rollouts: int, workers: int) -> dict:
    """Steps a second of rollouts by the trainer and by workers in turns with it, after the first."""
    settings = FISHWOOD | {
        "env_backend": backend,
        "total_frames": (rollouts + 1) * FISHWOOD["frames_per_batch"],
    }
    if backend == "gym":  # MO-Gymnasium's own has the horizon and the chances of the paper
        settings |= {"env_options": {}}
    found = {}
    for name, number in (("trainer", 0), (f"workers_{workers}", workers)):
        output = str(folder / f"steps-{backend}-{name}")
        config = EnvPPOConfig(**settings, rollout_workers=number, output_dir=output, utility_scale=1.0)
        with ray_session(number):
            source = build_env_ppo(config).rollouts
            found[name] = 1000 * config.frames_per_batch / median_milliseconds(source)
    return found


def median_milliseconds(source: Rollouts) -> float:
    """Of a rollout after the first."""
    times, begun = [], time.perf_counter()
    for _ in source:
        now = time.perf_counter()
        times.append(1000 * (now - begun))
        begun = now
    source.close()
    return statistics.median(times[1:])


def difference(runs: list[dict], source: str) -> dict:
    """Mean over seeds of the difference to the trainer's own rollouts, with its t interval."""
    welfare = {(run["source"], run["seed"]): run["welfare"] for run in runs}
    pairs = [value - welfare["trainer", seed] for (name, seed), value in welfare.items() if name == source]
    return {"source": source} | t_interval(pairs)


def differences(runs: list[dict]) -> list[dict]:
    """Those of both kinds of workers."""
    return [difference(runs, source) for source in SOURCES if source != "trainer"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["language", "environment"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sft_steps", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--rollout_workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=results_file("rollout_workers.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    found |= {"environment": facts("ray", threads=1)}
    workers, seeds, rollouts = arguments.rollout_workers, arguments.seeds, arguments.rollouts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only != "environment":
            settings = prepare(folder, arguments.sft_steps) | {"num_iterations": arguments.iterations}
            if rollouts:
                found["rollout_milliseconds"] = rollout_milliseconds(settings, folder, rollouts, workers)
            if seeds:
                runs = [
                    curve(settings, source, seed, folder, workers) for seed in seeds for source in SOURCES
                ]
                found |= {"differences": differences(runs), "runs": runs}
        if arguments.only != "language":
            if rollouts:
                found["environment_steps_a_second"] = {
                    backend: env_steps_a_second(backend, folder, rollouts, workers)
                    for backend in ("batched", "gym")
                }
            if seeds:
                runs = [env_curve(source, seed, folder, workers) for seed in seeds for source in SOURCES]
                found |= {"environment_differences": differences(runs), "environment_runs": runs}
    write(arguments.output, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
