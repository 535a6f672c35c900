"""Estimate changes from one policy to another on the same prompts: differences and ratios, paired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.stats.clustered import interval_of_statistic, interval_over_seeds, interval_over_users
from torchrl_maxmin.stats.interval import Interval

__all__ = ["paired_change", "relative_change"]


def relative_change(
    values: ArrayLike,
    baseline: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray] = np.asarray,
    **settings: Any,
) -> Interval:
    """Estimate ``a / b - 1``, where a and b are one statistic of two policies' means, paired by prompt.

    Args:
        values: The policy's [S, N, ...].
        baseline: The baseline's, the same seeds and prompts.
        statistic: Of the means [..., G], such as their minimum over groups.
        **settings: As :func:`interval_of_statistic` takes them.

    Example:
        >>> import numpy as np
        >>> rates = np.random.default_rng(0).random((3, 200, 2))
        >>> relative_change(rates, rates, lambda means: means.min(-1)).estimate.tolist()
        0.0
    """

    def change(means: np.ndarray) -> np.ndarray:
        found = statistic(means)
        with np.errstate(divide="ignore", invalid="ignore"):
            return found[:, 0] / found[:, 1] - 1

    return interval_of_statistic(np.stack([values, baseline], axis=2), change, scale="log_ratio", **settings)


def paired_change(
    values: ArrayLike, baseline: ArrayLike, *, clusters: str = "seeds", **settings: Any
) -> Interval:
    """Estimate the change from a baseline that met the same prompts (or users): values - baseline, paired.

    What a prompt gives to both cancels, so that this is tighter than the two intervals apart.

    Args:
        values: [S, N, ...], seeds and prompts; or [U, ...], one mean a user.
        baseline: The same shape, prompt by prompt (user by user).
        clusters: ``seeds`` or ``users``.
        **settings: ``confidence``, ``num_resamples`` and ``seed``.

    Raises:
        ValueError: If shapes disagree, or ``clusters`` is neither.

    Example:
        >>> import numpy as np
        >>> prompt = 5 * np.random.default_rng(0).random((1, 100))
        >>> better = prompt + [[0.3], [0.5], [0.4]]
        >>> change = paired_change(better, prompt + np.zeros((3, 1)))
        >>> round(float(change.estimate), 3), bool(change.low > 0.1)
        (0.4, True)
    """
    one, other = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if one.shape != other.shape:
        raise ValueError(
            f"paired values must share seeds, prompts and groups: {list(one.shape)} and {list(other.shape)}"
        )
    if clusters not in ("seeds", "users"):
        raise ValueError(f"clusters is 'seeds' or 'users', not {clusters!r}")
    interval = interval_over_seeds if clusters == "seeds" else interval_over_users
    return interval(one - other, scale="identity", **settings)
