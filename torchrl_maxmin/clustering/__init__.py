"""Who belongs to which group: EM over users' choices, the choice of K, and how sure the groups are."""

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import EMSettings, expectation, mixing_weights, run_em
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices, fit_linear_mixture
from torchrl_maxmin.clustering.selection import NumGroupsChoice, select_l2, select_num_groups
from torchrl_maxmin.clustering.solvers import fit_bradley_terry

__all__ = [
    "EMSettings",
    "LinearMixture",
    "NumGroupsChoice",
    "PairChoices",
    "expectation",
    "fit_bradley_terry",
    "fit_choices",
    "fit_linear_mixture",
    "mixing_weights",
    "run_em",
    "select_l2",
    "select_num_groups",
]
