"""Solvers for the M-step: K convex problems, one a group, each with its own rows weighted."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

__all__ = ["NEWTON_MAX_FEATURES", "ConvexLosses", "minimise"]

#: Above this many features a Hessian a group costs more than the steps it saves.
NEWTON_MAX_FEATURES = 1024

_MAX_STEPS = 100
# A Newton step that promises less than this share of the loss is taken in full, and is the last:
# convergence is quadratic, so what is left behind it is below rounding.
_SETTLED = 1e-12
# A ridge above the mean eigenvalue is enough for any number of features that is solved here.
_MAX_RIDGES = 10


class ConvexLosses(Protocol):
    """K convex losses in float64, each in D weights of its own."""

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [K] and gradients [K, D] at ``weight`` [K, D]."""

    def hessian(self, weight: Tensor) -> Tensor:
        """Second derivatives [K, D, D] at ``weight`` [K, D]."""


def minimise(losses: ConvexLosses, start: Tensor) -> Tensor:
    """Minimise K convex losses to convergence, never ending above ``start``.

    Newton's method with a Cholesky factor and backtracking up to :data:`NEWTON_MAX_FEATURES`
    features, L-BFGS (SciPy) above.

    Args:
        losses: what is minimised.
        start: float64 [K, D].

    Returns:
        Weights [K, D].
    """
    return _newton(losses, start) if start.shape[1] <= NEWTON_MAX_FEATURES else _lbfgs(losses, start)


def _newton(losses: ConvexLosses, weight: Tensor) -> Tensor:
    value, gradient = losses.value_and_gradient(weight)
    factor, last_decrement = None, torch.zeros_like(value)
    for _ in range(_MAX_STEPS):
        if factor is None:
            factor = _factor(losses.hessian(weight))
        step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        decrement = (gradient * step).sum(-1)
        settled = decrement <= _SETTLED * (1 + value.abs())
        weight, value, gradient = _backtrack(losses, weight, step, value, decrement, settled)
        if settled.all():
            break
        # A factor is kept as long as it still converges fast: it costs more than a step.
        if ((decrement > 0.01 * last_decrement) & ~settled).any():
            factor = None
        last_decrement = decrement
    return weight


def _factor(hessian: Tensor) -> Tensor:
    """Cholesky factors after a whisper of a ridge: it stands in for a penalty of zero.

    It also covers the rounding of a float32 Hessian, which grows with the largest eigenvalue: where
    features nearly all go one way, the ridge grows until there is a factor. It only shapes the steps.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-12 + 1e-6 * diagonal.mean(-1, keepdim=True)
    diagonal += ridge
    for _ in range(_MAX_RIDGES):
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.any():
            return factor
        ridge = 10 * ridge
        diagonal += ridge * (failed > 0).unsqueeze(-1)
    return torch.linalg.cholesky(hessian)  # no number: let it say so


def _backtrack(
    losses: ConvexLosses, weight: Tensor, step: Tensor, value: Tensor, decrement: Tensor, settled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the steps of the losses that do not fall enough (Armijo), each on its own."""
    length = torch.ones_like(value)
    while True:
        moved = weight - length.unsqueeze(-1) * step
        new_value, new_gradient = losses.value_and_gradient(moved)
        short = (new_value > value - 1e-4 * length * decrement) & ~settled
        if not short.any():
            return moved, new_value, new_gradient
        length = torch.where(short, length / 2, length)


def _lbfgs(losses: ConvexLosses, start: Tensor) -> Tensor:
    """The K losses as one problem: they share no weight, so their sum has the same minimum."""

    def total(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = losses.value_and_gradient(torch.from_numpy(flat).view_as(start))
        return value.sum().item(), gradient.flatten().numpy()

    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
    found = minimize(total, start.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).view_as(start)
