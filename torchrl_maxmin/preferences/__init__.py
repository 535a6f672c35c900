"""Pairs and users in: layouts, checks, tokenizing, and the embedded world."""

from torchrl_maxmin.preferences.dataset import PreferenceDataset, Ranking, encode
from torchrl_maxmin.preferences.loading import load_table
from torchrl_maxmin.preferences.report import DataReport
from torchrl_maxmin.preferences.world import World

__all__ = ["DataReport", "PreferenceDataset", "Ranking", "World", "encode", "load_table"]
