"""Results by group, with intervals: win rates, alignment gap, summary, report and figures.

Pure NumPy and SciPy; nothing here trains anything. Figures need the ``plot`` extra.
"""

from torchrl_maxmin.evaluation.gap import AlignmentGap, alignment_gap
from torchrl_maxmin.evaluation.intervals import ClusterBootstrap, Estimate, estimate
from torchrl_maxmin.evaluation.plots import plot_training, plot_win_rates
from torchrl_maxmin.evaluation.report import rich_table, write_report
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.evaluation.summary import summarise, write_summary
from torchrl_maxmin.evaluation.win_rates import (
    GroupWinRates,
    PolicyComparison,
    compare_policies,
    group_win_rates,
    win_matrix,
)

__all__ = [
    "AlignmentGap",
    "ClusterBootstrap",
    "Estimate",
    "GroupWinRates",
    "PolicyComparison",
    "SeedResult",
    "alignment_gap",
    "compare_policies",
    "estimate",
    "group_win_rates",
    "plot_training",
    "plot_win_rates",
    "rich_table",
    "summarise",
    "win_matrix",
    "write_report",
    "write_summary",
]
