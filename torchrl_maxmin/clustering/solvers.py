"""Solvers for the M-step: K convex problems, one a group, each with its own rows weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

#: Above this many features a Hessian a group costs more than the steps it saves.
NEWTON_MAX_FEATURES = 1024

#: Rows that are worked on at a time where a block of the features is copied, to compute in a wider type.
BLOCK_ROWS_COPIED = 8192
_TILE_ROWS = 1024
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
    features, L-BFGS (SciPy) above; from ``start`` float64 [K, D] to weights [K, D].
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


# -- pairs -----------------------------------------------------------------------------------------

# Products of many rows with few columns: in tiles they take about 0.6 of the plain product's time.


def tiled_margins(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T [P, K]."""
    margins = x.new_empty(len(x), len(weight))
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(weight.expand(len(tiles), -1, -1), tiles.transpose(1, 2))
    margins[:tiled].view(len(tiles), _TILE_ROWS, len(weight)).copy_(by_tile.transpose(1, 2))
    torch.mm(x[tiled:], weight.T, out=margins[tiled:])
    return margins


def tiled_slope_sum(slope: Tensor, x: Tensor) -> Tensor:
    """slope.T @ x [K, D]."""
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(_tiles(slope)[0].transpose(1, 2), tiles)
    return by_tile.sum(0).addmm_(slope[tiled:].T, x[tiled:])


def _tiles(rows: Tensor) -> tuple[Tensor, int]:
    """The rows that fill whole tiles, as [tiles, rows of a tile, columns], and how many they are."""
    tiled = len(rows) - len(rows) % _TILE_ROWS
    return rows[:tiled].unflatten(0, (tiled // _TILE_ROWS, _TILE_ROWS)), tiled


@dataclass(frozen=True)
class PairLosses:
    """-sum_p c_pk log sigmoid(w_k . x_p) + penalty |w_k|^2, with c the responsibility of the row's user."""

    differences: Tensor
    row_users: Tensor
    responsibilities: Tensor
    penalty: float
    row_weights: Tensor | None = None

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for low in range(0, len(self.differences), BLOCK_ROWS_COPIED):
            rows = slice(low, low + BLOCK_ROWS_COPIED)
            share = self.responsibilities[self.row_users[rows]]
            if self.row_weights is not None:
                share = share * self.row_weights[rows].double().unsqueeze(-1)
            yield self.differences[rows].double(), share

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [K] and gradients [K, D] in float64."""
        value = self.penalty * weight.square().sum(-1)
        gradient = 2 * self.penalty * weight
        for x, share in self._blocks():
            margins = x @ weight.T
            value = value - (share * nn.functional.logsigmoid(margins)).sum(0)
            gradient = gradient - (share * torch.sigmoid(-margins)).T @ x
        return value, gradient

    def hessian(self, weight: Tensor) -> Tensor:
        """Second derivatives [K, D, D]; they only shape the steps, so float32 products are enough."""
        num_groups, num_features = weight.shape
        hessian = torch.zeros(num_groups, num_features, num_features)
        for x, share in self._blocks():
            probability = torch.sigmoid(x @ weight.T)
            curvature = (share * probability * (1 - probability)).float()
            x = x.float()
            for k in range(num_groups):
                hessian[k].addmm_((curvature[:, k : k + 1] * x).T, x)
        return hessian.double() + 2 * self.penalty * torch.eye(num_features, dtype=torch.float64)


def fit_bradley_terry(differences: Tensor, *, l2: float = 1e-4, row_weights: Tensor | None = None) -> Tensor:
    """Fit one linear Bradley-Terry reward: logistic regression without an intercept, L2-penalised.

    Maximises mean log sigmoid(w . x) - l2 |w|^2 to convergence, in float64.

    Args:
        differences: features(chosen) - features(rejected) [P, D].
        l2: penalty on the squared weights, in units of pairs.
        row_weights: how much each pair counts [P].

    Returns:
        Weights [D] in the dtype of ``differences``.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> x[x[:, 0] < 0] *= -1  # the first feature decides
        >>> fit_bradley_terry(x, l2=1e-3).argmax().item()
        0
    """
    everyone = torch.zeros(len(differences), dtype=torch.int64)
    num_choices = len(differences) if row_weights is None else row_weights.double().sum().item()
    shares = torch.ones(1, 1, dtype=torch.float64)
    losses = PairLosses(differences, everyone, shares, l2 * num_choices, row_weights)
    start = torch.zeros(1, differences.shape[1], dtype=torch.float64)
    return minimise(losses, start)[0].to(differences.dtype)
