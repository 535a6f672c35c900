"""The minimum over reward heads in plain PyTorch: easy to read, differentiable by autograd."""

import math

import torch
from torch import Tensor

from .._backend import accumulate_dtype, without_autocast


def min_over_heads_naive(rewards: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return minimum, argmin and soft minimum over the last dimension.

    ``softmin = -T log mean_k exp(-r_k / T)``: equal heads give their common value.

    Args:
        rewards: ``[..., K]``, floating point.
        temperature: T > 0.

    Returns:
        ``(minimum [...], argmin [...] int64, softmin [...])``, float32 (float64 for float64 rewards).
    """
    rewards = rewards.to(accumulate_dtype(rewards))
    minimum, argmin = rewards.min(dim=-1)
    lowest = minimum.detach().unsqueeze(-1)
    # An infinite minimum counts as zero above itself: inf - inf would be NaN.
    above = torch.where(rewards.isinf() & (rewards == lowest), 0.0, rewards - lowest)
    total = torch.exp(-above / temperature).sum(dim=-1)
    softmin = lowest.squeeze(-1) - temperature * (total.log() - math.log(rewards.shape[-1]))
    return minimum, argmin, softmin


def reward_heads_min_naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rewards ``(h W^T + b - shift) / scale`` with their minimum, argmin and soft minimum.

    Shapes and meaning as :func:`maxmin_kernels.reward_heads_min`.
    """
    dtype = accumulate_dtype(hidden, weight, bias, shift, scale)
    with without_autocast(hidden):
        rewards = hidden.to(dtype) @ weight.to(dtype).mT
    if bias is not None:
        rewards = rewards + bias.to(dtype)
    if shift is not None:
        rewards = rewards - shift.to(dtype)
    if scale is not None:
        rewards = rewards / scale.to(dtype)
    return (rewards, *min_over_heads_naive(rewards, temperature))


def min_over_heads_backward_naive(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return ``grad_rewards + onehot(argmin) grad_minimum + softmax(-r / T) grad_softmin``, ``[N, K]``."""
    grad = torch.zeros_like(rewards) if grad_rewards is None else grad_rewards.to(rewards.dtype).clone()
    if grad_minimum is not None:
        grad.scatter_add_(-1, argmin.unsqueeze(-1), grad_minimum.to(rewards.dtype).unsqueeze(-1))
    if grad_softmin is not None:
        lowest = rewards.amin(dim=-1, keepdim=True)
        above = torch.where(rewards == lowest, 0.0, rewards - lowest)
        grad += torch.softmax(-above / temperature, dim=-1) * grad_softmin.to(rewards.dtype).unsqueeze(-1)
    return grad
