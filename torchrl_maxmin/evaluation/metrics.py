"""What stands beside a win rate: reward, KL, length and length hacking by group; accuracy of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.evaluation.clustered import Interval, interval_over_seeds, interval_over_users
from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES, ClusterBootstrap

__all__ = ["group_accuracy_by_user", "group_metrics", "length_correlation"]


def group_metrics(
    rewards: ArrayLike,
    *,
    kl: ArrayLike | None = None,
    length: ArrayLike | None = None,
    group_names: Sequence[str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """A policy's reward by group, its KL and length, and how far length explains each group's reward.

    Args:
        rewards: [S seeds, N prompts, M samples, G groups] or [N, M, G].
        kl: log pi - log pi_ref of every sample [S, N, M] or [N, M].
        length: Length of every sample, same shape.
        group_names: Names of the G groups.
        confidence: Coverage asked for.
        num_resamples: Resamples of the bootstrap beside each interval.
        seed: Seed of the resampling.

    Returns:
        ``{"rewards/{group}/mean": interval, "rewards/{group}/length_correlation": interval or reason,
        "objective/kl": ..., "completions/mean_length": ...}``; each interval as
        :meth:`~torchrl_maxmin.evaluation.clustered.Interval.to_dict` gives it, and ``{"mean": None,
        "reason": why}`` for what cannot be computed.

    Raises:
        ValueError: If shapes disagree or numbers are not finite.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> length = rng.integers(5, 50, (3, 40, 4))
        >>> rewards = np.stack([length * 1.0, rng.normal(size=length.shape)], -1)
        >>> found = group_metrics(rewards, length=length)
        >>> [round(float(found[f"rewards/{k}/length_correlation"]["mean"]), 1) for k in range(2)]
        [1.0, 0.1]
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4 or values.size == 0:
        raise ValueError(f"rewards must be [S, N, M, G] or [N, M, G], got {list(np.shape(rewards))}")
    names = [str(k) for k in range(values.shape[-1])] if group_names is None else list(group_names)
    if len(names) != values.shape[-1]:
        raise ValueError(f"{len(names)} group names for {values.shape[-1]} groups")
    settings: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    out: dict[str, Any] = {}
    for k, name in enumerate(names):
        mean = interval_over_seeds(values[..., k].mean(axis=2), scale="identity", **settings)
        out[f"rewards/{name}/mean"] = mean.to_dict()
    for key, given in (("objective/kl", kl), ("completions/mean_length", length)):
        if given is None:
            out[key] = {"mean": None, "reason": f"{'kl' if key.endswith('kl') else 'length'} was not given"}
        else:
            own = _like(given, values, key)
            out[key] = interval_over_seeds(own.mean(axis=2), scale="identity", **settings).to_dict()
    for k, name in enumerate(names):
        key = f"rewards/{name}/length_correlation"
        if length is None:
            out[key] = {"mean": None, "reason": "length was not given"}
        else:
            found = length_correlation(values[..., k], _like(length, values, "length"), **settings)
            reason = "every prompt's responses are of one length or one reward"
            if values.shape[2] < 2:
                reason = "one sample a prompt: length and reward cannot be compared within a prompt"
            out[key] = found.to_dict() if found is not None else {"mean": None, "reason": reason}
    return out


def length_correlation(
    rewards: np.ndarray,
    length: np.ndarray,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Correlation of length with reward within prompts: near 1, length alone earns the reward.

    Both are centred prompt by prompt, so that prompts which ask for long answers do not count. The
    interval is the percentile interval of the bootstrap over seeds and prompts, with few seeds too narrow.

    Args:
        rewards: [S, N, M] float64.
        length: [S, N, M] float64.
        confidence: Coverage asked for.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        :class:`~torchrl_maxmin.evaluation.clustered.Interval`, or None where nothing varies in a prompt.
    """
    x, y = (array - array.mean(axis=2, keepdims=True) for array in (length, rewards))
    moments = np.stack([(x * y).mean(axis=2), (x * x).mean(axis=2), (y * y).mean(axis=2)], axis=-1)

    def correlation(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return means[..., 0] / np.sqrt(means[..., 1] * means[..., 2])

    value = correlation(moments.mean(axis=(0, 1)))
    if not np.isfinite(value):
        return None
    bootstrap = ClusterBootstrap(*moments.shape[:2], num_resamples=num_resamples, seed=seed)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.nanquantile(correlation(bootstrap.means(moments)), tails)
    clusters = {"seeds": moments.shape[0], "prompts": moments.shape[1]}
    return Interval(value, low, high, low, high, clusters)


def group_accuracy_by_user(
    right: ArrayLike,
    row_users: ArrayLike,
    groups: ArrayLike,
    num_groups: int,
    *,
    row_weights: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Interval | None]:
    """How often a reward ranks pairs as the users of each group did, each user counted once.

    Args:
        right: Whether the chosen response got the larger reward [P]; one half for equal rewards. [P, ...]
            for several rewards at once.
        row_users: User of every pair [P], 0..U-1.
        groups: Group of every user [U].
        num_groups: K.
        row_weights: How much each pair counts [P]; a tie is both directions at one half.
        confidence: Coverage asked for.
        num_resamples: Resamples of the bootstrap beside the interval.
        seed: Seed of the resampling.

    Returns:
        One interval a group; None for a group without pairs.

    Example:
        >>> found = group_accuracy_by_user([1, 1, 0, 1] * 30, [u // 4 for u in range(120)], [0] * 30, 2)
        >>> float(found[0].mean), found[1]
        (0.75, None)
    """
    correct, users = np.asarray(right, dtype=np.float64), np.asarray(row_users)
    weights = np.ones(len(users)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    of = np.asarray(groups)
    total = np.bincount(users, weights, minlength=len(of))
    flat = (correct.reshape(len(users), -1) * weights[:, None]).T
    sums = np.stack([np.bincount(users, column, minlength=len(of)) for column in flat], axis=-1)
    found: list[Interval | None] = []
    for k in range(num_groups):
        mine = (of == k) & (total > 0)
        if not mine.any():
            found.append(None)
            continue
        means = (sums[mine] / total[mine, None]).reshape(int(mine.sum()), *correct.shape[1:])
        found.append(
            interval_over_users(means, confidence=confidence, num_resamples=num_resamples, seed=seed)
        )
    return found


def _like(given: ArrayLike, rewards: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(given, dtype=np.float64)
    if array.ndim == 2:
        array = array[None]
    if array.shape != rewards.shape[:3]:
        raise ValueError(
            f"{name} must be {list(rewards.shape[:3])} as the rewards are, got {list(array.shape)}"
        )
    return array
