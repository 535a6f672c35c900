"""Any policy against any other, by group, and paired changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from torchrl_maxmin.evaluation.clustered import Interval, interval_over_seeds, interval_over_users
from torchrl_maxmin.evaluation.group_rates import GroupRates, rates_by_group
from torchrl_maxmin.evaluation.intervals import NUM_RESAMPLES
from torchrl_maxmin.evaluation.win_rates import win_matrix

__all__ = ["paired_change", "pairwise_win_rates"]


def pairwise_win_rates(
    utilities: Mapping[str, ArrayLike], group_names: Sequence[str] | None = None, **settings: Any
) -> dict[tuple[str, str], GroupRates]:
    """Every policy against every other on the prompts that they share, ties one half.

    Both orders are there: the rate of (b, a) is one less that of (a, b).

    Args:
        utilities: Policy -> utilities [S, N, M, G] or [N, M, G]; the number of samples M may differ.
        group_names: Names of the G groups.
        **settings: passed to :func:`rates_by_group`.

    Returns:
        (policy, other) -> :class:`GroupRates`.

    Raises:
        ValueError: If there are fewer than two policies, shapes disagree or utilities hold NaN.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> policies = {name: rng.normal(size=(3, 50, 2, 2)) + shift for name, shift in (("a", 0), ("b", 1))}
        >>> rates = pairwise_win_rates(policies)
        >>> bool(np.allclose(rates["a", "b"].groups.mean + rates["b", "a"].groups.mean, 1))
        True
    """
    if len(utilities) < 2:
        raise ValueError("a comparison needs two policies or more")
    return {
        (one, other): rates_by_group(win_matrix(utilities[one], utilities[other]), group_names, **settings)
        for one in utilities
        for other in utilities
        if one != other
    }


def paired_change(
    values: ArrayLike,
    baseline: ArrayLike,
    *,
    clusters: str = "seeds",
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The change from a baseline where both met the same prompts (or users): values - baseline, paired.

    What a prompt gives to both cancels, so that this is tighter than the two intervals apart.

    Args:
        values: [S, N, ...], seeds and prompts; or [U, ...], one mean a user.
        baseline: The same shape, prompt by prompt (user by user).
        clusters: ``seeds`` or ``users``.
        confidence: Coverage asked for.
        num_resamples: Resamples of the bootstrap beside the interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: If shapes disagree, or ``clusters`` is neither.

    Example:
        >>> import numpy as np
        >>> prompt = 5 * np.random.default_rng(0).random((1, 100))
        >>> better = prompt + [[0.3], [0.5], [0.4]]
        >>> change = paired_change(better, prompt + np.zeros((3, 1)))
        >>> round(float(change.mean), 3), bool(change.low > 0.1)
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
    return interval(
        one - other, scale="identity", confidence=confidence, num_resamples=num_resamples, seed=seed
    )
