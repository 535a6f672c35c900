"""Statistics over the valid steps of a batch: pure functions. Masked steps may hold anything, NaN too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrl_maxmin.masks import expand_mask


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of ``values`` over the positions that ``mask`` selects; 0 if there are none.

    Args:
        values: ``[*B, C]``.
        mask: boolean ``[*B]`` or ``[*B, 1]``, True where the values count; None for all.

    Returns:
        A scalar.
    """
    if not values.numel():
        return values.sum()  # 0, with a path for the gradient
    if mask is None:
        return values.mean()
    mask = expand_mask(mask, values)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def whiten(
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    exclude_dims: Sequence[int] = (),
    eps: float = 1e-8,
) -> Tensor:
    """Shift and scale to zero mean and unit variance over the valid positions.

    ``(A - mean) / sqrt(variance + eps)`` with the biased variance, both in float32 at least; 0 where all
    valid positions are equal, as one alone is. Whiten the scalarised advantage, not its columns: scaling
    each column by itself changes the objective.

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
    if not dims or not advantage.numel():
        return advantage
    valid = torch.ones_like(advantage, dtype=torch.bool) if mask is None else expand_mask(mask, advantage)
    # Select, not multiply: padding may hold NaN.
    values = torch.where(valid, advantage.to(torch.promote_types(advantage.dtype, torch.float32)), 0.0)
    count = valid.sum(dims, keepdim=True).clamp_min(1)
    mean = values.sum(dims, keepdim=True) / count
    centred = torch.where(valid, values - mean, 0.0)
    variance = centred.square().sum(dims, keepdim=True) / count
    whitened = centred * (variance + eps).rsqrt()
    return torch.where(all_equal(values, valid, dims), 0.0, whitened).to(advantage.dtype)


def all_equal(values: Tensor, valid: Tensor, dims: list[int]) -> Tensor:
    """Tell whether the valid values along ``dims`` are one number: a mean's rounding is no spread."""
    highest = torch.where(valid, values, -torch.inf).amax(dims, keepdim=True)
    lowest = torch.where(valid, values, torch.inf).amin(dims, keepdim=True)
    return highest <= lowest  # NaN is equal to nothing


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
    valid = torch.ones_like(target, dtype=torch.bool) if mask is None else expand_mask(mask, target)
    count = valid.sum(dims).clamp_min(1)

    def variance(values: Tensor) -> Tensor:
        values = torch.where(valid, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
        centred = torch.where(valid, values - values.sum(dims) / count, 0.0)
        return centred.square().sum(dims) / count

    return 1.0 - variance(target - prediction) / (variance(target) + torch.finfo(torch.float32).eps)


def ratio_statistics(log_ratio: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Statistics of the importance ratios ``exp(log_ratio)``; 0 where no step is valid.

    Args:
        log_ratio: ``[*B, 1]``, ``log pi - log pi_behaviour`` of the actions.
        mask: boolean ``[*B]`` or ``[*B, 1]``; None for all.

    Returns:
        ``ESS``, the effective share of the valid steps ``(sum r)^2 / (n sum r^2)`` in (0, 1];
        ``max_ratio`` and ``mean_ratio``. Scalars.
    """
    valid = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else expand_mask(mask, log_ratio)
    if not log_ratio.numel():
        return dict.fromkeys(("ESS", "max_ratio", "mean_ratio"), log_ratio.sum())
    count = valid.sum().clamp_min(1)
    ratio = torch.where(valid, log_ratio.exp(), 0.0)
    # Relative to the largest, so that the squares do not overflow.
    tiny = torch.finfo(ratio.dtype).tiny
    # Of the ratios' own rank: torch.vmap over an empty batch cannot mix ranks.
    largest = ratio.amax(list(range(ratio.ndim)), keepdim=True)
    scaled = ratio / largest.clamp_min(tiny)
    return {
        "ESS": scaled.sum().square() / scaled.square().sum().clamp_min(tiny) / count,
        "max_ratio": largest.squeeze(),
        "mean_ratio": ratio.sum() / count,
    }
