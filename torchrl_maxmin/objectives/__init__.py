"""K-column advantages, their scalarisation by group weights, and the MaxMin PPO loss."""

from torchrl_maxmin.masks import masked_explained_variance, masked_mean, ratio_statistics, whiten
from torchrl_maxmin.objectives.advantage import MaxMinAdvantage
from torchrl_maxmin.objectives.functional import KL_ESTIMATORS, kl_estimate, scalarise_advantage
from torchrl_maxmin.objectives.maxmin_ppo import MaxMinPPOLoss
from torchrl_maxmin.objectives.response_advantage import REWARD_SCALES, grpo_advantage, rloo_advantage
from torchrl_maxmin.objectives.vector_gae import VectorGAE
from torchrl_maxmin.objectives.vector_td import VectorTD0, VectorTD1, VectorTDLambda, VectorVTrace

__all__ = [
    "KL_ESTIMATORS",
    "REWARD_SCALES",
    "MaxMinAdvantage",
    "MaxMinPPOLoss",
    "VectorGAE",
    "VectorTD0",
    "VectorTD1",
    "VectorTDLambda",
    "VectorVTrace",
    "grpo_advantage",
    "kl_estimate",
    "masked_explained_variance",
    "masked_mean",
    "ratio_statistics",
    "rloo_advantage",
    "scalarise_advantage",
    "whiten",
]
