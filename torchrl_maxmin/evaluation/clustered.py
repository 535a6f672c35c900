"""Intervals clustered by who chose, which prompts were shared and which seeds were trained.

Comparisons that share a user, a prompt or a seed are not independent; an interval that counts them one by
one is too narrow. Here the clusters are the units: users (:func:`interval_over_users`), or seeds that
answer the same prompts (:func:`interval_over_seeds`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit, logit

from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES, ClusterBootstrap

__all__ = [
    "FEWEST_USERS",
    "MOST_EXTREME_RATE",
    "CoverageWarning",
    "Interval",
    "interval_over_seeds",
    "interval_over_users",
    "stack_intervals",
    "worst_of",
]

#: Below so many users, and for rates above (or as far below one half) the second number, intervals were
#: seen to miss their nominal coverage.
FEWEST_USERS = 30
MOST_EXTREME_RATE = 0.9

_ENDS = ("mean", "low", "high", "bootstrap_low", "bootstrap_high")


class CoverageWarning(UserWarning):
    """An interval may cover less often than it says."""


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """A number, or one a group, with the interval to read and the cluster bootstrap beside it.

    Attributes:
        mean: The estimate [...].
        low: Lower end [...]; NaN where there is one cluster.
        high: Upper end [...].
        bootstrap_low: Lower end of the percentile interval of the cluster bootstrap [...].
        bootstrap_high: Its upper end.
        clusters: How many of which unit, such as ``{"seeds": 3, "prompts": 200}``; a list by group where
            groups differ.
        notes: Why coverage may be short of nominal, or the estimate biased; plain sentences.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bootstrap_low: np.ndarray
    bootstrap_high: np.ndarray
    clusters: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            **{end: np.asarray(getattr(self, end)).tolist() for end in _ENDS},
            "clusters": self.clusters,
            "notes": list(self.notes),
        }


def interval_over_users(
    user_means: ArrayLike,
    *,
    scale: str = "logit",
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over a population of users, from one mean a user.

    t interval over the users' means, each user counted once; on the logit scale for rates: the standard
    error divided by m (1 - m) around logit m, so that the ends stay within (0, 1).

    Simulated (`reproductions/coverage`, 2000 studies a cell; population means .2 to .8; user logits scattered
    by 0, .5, 1; 4 and 20 answers a user), a nominal 95% covers .938 to .965 with 30 to 200 users, and .939 to
    .950 with 10 users of 20 answers scattered by 1. There the bootstrap over users covers .87 to .91, with 30
    users .92 to .94. The naive bootstrap over pairs takes a user's 20 answers for 20 users: .65 to .73, with
    200 users as with 10. At a rate of .98, 30 users of one answer each, both bootstraps cover .45.

    Args:
        user_means: One mean a user [U, ...], such as the share of comparisons that the policy won.
        scale: ``logit`` for rates, ``identity`` for rewards and paired differences.
        confidence: Coverage asked for.
        num_resamples: Resamples of users for the bootstrap beside it.
        seed: Seed of the resampling.

    Returns:
        :class:`Interval`. With one user the ends are NaN. A rate of exactly 0 or 1 gets the exact binomial
        bound for U users that agree.

    Raises:
        ValueError: Without users, on NaN, on rates outside [0, 1] or an unknown scale.

    Warns:
        CoverageWarning: Under 30 users, or for a rate above .9 or below .1.

    Example:
        >>> import numpy as np
        >>> rates = np.random.default_rng(0).binomial(20, 0.6, size=(100,)) / 20
        >>> found = interval_over_users(rates)
        >>> bool(found.low < 0.6 < found.high), found.clusters
        (True, {'users': 100})
    """
    values = _checked(user_means, 1, scale)
    num_users = len(values)
    mean = values.mean(axis=0)
    variance = values.var(axis=0, ddof=1) / num_users if num_users > 1 else np.full(mean.shape, np.nan)
    half = stats.t.ppf((1 + confidence) / 2, max(num_users - 1, 1)) * np.sqrt(variance)
    low, high = _ends(mean, half, scale, num_users, confidence)
    # One "seed" of U "prompts": the resamples are those of users.
    bootstrap = ClusterBootstrap(1, num_users, num_resamples=num_resamples, seed=seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    boot_low, boot_high = np.quantile(bootstrap.means(values[None]), tails, axis=0)
    notes = []
    if num_users < FEWEST_USERS:
        notes.append(f"{num_users} users are few: under {FEWEST_USERS} the interval may be too narrow")
    notes += _extreme(mean, scale)
    _warn(notes)
    return Interval(mean, low, high, boot_low, boot_high, {"users": num_users}, tuple(notes))


def interval_over_seeds(
    values: ArrayLike,
    *,
    scale: str = "logit",
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over training seeds and prompts, where all seeds answer the same prompts.

    With V_seed, V_prompt and V_interaction the variance between seed means over S, between prompt means
    over N, and of the rest over S N, the half-width is

        half^2 = t(S - 1)^2 V_seed + z^2 max(V_prompt - V_interaction, 0):

    a t interval over seeds, plus what the prompts that all seeds share add and no scatter between seeds
    can show. V_interaction is taken off as it is in V_prompt too, and once is enough. On the logit scale
    half is divided by m (1 - m).

    Simulated (`reproductions/coverage`, 2000 studies a cell; means .2 to .8; seeds scattered by .3 on the
    logit, prompts by 1, the two together by .5; 200 prompts of 4 answers), a nominal 95% covers .954 to .967
    with 3 seeds and .953 to .962 with 6. Where seeds hardly differ (by .1) it goes up to .980, as t takes
    the prompts' noise for theirs. Beside it, 3 / 6 seeds: the bootstrap over seeds and prompts .86 to .89 /
    .92 to .94; percentiles over seeds .73 to .74 / .80 to .82, and .62 to .68 where seeds hardly differ; the
    naive bootstrap over pairs .40 to .47 / .36 to .43. With 2 seeds t is 12.7: the interval is honest and
    says next to nothing.

    Args:
        values: [S, N, ...]: seed by seed, and the same prompts in the same order for all.
        scale: ``logit`` for rates, ``identity`` for rewards and paired differences.
        confidence: Coverage asked for.
        num_resamples: Resamples of seeds, then prompts, for the bootstrap beside it.
        seed: Seed of the resampling.

    Returns:
        :class:`Interval`. With one seed it holds chance of the prompts only, with one prompt chance of the
        seeds only, and ``notes`` say so.

    Raises:
        ValueError: Without values, on NaN, on rates outside [0, 1] or an unknown scale.

    Warns:
        CoverageWarning: For a rate above .9 or below .1.

    Example:
        >>> import numpy as np
        >>> rates = np.random.default_rng(1).binomial(4, 0.6, size=(3, 200)) / 4
        >>> found = interval_over_seeds(rates)
        >>> bool(found.low < 0.6 < found.high), found.clusters
        (True, {'seeds': 3, 'prompts': 200})
    """
    array = _checked(values, 2, scale)
    num_seeds, num_prompts = array.shape[:2]
    mean = array.mean(axis=(0, 1))
    by_seed, by_prompt = array.mean(axis=1), array.mean(axis=0)
    prompts = by_prompt.var(axis=0, ddof=1) / num_prompts if num_prompts > 1 else np.zeros(mean.shape)
    z = stats.norm.ppf((1 + confidence) / 2)
    if num_seeds > 1:
        t = stats.t.ppf((1 + confidence) / 2, num_seeds - 1)
        rest = array - by_seed[:, None] - by_prompt[None] + mean
        freedom = (num_seeds - 1) * max(num_prompts - 1, 1)
        interaction = (rest**2).sum(axis=(0, 1)) / freedom / (num_seeds * num_prompts)
        between = by_seed.var(axis=0, ddof=1) / num_seeds
        half = np.sqrt(t**2 * between + z**2 * np.maximum(prompts - interaction, 0))
    elif num_prompts > 1:
        half = stats.t.ppf((1 + confidence) / 2, num_prompts - 1) * np.sqrt(prompts)
    else:
        half = np.full(mean.shape, np.nan)
    low, high = _ends(mean, half, scale, num_prompts, confidence)
    bootstrap = ClusterBootstrap(num_seeds, num_prompts, num_resamples=num_resamples, seed=seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    boot_low, boot_high = np.quantile(bootstrap.means(array), tails, axis=0)
    notes = _extreme(mean, scale)
    _warn(notes)
    if num_seeds == 1:
        notes.append("one seed: the interval says nothing of another training run")
    if num_prompts == 1:
        notes.append("one prompt: the interval says nothing of other prompts")
    clusters = {"seeds": num_seeds, "prompts": num_prompts}
    return Interval(mean, low, high, boot_low, boot_high, clusters, tuple(notes))


def stack_intervals(intervals: Sequence[Interval]) -> Interval:
    """One interval [G] from one a group, such as groups with users of their own.

    Raises:
        ValueError: If there is none.
    """
    if not intervals:
        raise ValueError("no groups to put together")
    units = dict.fromkeys(unit for interval in intervals for unit in interval.clusters)
    ends: dict[str, Any] = {
        end: np.stack([getattr(interval, end) for interval in intervals]) for end in _ENDS
    }
    return Interval(
        **ends,
        clusters={unit: [interval.clusters.get(unit) for interval in intervals] for unit in units},
        notes=tuple(dict.fromkeys(note for interval in intervals for note in interval.notes)),
    )


def worst_of(groups: Interval) -> tuple[int, Interval]:
    """The worst group: its index, and [smallest of the lows, smallest of the highs].

    Simulated (`reproductions/coverage`, 2000 studies; the worse of two groups at .6, the other 0, .05 or .1
    above), a nominal 95% covers the true minimum .952 to .969 with 30 and 100 users, .959 to .977 with 3 and
    6 seeds. A t interval over every seed's own minimum covers .89 / .72 with 3 / 6 seeds where the groups are
    equal: each minimum is biased low (by .02 here), and more seeds do not mend that.

    Args:
        groups: An interval over groups [G].

    Returns:
        ``(index, interval)``; its notes begin with the bias of its point estimate.

    Example:
        >>> import numpy as np
        >>> rates = np.random.default_rng(0).binomial(20, [0.8, 0.5], size=(50, 2)) / 20
        >>> index, worst = worst_of(interval_over_users(rates))
        >>> index, worst.notes
        (1, ('the smallest of 2 noisy means is biased low, most where the groups are close',))
    """
    count = len(np.atleast_1d(groups.mean))
    index = int(np.argmin(groups.mean))
    bias = (f"the smallest of {count} noisy means is biased low, most where the groups are close",)
    ends: dict[str, Any] = {end: np.min(getattr(groups, end)) for end in _ENDS}
    notes = (bias if count > 1 else ()) + groups.notes
    return index, Interval(**ends, clusters=groups.clusters, notes=notes)


def _checked(values: ArrayLike, dims: int, scale: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    shape = "[U, ...]" if dims == 1 else "[S, N, ...]"
    if array.ndim < dims or array.size == 0:
        raise ValueError(f"values must be {shape} and not empty, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("values hold NaN or infinity; drop those users or prompts first")
    if scale not in ("logit", "identity"):
        raise ValueError(f"scale is 'logit' (rates) or 'identity', not {scale!r}")
    if scale == "logit" and (array.min() < 0 or array.max() > 1):
        raise ValueError("rates must lie in [0, 1]; give scale='identity' for rewards and differences")
    return array


def _ends(
    mean: np.ndarray, half: np.ndarray, scale: str, count: int, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    if scale == "identity":
        return mean - half, mean + half
    inside = np.clip(mean, 1e-12, 1 - 1e-12)
    width = half / (inside * (1 - inside))
    # Without any scatter (a policy against itself) there is no width either, and no rounding.
    low, high = (np.where(half == 0, mean, expit(logit(inside) + side * width)) for side in (-1, 1))
    # Never a loss in so many units: how often losses could be and still stay unseen.
    unseen = 1 - ((1 - confidence) / 2) ** (1 / count)
    return np.where(mean == 1, 1 - unseen, low), np.where(mean == 0, unseen, high)


def _extreme(mean: np.ndarray, scale: str) -> list[str]:
    if scale == "logit" and np.any(np.abs(mean - 0.5) > MOST_EXTREME_RATE - 0.5):
        low = 1 - MOST_EXTREME_RATE
        return [f"a rate above {MOST_EXTREME_RATE:g} or below {low:.1f}: the interval may be too narrow"]
    return []


def _warn(notes: Sequence[str]) -> None:
    for note in notes:
        warnings.warn(note, CoverageWarning, stacklevel=3)
