"""Estimates with intervals: over users, over seeds and prompts, by group.

``low`` and ``high`` are the interval to read, ``method`` says which; the bootstrap has its own names.
"""

from torchrl_maxmin.stats.bounded import mean_upper_bound, unseen_mass
from torchrl_maxmin.stats.changes import paired_change, relative_change
from torchrl_maxmin.stats.clustered import (
    NUM_RESAMPLES,
    ClusterBootstrap,
    interval_of_statistic,
    interval_over_seeds,
    interval_over_users,
)
from torchrl_maxmin.stats.crossed import interval_over_users_and_prompts
from torchrl_maxmin.stats.interval import SCHEMA_VERSION, CoverageWarning, Interval, stack_intervals, worst_of
from torchrl_maxmin.stats.rates import (
    GroupWinRates,
    accuracy_by_group,
    group_win_rates,
    rates_by_group,
    user_win_rates,
    win_matrix,
)

__all__ = [
    "NUM_RESAMPLES",
    "SCHEMA_VERSION",
    "ClusterBootstrap",
    "CoverageWarning",
    "GroupWinRates",
    "Interval",
    "accuracy_by_group",
    "group_win_rates",
    "interval_of_statistic",
    "interval_over_seeds",
    "interval_over_users",
    "interval_over_users_and_prompts",
    "mean_upper_bound",
    "paired_change",
    "rates_by_group",
    "relative_change",
    "stack_intervals",
    "unseen_mass",
    "user_win_rates",
    "win_matrix",
    "worst_of",
]
