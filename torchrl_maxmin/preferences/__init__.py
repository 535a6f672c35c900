"""Pairs and users in: files, schemas, checks, texts as tokens."""

from torchrl_maxmin._moved import moved_names
from torchrl_maxmin.preferences.dataset import PreferenceDataset, Ranking
from torchrl_maxmin.preferences.io.files import load_table
from torchrl_maxmin.preferences.report import DataReport
from torchrl_maxmin.preferences.texts import encode

__all__ = ["DataReport", "PreferenceDataset", "Ranking", "encode", "load_table"]

__getattr__ = moved_names(__name__)
