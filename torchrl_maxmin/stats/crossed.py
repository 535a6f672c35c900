"""Estimate means over users who answered prompts that others answered too: both are clusters.

What is hard about a prompt is hard for everybody who meets it. Where few prompts are shared by many users,
that does not average out over users, and an interval over users alone is too narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from torchrl_maxmin.stats.clustered import NUM_RESAMPLES, interval_over_users
from torchrl_maxmin.stats.ends import TEnds, checked, coverage_notes
from torchrl_maxmin.stats.interval import Interval

__all__ = ["FEWEST_PROMPTS", "interval_over_users_and_prompts", "prompt_ids", "shared_correlation"]

#: With fewer shared prompts the result says so.
FEWEST_PROMPTS = 20


def prompt_ids(prompts: Iterable[Any]) -> np.ndarray:
    """Number prompts [P] in order of first appearance; None and empty ones are each of its own.

    Example:
        >>> prompt_ids(["a", "", "b", "a", None]).tolist()
        [0, 1, 2, 0, 3]
    """
    seen: dict[Any, int] = {}
    keys = ((None, row) if each is None or each == "" else each for row, each in enumerate(prompts))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def interval_over_users_and_prompts(
    values: ArrayLike,
    users: Sequence[Any] | np.ndarray,
    prompts: Iterable[Any],
    *,
    row_weights: ArrayLike | None = None,
    scale: str = "logit",
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    warn: bool = True,
) -> Interval:
    """Estimate the mean over users and prompts from single answers; each user counts once.

    The variance of the mean over users is clustered both ways: V_user + V_prompt - V_both, no less than the
    larger of V_user and V_prompt (Cameron, Gelbach & Miller 2011, "Robust inference with multiway
    clustering", Journal of Business & Economic Statistics 29), where V_both takes a user's answers to one
    prompt together. V_user keeps a t of its users, what prompts add to it a t of the prompts:

        half^2 = t(U - 1)^2 V_user + t(N - 1)^2 (V - V_user).

    Simulated (`reproductions/coverage/crossed.py`, 1000 studies a cell; 60 users who answer all prompts, some
    or two; logits of users and of prompts scattered by .5 and 1, or prompts alike), a nominal 95% covers .936
    to .974 with 10 prompts, .933 to .967 with 30 and .943 to .966 with 100. An interval over users alone goes
    down to .51, .60 and .73.

    Args:
        values: One outcome an answer [P, ...].
        users: Who gave it [P].
        prompts: What it was about [P]; None and empty prompts are shared with nobody.
        row_weights: How much each answer counts within its user [P].
        scale: ``logit`` for rates, ``identity`` for rewards and paired differences.
        confidence: Coverage asked for.
        num_resamples: Resamples of users for the bootstrap beside it, which leaves prompts as they are; 0 for
            none.
        seed: Seed of the resampling.
        warn: Whether ``notes`` are warnings too.

    Returns:
        :class:`Interval` with ``clusters`` {users, prompts}; that of
        :func:`~torchrl_maxmin.stats.interval_over_users` where no two users share a prompt.

    Raises:
        ValueError: If lengths disagree, without values, on NaN, rates outside [0, 1] or an unknown scale.

    Warns:
        CoverageWarning: Under 30 users, under 20 prompts that users share, or for a rate above .9 or below
            .1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> users, prompts = np.repeat(np.arange(60), 20), np.tile(np.arange(20), 60)
        >>> right = rng.random(1200) < 0.3 + 0.4 * rng.random(20)[prompts]
        >>> found = interval_over_users_and_prompts(right, users, prompts)
        >>> found.clusters, bool(found.low < 0.5 < found.high)
        ({'users': 60, 'prompts': 20}, True)
    """
    array, ids = checked(values, 1, scale), prompt_ids(prompts)
    of = np.unique(np.asarray(users), return_inverse=True)[1]
    if not len(array) == len(of) == len(ids):
        raise ValueError(f"{len(array)} values, {len(of)} users and {len(ids)} prompts; give one an answer")
    weights = np.ones(len(of)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    num_users, num_prompts = int(of.max()) + 1, int(ids.max()) + 1
    total = np.bincount(of, weights)
    # A sum over a total: users who are always right come to 1 without rounding.
    means = _sums(_by_row(weights, array) * array, of) / _by_row(total, array)
    shares = _by_row(weights / total[of], array)
    settings: dict[str, Any] = {"scale": scale, "confidence": confidence}
    alone = interval_over_users(means, **settings, num_resamples=num_resamples, seed=seed, warn=warn)
    clusters = {"users": num_users, "prompts": num_prompts}
    both = np.unique(of * num_prompts + ids, return_inverse=True)[1]
    if both.max() + 1 == num_prompts:
        return dataclasses.replace(alone, clusters=clusters)
    centred = shares * (array - means.mean(axis=0)) / num_users
    by_user, by_prompt, by_both = (_variance(centred, groups) for groups in (of, ids, both))
    # V - V_user, where V is at least V_prompt.
    added = np.maximum(by_prompt - np.minimum(by_both, by_user), 0)
    notes = list(alone.notes)
    if num_prompts < FEWEST_PROMPTS:
        few = f"{num_prompts} prompts that users share are few: under {FEWEST_PROMPTS} the interval may be"
        few += " too narrow"
        notes += coverage_notes([few], alone.estimate, "identity", warn)
    if num_users == 1 or num_prompts == 1:
        return dataclasses.replace(alone, clusters=clusters, notes=tuple(notes))
    parts = ((by_user, num_users - 1), (added, num_prompts - 1))
    ends_at = TEnds(alone.estimate, parts, scale, min(num_users, num_prompts))
    bootstrap = alone.bootstrap_low, alone.bootstrap_high
    return ends_at.interval(
        confidence, "t over users and prompts", bootstrap, clusters=clusters, notes=tuple(notes)
    )


def shared_correlation(
    values: np.ndarray, users: np.ndarray, prompts: np.ndarray, groups: np.ndarray, errors: np.ndarray
) -> float:
    """Estimate the mean correlation of two groups' errors that prompts which both answered give them.

    Args:
        values: One outcome an answer [P].
        users: Who gave it [P], 0..U-1.
        prompts: What it was about [P], 0..N-1.
        groups: The user's group [P], 0..G-1.
        errors: Standard errors of the groups' means [G].

    Returns:
        The correlation, at least 0; 0 for one group or where an error is 0 or not known.
    """
    count, num_prompts = len(errors), int(prompts.max()) + 1
    if count == 1 or num_prompts == 1 or not np.all(errors > 0):
        return 0.0
    shares = 1 / np.bincount(users)[users]
    total = np.bincount(groups, shares)
    means = np.bincount(groups, shares * values) / total
    centred = shares * (values - means[groups]) / (total * errors)[groups]
    sums = np.bincount(prompts * count + groups, centred, num_prompts * count).reshape(num_prompts, count)
    pairs = (sums.sum(axis=1) ** 2 - (sums**2).sum(axis=1)).sum() * num_prompts / (num_prompts - 1)
    return float(np.clip(pairs / (count * (count - 1)), 0, 1))


def _by_row(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    return weights.reshape(-1, *[1] * (values.ndim - 1))


def _sums(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Sums over clusters [C, ...] of values [P, ...]."""
    member = csr_array((np.ones(len(of)), (of, np.arange(len(of)))))
    return (member @ values.reshape(len(of), -1)).reshape(-1, *values.shape[1:])


def _variance(centred: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Cluster-robust variance of a sum of centred values [P, ...]; of one cluster, NaN."""
    sums = _sums(centred, of)
    return (sums**2).sum(axis=0) * (len(sums) / (len(sums) - 1) if len(sums) > 1 else np.nan)
