"""Environments: one step for a whole response of tokens, and tabular processes with exact answers."""

from torchrl_maxmin.envs.exact import (
    ExactPolicy,
    VectorMDP,
    best_responses,
    solve_leximin,
    solve_max_min,
    solve_weighted,
)
from torchrl_maxmin.envs.tabular import TabularEnv
from torchrl_maxmin.envs.token import TokenEnv

__all__ = [
    "ExactPolicy",
    "TabularEnv",
    "TokenEnv",
    "VectorMDP",
    "best_responses",
    "solve_leximin",
    "solve_max_min",
    "solve_weighted",
]
