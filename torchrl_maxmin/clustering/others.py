"""Each group beside all others, weighted by their shares."""

from __future__ import annotations

import numpy as np

__all__ = ["against_others", "others_mean"]


def against_others(values: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Subtract from each group's values the mean of the other groups', weighted by their shares.

    Args:
        values: [K, ...].
        log_prior: Log shares [K].

    Returns:
        [K, ...]; zeros for one group.

    Example:
        >>> against_others(np.array([1.0, 2.0, 4.0]), np.log([0.5, 0.25, 0.25])).round(3).tolist()
        [-2.0, 0.0, 2.667]
    """
    return values - others_mean(values, log_prior)


def others_mean(values: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Average [K, ...] the values of the other groups, weighted by their shares; of one group, its own."""
    count = len(log_prior)
    if count == 1:
        return values.copy()
    shares = np.exp(log_prior - log_prior.max())
    weights = np.tile(shares, (count, 1))
    np.fill_diagonal(weights, 0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), values, 1)
