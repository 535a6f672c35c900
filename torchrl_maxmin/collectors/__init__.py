"""Rollouts with group utilities and group weights."""

from torchrl_maxmin.collectors.maxmin import MaxMinCollector
from torchrl_maxmin.welfare.statistics import GroupStatistics

__all__ = ["GroupStatistics", "MaxMinCollector"]
