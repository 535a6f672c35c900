"""Estimates of KL(pi || pi_ref) from samples of pi: a pure function."""

from __future__ import annotations

from torch import Tensor

__all__ = ["KL_ESTIMATORS", "kl_estimate"]

KL_ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(log_ratio: Tensor, estimator: str = "k3") -> Tensor:
    """One estimate of the KL divergence a sample (http://joschu.net/blog/kl-approx.html).

    ===== ======================== ====================================================================
    name  with d = log pi/pi_ref   what it is
    ===== ======================== ====================================================================
    k1    d                        unbiased, negative at times; what belongs into a reward
    k2    d^2 / 2                  biased, never negative; as a loss, its gradient is that of the KL
    k3    exp(-d) - 1 + d          unbiased, never negative, of low variance; the usual one in a loss
    ===== ======================== ====================================================================

    Args:
        log_ratio: ``log pi - log pi_ref`` of what pi sampled, any shape.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        The estimates, of the same shape.

    Raises:
        ValueError: for another name.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([-1.0, 0.0, 1.0]), "k2").tolist()
        [0.5, 0.0, 0.5]
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio
    raise ValueError(f"the KL estimator is one of {', '.join(KL_ESTIMATORS)}, not {estimator!r}")
