"""Environments with a reward for every group: token generation, tabular processes and batched classics.

What :func:`make_env` makes by name, and the exact answers that the small ones have.
"""

from torchrl_maxmin.envs.batched import BatchedEnv
from torchrl_maxmin.envs.exact import (
    ExactPolicy,
    VectorMDP,
    best_responses,
    solve_max_min,
    solve_weighted,
)
from torchrl_maxmin.envs.fishwood import FishwoodEnv
from torchrl_maxmin.envs.fruit_tree import FruitTreeEnv
from torchrl_maxmin.envs.gridworld import GridworldEnv
from torchrl_maxmin.envs.group_reward import GroupReward
from torchrl_maxmin.envs.making import make_env
from torchrl_maxmin.envs.tabular import TabularEnv
from torchrl_maxmin.envs.token import TokenEnv

__all__ = [
    "BatchedEnv",
    "ExactPolicy",
    "FishwoodEnv",
    "FruitTreeEnv",
    "GridworldEnv",
    "GroupReward",
    "TabularEnv",
    "TokenEnv",
    "VectorMDP",
    "best_responses",
    "make_env",
    "solve_max_min",
    "solve_weighted",
]
