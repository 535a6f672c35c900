"""Fruit tree, depth 7: the minimum of the means is not the mean of the minima.

    python examples/fruit_tree.py [--total_frames 1000000]

A walk down a binary tree ends at one of 128 fruits, each worth something else to six groups. The paper's
objective, the minimum over groups of the mean return, wants a mixture of fruits, none of them good for all
(exactly 3.9301 for the worst group). The mean over episodes of what the worst-off group got wants the one
fruit whose smallest value is largest (2.5901; the fruit that is best on average gives 2.4858).
"""

import argparse
import json
import tempfile
from pathlib import Path

from torchrl import torchrl_logger

from torchrl_maxmin.trainers.env_ppo import run_env_ppo
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

DEPTH, COPIES = 7, 512

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--total_frames", type=int, default=1_000_000)
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()
torchrl_logger.setLevel("WARNING")

for objective in ("min_of_means", "mean_of_mins"):
    with tempfile.TemporaryDirectory() as scratch:
        config = EnvPPOConfig(
            env_id="fruit-tree-v0",
            env_options={"depth": DEPTH},
            objective=objective,
            num_envs=COPIES,
            frames_per_batch=COPIES * DEPTH,  # whole episodes
            mini_batch_size=COPIES * DEPTH // 2,
            total_frames=given.total_frames,
            seed=given.seed,
            output_dir=scratch,
        )
        summary = json.loads((Path(run_env_ppo(config)) / "summary.json").read_text())
    exact, sampled = summary["exact"], summary["sampled"]
    print(f"trained for {objective}: {summary['frames_per_second']:,.0f} steps a second")
    print(f"  mean returns by group  {[round(value, 2) for value in exact['utilities']]}")
    print(f"  minimum of the means   {exact['worst_group']:.4f}  (at best {exact['max_min']:.4f})")
    print(f"  mean of the minima     {sampled['mean_of_mins']['mean']:.4f}  (at best 2.5901)")
