"""Pairs and users in: schemas, checks, tokenising, and the embedded world."""

from torchrl_maxmin.preferences.dataset import PreferenceDataset, encode
from torchrl_maxmin.preferences.loading import load_table
from torchrl_maxmin.preferences.world import World

__all__ = ["PreferenceDataset", "World", "encode", "load_table"]
