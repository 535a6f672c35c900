"""Does a long run grow? Resident memory and open files of PPO, iteration by iteration.

    python benchmarks/memory_over_time.py
    python benchmarks/memory_over_time.py --iterations 100 --kinds environment

A tiny language model and an environment are trained in processes of their own, a checkpoint every 100
iterations. With memory at the end more than 2% above that of iteration 50, or more files open than there
were, the exit status is 1. Each figure is the median of ten iterations: allocators breathe.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import importlib, json, os, sys
import torch
torch.set_num_threads(1)
from torchrl_maxmin.core import run
kind, settings = sys.argv[1], json.loads(sys.argv[2])
rooms = {"language": ("ppo_config.PPOConfig", "lm_ppo.run_ppo"),
         "environment": ("env_ppo_config.EnvPPOConfig", "env_ppo.run_env_ppo")}
def find(path):
    module, name = path.split(".")
    return getattr(importlib.import_module("torchrl_maxmin.trainers." + module), name)
make, stage = map(find, rooms[kind])
memory, files, write = [], [], run.MetricsLog.write
def watched(*args):
    write(*args)
    with open("/proc/self/statm") as statm:
        memory.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    files.append(len(os.listdir("/proc/self/fd")))
run.MetricsLog.write = watched
stage(make(**settings))
print(json.dumps({"memory": memory, "files": files}))
"""
_EARLY, _AROUND, _MOST_GROWTH = 50, 10, 1.02


def prepare(folder: Path, iterations: int) -> dict[str, dict]:
    """Write a tiny untrained model, rewards and prompts; returns the settings of each kind of run."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from torchrl_maxmin.rewards import RewardMixture
    from torchrl_maxmin.world import build_tokenizer, sample_prompts

    tokenizer = build_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    RewardMixture.from_causal_lm(str(folder / "model"), 2).save_pretrained(folder / "reward")
    prompts = [json.dumps({"prompt": prompt}) for prompt in sample_prompts(64, 0, heldout=False)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    both = {"device": "cpu", "save_steps": 100}
    language = {
        "model_name_or_path": str(folder / "model"),
        "reward_model_path": str(folder / "reward"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / "language"),
        "num_iterations": iterations,
        "rollout_batch_size": 8,
        "mini_batch_size": 8,
        "num_ppo_epochs": 1,
        "response_length": 6,
        "calibration_prompts": 16,
    }
    environment = {
        "env_id": "fruit-tree-v0",
        "output_dir": str(folder / "environment"),
        "num_envs": 8,
        "frames_per_batch": 64,
        "total_frames": 64 * iterations,
        "mini_batch_size": 64,
        "num_ppo_epochs": 1,
        "hidden_sizes": [8],
        "eval_episodes": 8,
    }
    return {"language": language | both, "environment": environment | both}


def middle(values: list[int], place: int) -> float:
    """The median of the iterations around one."""
    around = values[max(0, place - _AROUND // 2) : place + _AROUND // 2]
    return statistics.median(around)


def main() -> int:
    """Run each kind, and print what it held early and late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=["language", "environment"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.iterations < 2 * _EARLY:
        parser.error(f"--iterations must be at least {2 * _EARLY}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(Path(folder), options.iterations)
        for kind in options.kinds:
            command = [sys.executable, "-c", CHILD, kind, json.dumps(settings[kind])]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seen = json.loads(run.stdout.splitlines()[-1])
            last = options.iterations - _AROUND // 2
            early, late = (middle(seen["memory"], place) for place in (_EARLY, last))
            opened = [middle(seen["files"], place) for place in (_EARLY, last)]
            found[kind] = {
                "iterations": options.iterations,
                "memory_early_mb": round(early / 2**20, 1),
                "memory_late_mb": round(late / 2**20, 1),
                "growth": round(late / early, 4),
                "files_early": opened[0],
                "files_late": opened[1],
                "flat": late / early <= _MOST_GROWTH and opened[1] <= opened[0],
            }
            print(kind, json.dumps(found[kind]))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(row["flat"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
