"""The gridworld of the paper's Appendix G: goods for two groups, one goal each, both on the way.

    python examples/gridworld.py [--total_frames 300000]

A walk of 12 steps on 4 x 4 cells starts at the top left; group 1 is served at the top right, group 2 at the
bottom right, each once, and every move costs 0.05. Weighted 10 : 1 the walk ends at the first goal; max-min
serves both.
"""

import argparse
import tempfile

import torch
from torchrl import torchrl_logger
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_maxmin.trainers.env_ppo import load_env_policy, run_env_ppo
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--total_frames", type=int, default=300_000)
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()
torchrl_logger.setLevel("WARNING")

SIZE, COPIES, STEPS = 4, 256, 12
WELFARES = {
    "shares 10 : 1": {"welfare": "utilitarian", "shares": [10.0, 1.0]},
    "max-min": {"welfare": "egalitarian"},
}
for name, welfare in WELFARES.items():
    with tempfile.TemporaryDirectory() as scratch:
        config = EnvPPOConfig(
            env_id="gridworld",
            env_options={"stay": True, "move_cost": 0.05, "once": True},
            num_envs=COPIES,
            frames_per_batch=COPIES * STEPS,
            mini_batch_size=COPIES * STEPS // 2,
            total_frames=given.total_frames,
            seed=given.seed,
            output_dir=scratch,
            **welfare,
        )
        policy, env = load_env_policy(run_env_ppo(config))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        cells = env.rollout(STEPS, policy)["next", "state"][..., 0]
    first, second = ((cells == goal).any(1) for goal in (SIZE - 1, SIZE * SIZE - 1))
    print(f"{name}: both goals in {(first & second).float().mean():.1%} of {COPIES} episodes")
    passed = (cells[:, :, None] == torch.arange(SIZE * SIZE)).any(1).float().mean(0).view(SIZE, SIZE)
    print("\n".join("    " + "  ".join(f"{share:4.0%}" for share in row) for row in passed.tolist()))
