"""Rewards of K linear heads and the minimum over them."""

from .naive import min_over_heads_naive, reward_heads_min_naive
from .op import min_over_heads, reward_heads_min

__all__ = ["min_over_heads", "min_over_heads_naive", "reward_heads_min", "reward_heads_min_naive"]
