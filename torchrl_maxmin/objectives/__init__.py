"""K-column advantages, their scalarisation by group weights, and the MaxMin PPO loss."""

from torchrl_maxmin.objectives.masked import (
    masked_explained_variance,
    masked_mean,
    ratio_statistics,
    whiten,
)
from torchrl_maxmin.objectives.maxmin_ppo import MaxMinPPOLoss
from torchrl_maxmin.objectives.scalarise import scalarise_advantage
from torchrl_maxmin.objectives.vector_gae import VectorGAE

__all__ = [
    "MaxMinPPOLoss",
    "VectorGAE",
    "masked_explained_variance",
    "masked_mean",
    "ratio_statistics",
    "scalarise_advantage",
    "whiten",
]
