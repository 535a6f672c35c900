"""The backward recursion on CPU: the reference's arithmetic, in place."""

import torch
from torch import Tensor

from .naive import SLOW_DECAY


def discounted_sum_in_place(delta: Tensor, carries: Tensor, decay: float) -> Tensor:
    """Return what :func:`discounted_sum` does, bit for bit; it cannot be batched by vmap."""
    dtype = torch.float64 if decay > SLOW_DECAY else delta.dtype
    # One contiguous block a time step and one buffer for what is carried, so that the loop makes no copies.
    sums = delta.transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format)
    keep = carries.transpose(0, 1).contiguous().unbind(0)
    zero, carried = sums.new_zeros(()), torch.empty_like(sums[0]) if len(sums) else sums
    steps = sums.unbind(0)
    for t in range(len(steps) - 2, -1, -1):
        torch.where(keep[t], steps[t + 1], zero, out=carried)
        steps[t].add_(carried, alpha=decay)
    return sums.transpose(0, 1).contiguous().to(delta.dtype)
