"""Mixtures of linear Bradley-Terry rewards on frozen features: the fit, and how many groups there are.

They take seconds, find who belongs together, and say whether the users differ at all. They are the warm
start of the real reward model and never a reward themselves: frozen heads cluster users well and are
useless to train a policy on.
"""

from torchrl_maxmin.rewards.choices import expectation, fit_bradley_terry
from torchrl_maxmin.rewards.linear_em import LinearMixture, fit_linear_mixture
from torchrl_maxmin.rewards.selection import NumGroupsChoice, select_l2, select_num_groups
from torchrl_maxmin.rewards.user_em import mixing_weights

__all__ = [
    "LinearMixture",
    "NumGroupsChoice",
    "expectation",
    "fit_bradley_terry",
    "fit_linear_mixture",
    "mixing_weights",
    "select_l2",
    "select_num_groups",
]
