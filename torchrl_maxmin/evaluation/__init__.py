"""Results by group, with intervals: win rates, alignment gap, summary, report and figures.

Importing this costs NumPy and SciPy. Figures need the ``plot`` extra. What one reward for all costs the
groups is :mod:`torchrl_maxmin.diagnosis`.
"""

from torchrl_maxmin.evaluation.gap import AlignmentGap, alignment_gap
from torchrl_maxmin.evaluation.judges import EndpointJudge, judge_pairs, reward_judge, truth_judge
from torchrl_maxmin.evaluation.plots import plot_training, plot_win_rates
from torchrl_maxmin.evaluation.report import rich_table, write_report
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.evaluation.summary import load_summary, summarise, write_summary
from torchrl_maxmin.stats import GroupWinRates, group_win_rates, rates_by_group, user_win_rates, win_matrix

__all__ = [
    "AlignmentGap", "EndpointJudge", "GroupWinRates", "SeedResult", "alignment_gap", "group_win_rates",
    "judge_pairs", "load_summary", "plot_training", "plot_win_rates", "rates_by_group", "reward_judge",
    "rich_table", "summarise", "truth_judge", "user_win_rates", "win_matrix", "write_report", "write_summary",
]  # fmt: skip
