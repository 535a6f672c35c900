"""K-head reward models, Bradley-Terry mixtures by EM, the choice of K, calibration."""

from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.em import MixtureFit, fit_mixture
from torchrl_maxmin.rewards.linear import select_num_groups
from torchrl_maxmin.rewards.mixture import RewardMixture

__all__ = ["Calibration", "MixtureFit", "RewardMixture", "fit_mixture", "select_num_groups"]
