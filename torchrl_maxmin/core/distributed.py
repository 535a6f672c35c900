"""Sums over ranks, taken before any minimum: a rank-local minimum would train each rank for another group."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mean_over_ranks"]


def mean_over_ranks(total: Tensor, count: Tensor | float) -> Tensor:
    """Mean [K] of all ranks' rows, from this rank's column sums [K] and number of rows."""
    packed = torch.cat(
        [total.double(), torch.as_tensor(count, dtype=torch.float64, device=total.device).reshape(1)]
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(packed)
    return (packed[:-1] / packed[-1]).float()
