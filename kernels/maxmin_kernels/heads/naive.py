"""The minimum over reward heads in plain PyTorch: easy to read, differentiable by autograd."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype, without_autocast


def min_over_heads_naive(
    rewards: Tensor,
    temperature: float = 1.0,
    *,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return minimum, argmin and soft minimum over the last dimension.

    ``softmin = -T log mean_k exp(-r_k / T)``: equal heads give their common value.

    Args:
        rewards: ``[..., K]``, floating point.
        temperature: T > 0.
        head_mask: ``[K]`` bool or None, True at real heads. If none is real: minimum +inf, argmin 0.
        row_mask: ``[...]`` bool or None, True at real rows.
        return_sums: Whether to return the sums of the real rows too.

    Returns:
        ``(minimum [...], argmin [...] int64, softmin [...])``, and ``head_sums [K]`` if asked for; float32
        (float64 for float64 rewards).
    """
    rewards = rewards.to(accumulate_dtype(rewards))
    if row_mask is not None:
        rewards = torch.where(row_mask.unsqueeze(-1), rewards, 0.0)
    candidates = rewards if head_mask is None else rewards.masked_fill(~head_mask, float("inf"))
    minimum, argmin = candidates.min(dim=-1)
    if head_mask is not None:
        # A real head at +inf ties with the fill: only a real one is the argmin.
        lowest = candidates.isnan() | (head_mask & (candidates == minimum.unsqueeze(-1)))
        argmin = lowest.int().argmax(dim=-1)
        minimum = candidates.gather(-1, argmin.unsqueeze(-1)).squeeze(-1)
    # Where the minimum is infinite, inf - inf counts as zero above it; a NaN comes back with the minimum.
    below = (minimum.detach().unsqueeze(-1) - candidates).nan_to_num(0.0, torch.inf, -torch.inf)
    weights = below.exp_() if temperature == 1.0 else below.div_(temperature).exp_()
    heads: int | Tensor = rewards.shape[-1]
    if head_mask is not None:
        weights, heads = weights.masked_fill(~head_mask, 0.0), head_mask.sum().clamp(min=1)
    softmin = torch.sub(minimum.detach(), (weights.sum(dim=-1) / heads).log(), alpha=temperature)
    if row_mask is not None:
        minimum, softmin = torch.where(row_mask, minimum, 0.0), torch.where(row_mask, softmin, 0.0)
        argmin = argmin.masked_fill(~row_mask, 0)
    if not return_sums:
        return minimum, argmin, softmin
    sums = rewards.reshape(-1, rewards.shape[-1]).sum(0, dtype=torch.float64)
    return minimum, argmin, softmin, sums.to(rewards.dtype)


def _above_minimum(rewards: Tensor, minimum: Tensor) -> Tensor:
    """Return ``r - min``; an infinite minimum counts as zero above itself, where inf - inf would be NaN."""
    minimum = minimum.unsqueeze(-1)
    return torch.where(rewards.isinf() & (rewards == minimum), 0.0, rewards - minimum)


def linear_rewards(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    row_mask: Tensor | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """Return ``(h W^T + b - shift) / scale``, ``[N, K]``, 0 in padded rows; ``product`` is ``h W^T + b``."""
    dtype = accumulate_dtype(hidden, weight, bias, shift, scale)
    hidden = hidden.to(dtype)
    if row_mask is not None:
        # A copy without what the padding holds, for 0 * NaN is NaN in the gradient of the weight.
        hidden = torch.where(row_mask.unsqueeze(-1), hidden, 0.0)
    with without_autocast(hidden):
        rewards = product(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    if shift is not None:
        rewards = rewards - shift.to(dtype)
    if scale is not None:
        rewards = rewards / scale.to(dtype)
    return rewards if row_mask is None else torch.where(row_mask.unsqueeze(-1), rewards, 0.0)


def reward_heads_min_naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float = 1.0,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
) -> tuple[Tensor, ...]:
    """Return rewards ``(h W^T + b - shift) / scale`` with their minimum, argmin and soft minimum.

    Shapes and meaning as :func:`maxmin_kernels.reward_heads_min`.
    """
    rewards = linear_rewards(hidden, weight, bias, shift, scale, row_mask)
    lowest = min_over_heads_naive(
        rewards, temperature, head_mask=head_mask, row_mask=row_mask, return_sums=return_sums
    )
    return (rewards, *lowest)


def min_over_heads_backward_naive(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    grad_sums: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
) -> Tensor:
    """Return the gradient of each reward, ``[N, K]``.

    ``grad_rewards + onehot(argmin) grad_minimum + softmax(-r / T) grad_softmin + grad_sums``, the minimum's
    and the soft minimum's terms at real heads only, all at real rows only.
    """
    rewards = rewards.to(accumulate_dtype(rewards))
    grad = torch.zeros_like(rewards)
    if grad_minimum is not None:
        grad.scatter_(-1, argmin.unsqueeze(-1), grad_minimum.to(rewards.dtype).unsqueeze(-1))
    if grad_softmin is not None:
        candidates = rewards if head_mask is None else rewards.masked_fill(~head_mask, float("inf"))
        above = _above_minimum(candidates, candidates.amin(dim=-1))
        if head_mask is not None:
            above = above.masked_fill(~head_mask, float("inf"))
        grad += torch.softmax(-above / temperature, dim=-1) * grad_softmin.to(rewards.dtype).unsqueeze(-1)
    if head_mask is not None:
        grad.masked_fill_(~head_mask, 0.0)
    for given in (grad_rewards, grad_sums):
        if given is not None:
            grad += given.to(rewards.dtype)
    return grad if row_mask is None else grad.masked_fill_(~row_mask.unsqueeze(-1), 0.0)
