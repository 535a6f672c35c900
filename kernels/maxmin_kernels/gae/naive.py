"""Generalised advantage estimation with a vector reward, in plain PyTorch."""

import torch
from torch import Tensor

from .._backend import accumulate_dtype


@torch.no_grad()
def vector_gae_naive(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: float,
    lmbda: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantage and value target, ``[B, T, K]`` each, by the backward recursion.

    Arguments as :func:`maxmin_kernels.vector_gae`, the batch being one dimension.
    """
    dtype = accumulate_dtype(reward, value, next_value)
    value = value.to(dtype)
    # where, not a product: what stands behind an end or under the padding may be NaN.
    bootstrap = torch.where(terminated.bool(), 0.0, gamma * next_value.to(dtype))
    delta = reward.to(dtype) + bootstrap - value
    carries = ~done.bool()
    if mask is not None:
        delta = torch.where(mask.bool().unsqueeze(-1), delta, 0.0)
        carries = carries & mask.bool().unsqueeze(-1)
    steps = delta.transpose(0, 1).contiguous()
    keep = carries.transpose(0, 1).contiguous()
    following = torch.zeros_like(delta[:, 0]) if delta.shape[1] else None
    for t in range(delta.shape[1] - 1, -1, -1):
        carried = torch.where(keep[t], following, 0.0)
        following = torch.add(steps[t], carried, alpha=gamma * lmbda)
        steps[t] = following
    advantage = steps.transpose(0, 1).contiguous()
    return advantage, advantage + value
