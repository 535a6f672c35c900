"""K-head reward models, Bradley-Terry mixtures by EM, the choice of K, calibration."""

from torchrl_maxmin.clustering.selection import select_num_groups
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.ensemble import RewardEnsemble, load_reward_model
from torchrl_maxmin.rewards.fit import fit_mixture
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.mixture_fit import MixtureFit
from torchrl_maxmin.rewards.source import RewardModule
from torchrl_maxmin.rewards.user_groups import read_groups

__all__ = [
    "Calibration",
    "MixtureFit",
    "RewardEnsemble",
    "RewardMixture",
    "RewardModule",
    "fit_mixture",
    "load_reward_model",
    "read_groups",
    "select_num_groups",
]
