"""Environments with one reward a group."""

from torchrl_maxmin.envs.token import TokenEnv

__all__ = ["TokenEnv"]
