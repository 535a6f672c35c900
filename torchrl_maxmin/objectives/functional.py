"""Pure functions of advantages and log-probabilities: from K columns to one, and estimates of the KL."""

from __future__ import annotations

from torch import Tensor

__all__ = ["KL_ESTIMATORS", "kl_estimate", "scalarise_advantage"]

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


def scalarise_advantage(advantage: Tensor, group_weights: Tensor) -> Tensor:
    """The weighted sum of the groups' advantages, ``sum_k w_k A_k``.

    The advantage is linear in the reward, so this is the advantage of the reward ``sum_k w_k r_k``. If
    there is one column more than there are weights, the last is that of the KL penalty
    ``-beta (log pi - log pi_ref)``: it is common to all groups and enters with weight 1.

    Args:
        advantage: ``[*B, K]``, or ``[*B, K + 1]`` with a KL column.
        group_weights: ``[K]``, or ``[*A, K]`` where ``A`` are the first dimensions of ``B``.

    Returns:
        The scalar advantage ``[*B, 1]``, in the advantage's dtype.

    Raises:
        ValueError: if the numbers of columns do not fit, or the leading dimensions do not.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.objectives import scalarise_advantage
        >>> advantage = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
        >>> scalarise_advantage(advantage, torch.tensor([0.25, 0.75])).tolist()
        [[-0.5], [0.5]]
    """
    num_groups, columns = group_weights.shape[-1], advantage.shape[-1]
    if columns not in (num_groups, num_groups + 1):
        raise ValueError(
            f"An advantage of shape {tuple(advantage.shape)} cannot be scalarised by "
            f"{num_groups} group weights: its last dimension must be {num_groups}, or {num_groups + 1} "
            "with a KL penalty column."
        )
    weights = group_weights.to(advantage)
    if weights.ndim > 1:
        batch = weights.shape[:-1]
        if weights.ndim > advantage.ndim or any(
            w not in (1, a) for w, a in zip(batch, advantage.shape, strict=False)
        ):
            raise ValueError(
                f"group_weights of shape {tuple(weights.shape)} do not fit an advantage of shape "
                f"{tuple(advantage.shape)}: their leading dimensions must be the advantage's first ones."
            )
        weights = weights.reshape(*batch, *(1,) * (advantage.ndim - weights.ndim), num_groups)
    weighted = (advantage[..., :num_groups] * weights).sum(-1, keepdim=True)
    return weighted if columns == num_groups else weighted + advantage[..., num_groups:]
