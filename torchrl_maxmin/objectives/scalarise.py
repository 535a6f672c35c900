"""The maths between K advantages and one loss: scalarising, whitening, masked statistics. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def _expand_mask(mask: Tensor, values: Tensor) -> Tensor:
    """A boolean mask ``[*B]`` or ``[*B, 1]``, expanded to ``values`` ``[*B, C]``."""
    while mask.ndim < values.ndim:
        mask = mask.unsqueeze(-1)
    return mask.to(torch.bool).expand_as(values)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of ``values`` over the positions that ``mask`` selects; 0 if it selects none.

    Args:
        values: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``, True where the values count; None for all.

    Returns:
        A scalar.
    """
    if mask is None:
        return values.mean()
    mask = _expand_mask(mask, values)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def whiten(
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    exclude_dims: Sequence[int] = (),
    eps: float = 1e-8,
) -> Tensor:
    """Shift and scale to zero mean and unit variance over the valid positions.

    ``(A - mean) / sqrt(variance + eps)`` with the biased variance, both in float32 at least. Whiten the
    scalarised advantage, not its columns: scaling each column by itself changes the objective.

    Args:
        advantage: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``, True where the advantage counts; None for all.
        exclude_dims: dimensions that keep statistics of their own.
        eps: added to the variance.

    Returns:
        The whitened advantage, of the same shape and dtype; 0 where the mask is False.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.objectives import whiten
        >>> mask = torch.tensor([True, True, False])
        >>> whiten(torch.tensor([[1.0], [3.0], [99.0]]), mask).tolist()
        [[-1.0], [1.0], [0.0]]
    """
    excluded = {dim % advantage.ndim for dim in exclude_dims}
    dims = [dim for dim in range(advantage.ndim) if dim not in excluded]
    if not dims:
        return advantage
    valid = torch.ones_like(advantage, dtype=torch.bool) if mask is None else _expand_mask(mask, advantage)
    # Select, not multiply: padding may hold NaN.
    values = torch.where(valid, advantage.to(torch.promote_types(advantage.dtype, torch.float32)), 0.0)
    count = valid.sum(dims, keepdim=True).clamp_min(1)
    mean = values.sum(dims, keepdim=True) / count
    centred = torch.where(valid, values - mean, 0.0)
    variance = centred.square().sum(dims, keepdim=True) / count
    return (centred * (variance + eps).rsqrt()).to(advantage.dtype)


def masked_explained_variance(target: Tensor, prediction: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - Var[target - prediction] / Var[target]``, for every column.

    Args:
        target: ``[*B, C]``.
        prediction: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``; None for all.

    Returns:
        ``[C]``: 1 for a perfect critic, 0 for a constant, below 0 for a harmful one.
    """
    dims = list(range(target.ndim - 1))
    valid = torch.ones_like(target, dtype=torch.bool) if mask is None else _expand_mask(mask, target)
    count = valid.sum(dims).clamp_min(1)

    def variance(values: Tensor) -> Tensor:
        values = torch.where(valid, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
        centred = torch.where(valid, values - values.sum(dims) / count, 0.0)
        return centred.square().sum(dims) / count

    return 1.0 - variance(target - prediction) / (variance(target) + torch.finfo(torch.float32).eps)
