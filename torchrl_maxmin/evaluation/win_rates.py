"""Win rates by group: how often a group prefers one policy's sample to another's, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.evaluation.group_rates import GroupRates, rates_by_group
from torchrl_maxmin.evaluation.intervals import (
    NUM_RESAMPLES,
    ClusterBootstrap,
    Estimate,
    estimate,
    minimum_of,
)

__all__ = [
    "GroupWinRates",
    "PolicyComparison",
    "compare_policies",
    "compare_win_matrices",
    "group_win_rates",
    "rates_from_win_matrix",
    "win_matrix",
]


def win_matrix(utilities: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """Share of sample pairs that each group prefers, prompt by prompt.

    For a prompt and a group, the mean over all M x M' pairs of
    1[u_policy > u_reference] + 1/2 1[u_policy = u_reference].

    Args:
        utilities: The policy's utilities [..., M, G].
        reference: The other policy's utilities [..., M', G], same prompts in the same order.

    Returns:
        [..., G] float64 in [0, 1].

    Raises:
        ValueError: If shapes disagree, a dimension is empty or a number is NaN.

    Example:
        >>> win_matrix([[[1.0], [0.0]]], [[[0.0], [0.0]]])
        array([[0.75]])
    """
    policy, other = np.asarray(utilities), np.asarray(reference)
    if policy.ndim < 3 or policy.ndim != other.ndim:
        raise ValueError(
            "utilities and reference must both be [N, M, G] (or [S, N, M, G]); got "
            f"{list(policy.shape)} and {list(other.shape)}"
        )
    if policy.shape[:-2] != other.shape[:-2] or policy.shape[-1] != other.shape[-1]:
        raise ValueError(
            "utilities and reference must share seeds, prompts and groups (only the number of samples may "
            f"differ); got {list(policy.shape)} and {list(other.shape)}"
        )
    if policy.size == 0 or other.size == 0:
        raise ValueError(f"nothing to compare: {list(policy.shape)} against {list(other.shape)}")
    if np.isnan(policy).any() or np.isnan(other).any():
        raise ValueError("utilities hold NaN, which a comparison would count as a loss; drop those samples")
    total = np.zeros((*policy.shape[:-2], policy.shape[-1]))
    # One sample at a time keeps memory at [S, N, M', G].
    for sample in range(policy.shape[-2]):
        own = policy[..., sample : sample + 1, :]
        total += (own > other).mean(axis=-2) + 0.5 * (own == other).mean(axis=-2)
    return total / policy.shape[-2]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupWinRates:
    """Win rates of one policy against another, by group.

    Attributes:
        group_names: The G groups.
        groups: Win rates by group [G]; ``groups.per_seed`` is [S, G].
        worst_group_name: The group with the smallest pooled win rate.
        worst_group: Its win rate; ``low`` is the smallest low, ``high`` the smallest high over groups. The
            minimum of noisy means is biased low, most where the groups are close.
        average: Unweighted mean over groups.
        clustered: The same rates with the intervals to report: t over seeds plus the component of the
            prompts that they share. None where it was not asked for.
    """

    group_names: tuple[str, ...]
    groups: Estimate
    worst_group_name: str
    worst_group: Estimate
    average: Estimate
    clustered: GroupRates | None = None

    @property
    def mean(self) -> np.ndarray:
        """Win rate by group [G]."""
        return self.groups.mean

    @property
    def low(self) -> np.ndarray:
        """Lower ends by group [G]."""
        return self.groups.low

    @property
    def high(self) -> np.ndarray:
        """Upper ends by group [G]."""
        return self.groups.high

    @property
    def per_seed(self) -> np.ndarray:
        """Win rates by seed and group [S, G]."""
        return self.groups.per_seed


def group_win_rates(
    utilities: ArrayLike,
    reference: ArrayLike,
    *,
    group_names: Sequence[str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> GroupWinRates:
    """Win rates by group of a policy against a reference, with intervals.

    The reference may be any other policy that answered the same prompts; ties count one half. Two kinds of
    interval come back:

    * ``.clustered``, to report: t over seeds plus the component of the prompts that all seeds share,
      half^2 = t^2 V_seed + 1.96^2 (V_prompt - V_interaction)+. Simulated, a nominal 95% covers .954 to .967
      with 3 seeds and .953 to .962 with 6 (rates .2 to .8); above .9 it warns. The worst group's interval is
      [smallest low, smallest high] over groups, and its point estimate is biased low.
    * ``.low``/``.high``, percentiles of the bootstrap: seeds are resampled first, then prompts, the same
      prompts for all seeds. With few seeds it is too narrow: .86 to .89 with 3 seeds in the same simulation.
      Narrower still are percentiles over seeds alone (.73 to .74 with 3 seeds, .80 to .82 with 6), and the
      naive bootstrap over pairs, which takes responses to one prompt by one policy for independent (.36 to
      .47).

    With one seed both hold the chance of the prompts only. For comparisons that people made see
    :func:`~torchrl_maxmin.evaluation.group_rates.user_win_rates`, for judges
    :func:`~torchrl_maxmin.evaluation.judges.judge_pairs`.

    Args:
        utilities: The policy's utilities [S seeds, N prompts, M samples, G groups] or [N, M, G].
        reference: The other policy's utilities, same prompts in the same order; M may differ.
        group_names: Names of the G groups; "0", "1", ... if None.
        confidence: Coverage asked for.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        :class:`GroupWinRates`.

    Raises:
        ValueError: If shapes disagree or utilities hold NaN.

    Warns:
        CoverageWarning: For a rate above .9 or below .1.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> sft, better = rng.normal(size=(3, 100, 4, 2)), rng.normal(size=(3, 100, 4, 2)) + [1.0, 0.2]
        >>> rates = group_win_rates(better, sft, group_names=["majority", "minority"])
        >>> rates.worst_group_name
        'minority'
        >>> bool(rates.clustered.worst_group.low < rates.clustered.worst_group.mean)
        True
    """
    matrix = win_matrix(utilities, reference)
    if matrix.ndim == 2:
        matrix = matrix[None]
    if matrix.ndim != 3:
        raise ValueError(f"utilities must be [S, N, M, G] or [N, M, G], got {list(np.shape(utilities))}")
    bootstrap = ClusterBootstrap(*matrix.shape[:2], num_resamples=num_resamples, seed=seed)
    names = [str(k) for k in range(matrix.shape[-1])] if group_names is None else group_names
    rates = rates_from_win_matrix(matrix, names, bootstrap, confidence=confidence)
    clustered = rates_by_group(matrix, names, confidence=confidence, num_resamples=num_resamples, seed=seed)
    return dataclasses.replace(rates, clustered=clustered)


def rates_from_win_matrix(
    matrix: np.ndarray, group_names: Sequence[str], bootstrap: ClusterBootstrap, *, confidence: float = 0.95
) -> GroupWinRates:
    """:func:`group_win_rates` from a win matrix [S, N, G] and resamples that are shared.

    Raises:
        ValueError: If names and groups differ in number.
    """
    if len(group_names) != matrix.shape[-1]:
        raise ValueError(f"{len(group_names)} group names for {matrix.shape[-1]} groups")
    groups = estimate(matrix, bootstrap, scale="logit", confidence=confidence)
    average = estimate(matrix.mean(axis=-1), bootstrap, scale="logit", confidence=confidence)
    worst, worst_group = minimum_of(groups)
    return GroupWinRates(tuple(group_names), groups, group_names[worst], worst_group, average)


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyComparison:
    """One policy's win rates relative to a baseline's, both against the same reference.

    Attributes:
        worst_group_relative_gain: min over groups of the policy / min over groups of the baseline - 1.
            The minimum is taken of the pooled win rates, and may be another group for each policy.
        average_relative_gain: The same for the unweighted average over groups.
        majority_relative_change: The same for the group with the largest share.
        majority_group: Index of that group.
    """

    worst_group_relative_gain: Estimate
    average_relative_gain: Estimate
    majority_relative_change: Estimate
    majority_group: int


def compare_policies(
    utilities: ArrayLike,
    baseline: ArrayLike,
    reference: ArrayLike,
    group_shares: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PolicyComparison:
    """Relative gain of a policy over a baseline, from win rates against a common reference.

    Policy and baseline are resampled together, so the interval is that of a paired comparison.

    Args:
        utilities: The policy's utilities [S, N, M, G] or [N, M, G].
        baseline: The baseline's utilities.
        reference: The reference's utilities.
        group_shares: Population shares [G]; the first largest one is the majority.
        confidence: Coverage asked for.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        :class:`PolicyComparison`. A baseline that never wins gives infinity or NaN.

    Raises:
        ValueError: If shapes disagree or utilities hold NaN.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> sft, single, maxmin = (rng.normal(size=(2, 100, 4, 2)) for _ in range(3))
        >>> compared = compare_policies(maxmin + 1.0, single + [2.0, -1.0], sft, [0.9, 0.1])
        >>> bool(compared.worst_group_relative_gain.mean > 1.0)
        True
    """
    first, second = win_matrix(utilities, reference), win_matrix(baseline, reference)
    if first.ndim == 2:
        first, second = first[None], second[None]
    bootstrap = ClusterBootstrap(*first.shape[:2], num_resamples=num_resamples, seed=seed)
    return compare_win_matrices(first, second, group_shares, bootstrap, confidence=confidence)


def compare_win_matrices(
    matrix: np.ndarray,
    baseline: np.ndarray,
    group_shares: Sequence[float],
    bootstrap: ClusterBootstrap,
    *,
    confidence: float = 0.95,
) -> PolicyComparison:
    """:func:`compare_policies` from two win matrices [S, N, G] and resamples that are shared.

    Raises:
        ValueError: If shares and groups differ in number.
    """
    if len(group_shares) != matrix.shape[-1]:
        raise ValueError(f"{len(group_shares)} group shares for {matrix.shape[-1]} groups")
    majority = int(np.argmax(group_shares))
    both = np.stack([matrix, baseline], axis=2)  # [S, N, 2, G]

    def relative(summary: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return summary[..., 0] / summary[..., 1] - 1

    def of(statistic) -> Estimate:
        return estimate(both, bootstrap, statistic=statistic, scale="log_ratio", confidence=confidence)

    return PolicyComparison(
        worst_group_relative_gain=of(lambda means: relative(means.min(axis=-1))),
        average_relative_gain=of(lambda means: relative(means.mean(axis=-1))),
        majority_relative_change=of(lambda means: relative(means[..., majority])),
        majority_group=majority,
    )
