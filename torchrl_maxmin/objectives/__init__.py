"""K-column advantages, their scalarisation by group weights, and the MaxMin PPO loss."""

from torchrl_maxmin.objectives.maxmin_ppo import MaxMinPPOLoss
from torchrl_maxmin.objectives.scalarise import (
    masked_explained_variance,
    masked_mean,
    scalarise_advantage,
    whiten,
)
from torchrl_maxmin.objectives.vector_gae import VectorGAE

__all__ = [
    "MaxMinPPOLoss",
    "VectorGAE",
    "masked_explained_variance",
    "masked_mean",
    "scalarise_advantage",
    "whiten",
]
