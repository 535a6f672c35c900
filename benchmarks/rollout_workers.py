"""What Ray's workers cost a rollout, and what they do to a learning curve, on the embedded world.

    python benchmarks/rollout_workers.py --output workers.json
    python benchmarks/rollout_workers.py --seeds 0 --iterations 3 --sft_steps 5 --rollouts 5

A fine-tuned tiny GPT-2 is trained on the world's own rewards by rollouts of the trainer itself, of workers
in turns with it (``--max_staleness 0``) and of workers beside it (1). A seed's figure is the worst group's
reward, mean over the last quarter of its iterations; differences to the trainer's own are paired by seed,
with a t interval. The overhead is the time of a rollout by one worker, weights included, less that in the
trainer.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import t as student

from torchrl_maxmin.core.run import read_metrics, write_json
from torchrl_maxmin.rollouts.ray_workers import ray_session
from torchrl_maxmin.trainers.lm_ppo import build_ppo, run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import write_preferences, write_world

SOURCES = {"trainer": {}, "turns": {"max_staleness": 0}, "beside": {"max_staleness": 1}}


def prepare(folder: Path, steps: int) -> dict:
    """Write the world and its reference policy; returns settings as the demo's."""
    write_world(folder, 0, num_texts=16_000, num_prompts=4_000, num_test_prompts=10)
    common = {"device": "cpu", "seed": 0}
    sft = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "max_length": 64}
    base, texts = str(folder / "base_model"), str(folder / "sft.jsonl")
    run_sft(SFTConfig(base, texts, output_dir=str(folder / "sft"), **sft, **common))
    write_preferences(folder, World.preset("10:1"), str(folder / "sft"), 0, 20, 5, 1, device="cpu")
    return {
        "model_name_or_path": str(folder / "sft"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": [str(folder / "world.json")],
        "rollout_batch_size": 192,
        "mini_batch_size": 96,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "beta": 0.02,
        "tau": 0.5,
        "response_length": 24,
        "max_prompt_length": 16,
        "device": "cpu",
    }


def curve(settings: dict, source: str, seed: int, folder: Path, workers: int) -> dict:
    """Train once; returns the worst group's reward at the end, and what was waited for rollouts."""
    options = SOURCES[source] | ({"rollout_workers": workers} if SOURCES[source] else {})
    output = folder / f"{source}-{seed}"
    started = time.perf_counter()
    run_ppo(PPOConfig(**settings, **options, seed=seed, output_dir=str(output)))
    rows = read_metrics(output)
    last = rows[-max(len(rows) // 4, 1) :]
    found = {
        "source": source,
        "seed": seed,
        "welfare": statistics.mean(row["objective/welfare"] for row in last),
        "run_seconds": time.perf_counter() - started,
    }
    if SOURCES[source]:
        found["staleness"] = statistics.mean(row["rollout/staleness"] for row in rows)
        found["wait_seconds"] = statistics.median(row["rollout/wait_seconds"] for row in rows[1:])
    return found


def overhead(settings: dict, folder: Path, rollouts: int) -> dict:
    """Median milliseconds of a rollout in the trainer and by one worker, after the first."""
    milliseconds = {}
    for name, workers in (("trainer", 0), ("worker", 1)):
        config = PPOConfig(
            **settings | {"num_iterations": rollouts + 1},
            rollout_workers=workers,
            output_dir=str(folder / f"rollouts-{name}"),
        )
        with ray_session(workers):
            parts, times = build_ppo(config), []
            begun = time.perf_counter()
            for _ in parts.rollouts:
                now = time.perf_counter()
                times.append(1000 * (now - begun))
                begun = now
            parts.rollouts.close()
        milliseconds[name] = statistics.median(times[1:])
    return milliseconds | {"overhead": milliseconds["worker"] - milliseconds["trainer"]}


def difference(runs: list[dict], source: str) -> dict:
    """Mean over seeds of the difference to the trainer's own rollouts, with its t interval."""
    welfare = {(run["source"], run["seed"]): run["welfare"] for run in runs}
    pairs = [value - welfare["trainer", seed] for (name, seed), value in welfare.items() if name == source]
    mean, low, high = statistics.mean(pairs), None, None
    if len(pairs) > 1:
        reach = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
        low, high = mean - reach, mean + reach
    return {"source": source, "mean": mean, "low": low, "high": high}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sft_steps", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--rollout_workers", type=int, default=2)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = prepare(folder, arguments.sft_steps) | {"num_iterations": arguments.iterations}
        milliseconds = overhead(settings, folder, arguments.rollouts)
        runs = [
            curve(settings, source, seed, folder, arguments.rollout_workers)
            for seed in arguments.seeds
            for source in SOURCES
        ]
    found = {
        "rollout_milliseconds": milliseconds,
        "runs": runs,
        "differences": [difference(runs, source) for source in SOURCES if source != "trainer"],
    }
    if arguments.output:
        write_json(Path(arguments.output), found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
