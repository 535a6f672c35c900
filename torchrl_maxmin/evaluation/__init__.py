"""Results by group, with intervals: win rates, alignment gap, diagnosis, summary, report and figures.

Importing this costs NumPy and SciPy; :func:`diagnose` loads torch when it is asked for. Figures need the
``plot`` extra.
"""

from typing import TYPE_CHECKING, Any

from torchrl_maxmin.evaluation.clustered import (
    CoverageWarning,
    Interval,
    interval_over_seeds,
    interval_over_users,
    worst_of,
)
from torchrl_maxmin.evaluation.endpoint import EndpointJudge
from torchrl_maxmin.evaluation.gap import AlignmentGap, alignment_gap
from torchrl_maxmin.evaluation.group_rates import GroupRates, rates_by_group, user_win_rates
from torchrl_maxmin.evaluation.intervals import ClusterBootstrap, Estimate, estimate
from torchrl_maxmin.evaluation.judges import judge_pairs, reward_judge, truth_judge
from torchrl_maxmin.evaluation.metrics import group_accuracy_by_user, group_metrics
from torchrl_maxmin.evaluation.pairwise import paired_change, pairwise_win_rates
from torchrl_maxmin.evaluation.plots import plot_training, plot_win_rates
from torchrl_maxmin.evaluation.report import rich_table, write_report
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.evaluation.summary import summarise, write_summary
from torchrl_maxmin.evaluation.theorem import distinctness, diversity, lemma1_bound, theorem1_bound
from torchrl_maxmin.evaluation.win_rates import (
    GroupWinRates,
    PolicyComparison,
    compare_policies,
    group_win_rates,
    win_matrix,
)

if TYPE_CHECKING:
    from torchrl_maxmin.evaluation.diagnosis import Diagnosis, diagnose

__all__ = [
    "AlignmentGap",
    "ClusterBootstrap",
    "CoverageWarning",
    "Diagnosis",
    "EndpointJudge",
    "Estimate",
    "GroupRates",
    "GroupWinRates",
    "Interval",
    "PolicyComparison",
    "SeedResult",
    "alignment_gap",
    "compare_policies",
    "diagnose",
    "distinctness",
    "diversity",
    "estimate",
    "group_accuracy_by_user",
    "group_metrics",
    "group_win_rates",
    "interval_over_seeds",
    "interval_over_users",
    "judge_pairs",
    "lemma1_bound",
    "paired_change",
    "pairwise_win_rates",
    "plot_training",
    "plot_win_rates",
    "rates_by_group",
    "reward_judge",
    "rich_table",
    "summarise",
    "theorem1_bound",
    "truth_judge",
    "user_win_rates",
    "win_matrix",
    "worst_of",
    "write_report",
    "write_summary",
]


def __getattr__(name: str) -> Any:
    """Load the diagnosis, and torch with it, when it is asked for."""
    if name in ("Diagnosis", "diagnose"):
        from torchrl_maxmin.evaluation import diagnosis

        return getattr(diagnosis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
