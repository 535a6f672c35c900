"""Solvers for the M-step: K convex problems, one a group, each with its own rows weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from maxmin_kernels._narrow import by_onednn, narrow_linear, narrow_sum
from scipy.optimize import minimize
from torch import Tensor

from torchrl_maxmin.clustering.luce import at_rows, log_choices, loser_probabilities, weighted_sums

#: Above this many features a Hessian a group costs more than the steps it saves.
NEWTON_MAX_FEATURES = 1024

#: Rows that are worked on at a time where a block of the features is copied, to compute in a wider type.
BLOCK_ROWS_COPIED = 8192
#: Numbers of such a block on a GPU, where a block costs launches and waits: 1 GB in float64.
_BLOCK_NUMBERS = 2**27
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
        value, gradient = losses.value_and_gradient(torch.from_numpy(flat).to(start.device).view_as(start))
        return value.sum().item(), gradient.flatten().cpu().numpy()

    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
    found = minimize(total, start.flatten().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    return torch.from_numpy(found.x).to(start.device).view_as(start)


def rows_copied(features: Tensor) -> int:
    """Return the rows of features [P, D] that are copied at once on their device."""
    if features.device.type == "cpu":
        return BLOCK_ROWS_COPIED
    return max(BLOCK_ROWS_COPIED, _BLOCK_NUMBERS // max(features.shape[1], 1))


# -- choices ---------------------------------------------------------------------------------------

# Products of many rows with few columns. Where oneDNN does not take them, tiles take about 0.7 of the plain
# product's time.


def narrow_margins(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T [P, K]."""
    if by_onednn(x):
        return narrow_linear(x, weight)
    margins = x.new_empty(len(x), len(weight))
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(weight.expand(len(tiles), -1, -1), tiles.transpose(1, 2))
    margins[:tiled].view(len(tiles), _TILE_ROWS, len(weight)).copy_(by_tile.transpose(1, 2))
    torch.mm(x[tiled:], weight.T, out=margins[tiled:])
    return margins


def narrow_slope_sum(slope: Tensor, x: Tensor) -> Tensor:
    """slope.T @ x [K, D]."""
    if by_onednn(x):
        return narrow_sum(slope, x)
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(_tiles(slope)[0].transpose(1, 2), tiles)
    return by_tile.sum(0).addmm_(slope[tiled:].T, x[tiled:])


def _tiles(rows: Tensor) -> tuple[Tensor, int]:
    """The rows that fill whole tiles, as [tiles, rows of a tile, columns], and how many they are."""
    tiled = len(rows) - len(rows) % _TILE_ROWS
    return rows[:tiled].unflatten(0, (tiled // _TILE_ROWS, _TILE_ROWS)), tiled


@dataclass(frozen=True)
class ChoiceLosses:
    """-sum_c r_ck log p_k(choice c) + penalty |w_k|^2, with r the share of its user in group k.

    Attributes:
        differences: rows of pairs [P, D].
        choice_users: which row of ``shares`` each choice has [C].
        shares: [U, K] float64.
        penalty: of the squared weights.
        choice_weights: how much each choice counts [C].
        choice_offsets: int64 [C + 1]; None makes every row a choice (Bradley-Terry).
        wide: the differences in float64, where a copy is at hand; None widens a block whenever it is read.
    """

    differences: Tensor
    choice_users: Tensor
    shares: Tensor
    penalty: float
    choice_weights: Tensor | None = None
    choice_offsets: Tensor | None = None
    wide: Tensor | None = None

    @cached_property
    def _cuts(self) -> list[tuple[slice, slice]]:
        """Blocks of whole choices: (choices, rows)."""
        if self.choice_offsets is None:
            size = rows_copied(self.differences)
            parts = [slice(low, low + size) for low in range(0, len(self.differences), size)]
            return [(part, part) for part in parts]
        offsets = self.choice_offsets
        rows = torch.arange(0, len(self.differences), rows_copied(self.differences), device=offsets.device)
        cuts = sorted({*torch.searchsorted(offsets, rows).tolist(), len(offsets) - 1})
        return [(slice(i, j), slice(int(offsets[i]), int(offsets[j]))) for i, j in pairwise(cuts)]

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Which rows, these in float64 [n, D], shares [c, K] and offsets [c + 1] of their choices."""
        wide = self.differences if self.wide is None else self.wide
        for choices, rows in self._cuts:
            share = self.shares[self.choice_users[choices]]
            if self.choice_weights is not None:
                share = share * self.choice_weights[choices].double().unsqueeze(-1)
            offsets = None
            if self.choice_offsets is not None:
                offsets = self.choice_offsets[choices.start : choices.stop + 1] - rows.start
            yield rows, wide[rows].double(), share, offsets

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [K] and gradients [K, D] in float64."""
        value = self.penalty * weight.square().sum(-1)
        gradient = 2 * self.penalty * weight
        for _, x, share, offsets in self._blocks():
            margins = x @ weight.T
            log_choice = log_choices(margins, offsets)
            value = value - (share * log_choice).sum(0)
            slope = at_rows(share, offsets, len(x)) * loser_probabilities(margins, log_choice, offsets)
            gradient = gradient - slope.T @ x
        return value, gradient

    def hessian(self, weight: Tensor) -> Tensor:
        """Second derivatives [K, D, D]; they only shape the steps, so float32 products are enough."""
        num_groups, num_features = weight.shape
        hessian = torch.zeros(num_groups, num_features, num_features, device=weight.device)
        for part, x, share, offsets in self._blocks():
            margins = x @ weight.T
            probability = loser_probabilities(margins, log_choices(margins, offsets), offsets)
            curvature = at_rows(share, offsets, len(x)) * probability
            if offsets is None:
                curvature = curvature * (1 - probability)
            curvature, x = curvature.float(), self.differences[part].float()
            if offsets is not None:  # what the mean over a choice's rows has is taken off
                columns = probability.float().unbind(1)
                means = torch.stack([weighted_sums(x, column, offsets) for column in columns])
                hessian.baddbmm_((share.T.float().unsqueeze(2) * means).transpose(1, 2), means, alpha=-1)
            for k in range(num_groups):
                hessian[k].addmm_((curvature[:, k : k + 1] * x).T, x)
        return hessian.double() + 2 * self.penalty * torch.eye(num_features).to(weight)


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
    losses = ChoiceLosses(differences, everyone, shares, l2 * num_choices, row_weights)
    start = torch.zeros(1, differences.shape[1], dtype=torch.float64)
    return minimise(losses, start)[0].to(differences.dtype)
