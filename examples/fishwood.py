"""Fishwood: time at the river and in the wood, shared so that fish and wood come out alike.

    python examples/fishwood.py [--backend gym --total_frames 50000]

The river gives a fish in 1 step of 10, the wood some wood in 9 of 10, for 200 steps: the mean over the two
wants wood alone (180 and 0), max-min wants 18 of each. ``batched`` moves 64 copies in one tensor step,
``gym`` steps MO-Gymnasium's own environment, one at a time.
"""

import argparse
import json
import tempfile
from pathlib import Path

from torchrl import torchrl_logger

from torchrl_maxmin.trainers.env_ppo import run_env_ppo
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", default="batched", choices=["batched", "gym"])
parser.add_argument("--total_frames", type=int, default=1_000_000)
parser.add_argument("--adversary", default="entropy_regularized", help="hard_min is the paper's")
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()
torchrl_logger.setLevel("WARNING")

copies, steps = (64, 200) if given.backend == "batched" else (4, 500)
with tempfile.TemporaryDirectory() as scratch:
    config = EnvPPOConfig(
        env_id="fishwood-v0",
        env_backend=given.backend,
        adversary=given.adversary,
        tau=0.1,
        gamma=0.99,
        entropy_coeff=0.0,
        num_envs=copies,
        frames_per_batch=copies * steps,
        mini_batch_size=copies * steps // 4,
        total_frames=given.total_frames,
        eval_episodes=200 if given.backend == "batched" else 20,
        seed=given.seed,
        output_dir=scratch,
    )
    summary = json.loads((Path(run_env_ppo(config)) / "summary.json").read_text())

print(f"{summary['frames']:,} steps in {summary['wall_seconds']:.0f} s")
for name, k in (("fish", "0"), ("wood", "1")):
    found = summary["sampled"]["utilities"][k]
    print(f"  {name}  {found['mean']:6.2f}  [{found['low']:.2f}, {found['high']:.2f}] over episodes")
if summary["exact"]:
    print(
        f"  worst, exactly {summary['exact']['worst_group']:.3f}, at best {summary['exact']['max_min']:.3f}"
    )
