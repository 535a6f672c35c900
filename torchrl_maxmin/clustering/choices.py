"""Users' choices, as EM reads them: an E-step and an M-step, in passes over blocks of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from maxmin_kernels import em_responsibilities
from maxmin_kernels.em.naive import posterior as kernel_posterior
from torch import Tensor, nn

from torchrl_maxmin.clustering.solvers import minimise
from torchrl_maxmin.preferences.dataset import PreferenceDataset

__all__ = [
    "Expectation",
    "PairChoices",
    "UserRows",
    "expectation",
    "fit_bradley_terry",
    "harden",
    "posterior",
    "row_weights_of",
    "sum_by_segment",
    "user_blocks",
]

#: Rows that are worked on at a time: few blocks, as each costs a fixed time, and little memory.
BLOCK_ROWS = 262_144
#: The same where a block of the features is copied, to compute in a wider type.
BLOCK_ROWS_COPIED = 8192
_TILE_ROWS = 1024


class Expectation(NamedTuple):
    """Result of an E-step.

    Attributes:
        responsibilities: [U, K].
        log_likelihood: of every user, the group summed out [U].
        gradient: of the M-step's weighted log-likelihood in the heads [K, D], where it was asked for.
    """

    responsibilities: Tensor
    log_likelihood: Tensor
    gradient: Tensor | None = None


def expectation(
    margins: Tensor,
    user_offsets: Tensor,
    log_prior: Tensor,
    assignment: str = "soft",
    row_weights: Tensor | None = None,
) -> Expectation:
    """E-step on margins [P, K]: responsibilities [U, K] (one-hot when ``hard``) and log-likelihood [U].

    Both are summed in float64 and come back in the dtype of the margins.
    """
    if row_weights is None:
        soft, log_likelihood = em_responsibilities(margins, None, user_offsets, log_prior)
    else:
        log_choice = nn.functional.logsigmoid(margins.double()) * row_weights.unsqueeze(-1)
        step = posterior(sum_by_segment(log_choice, user_offsets), log_prior)
        soft, log_likelihood = step.responsibilities.to(margins.dtype), step.log_likelihood.to(margins.dtype)
    return Expectation(harden(soft) if assignment == "hard" else soft, log_likelihood)


def sum_by_segment(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums [S, K] of the rows of ``values`` [N, K] between offsets [S + 1]; 0 where there are none."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def posterior(user_log_likelihood: Tensor, log_prior: Tensor) -> Expectation:
    """Bayes' rule on log-likelihoods by user and group [U, K]; whom none explains gets the prior."""
    return Expectation(*kernel_posterior(user_log_likelihood + log_prior, log_prior))


def harden(responsibilities: Tensor) -> Tensor:
    """Every user wholly in their likeliest group, one-hot [U, K]."""
    hard = nn.functional.one_hot(responsibilities.argmax(-1), responsibilities.shape[-1])
    return hard.to(responsibilities.dtype)


def row_weights_of(data: PreferenceDataset) -> Tensor | None:
    """Return how much each pair of a data set counts [P] fp32; None where every pair counts once.

    A tie that was halved is there both ways, each counted one half.
    """
    return None if bool((data.weights == 1).all()) else data.weights.float()


def user_blocks(user_offsets: Tensor, block_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows into blocks of whole users: (users, rows), each of about ``block_rows`` rows."""
    num_users, num_rows = len(user_offsets) - 1, int(user_offsets[-1])
    cuts = torch.searchsorted(user_offsets, torch.arange(0, num_rows, block_rows)).tolist()
    for first, last in itertools.pairwise(sorted({0, *cuts, num_users})):
        yield slice(first, last), slice(int(user_offsets[first]), int(user_offsets[last]))


class UserRows:
    """Rows of choices, those of a user side by side.

    Attributes:
        user_offsets: int64 [U + 1].
        row_weights: how much each row counts [P]; None counts each once.
    """

    user_offsets: Tensor
    row_weights: Tensor | None

    @cached_property
    def row_users(self) -> Tensor:
        """The user of every row [P]."""
        return torch.repeat_interleave(self.user_offsets.diff())

    @cached_property
    def choices_by_user(self) -> Tensor:
        """Choices of each user, ties halved: float64 [U]."""
        if self.row_weights is None:
            return self.user_offsets.diff().double()
        return sum_by_segment(self.row_weights.double(), self.user_offsets)

    @cached_property
    def num_choices(self) -> float:
        """All users' choices together: what the penalty and log-likelihoods a choice refer to."""
        return self.choices_by_user.sum().item()


@dataclass(frozen=True)
class PairChoices(UserRows):
    """Pairs under linear Bradley-Terry rewards: P(chosen) = sigmoid(w . difference).

    Attributes:
        differences: features(chosen) - features(rejected) [P, D]; may be a memory-mapped file.
        user_offsets: int64 [U + 1], rows of a user side by side.
        row_weights: how much each pair counts [P]; None counts each once. A tie is the pair in
            both directions, each counted one half.
    """

    differences: Tensor
    user_offsets: Tensor
    row_weights: Tensor | None = None

    @property
    def num_features(self) -> int:
        """D."""
        return self.differences.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that fits come back in."""
        return self.differences.dtype

    def take_users(self, users: Tensor) -> PairChoices:
        """These users' pairs, in the order of ``users`` [U'], which may name a user twice."""
        counts = self.user_offsets.diff()[users]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = self.user_offsets[users] - offsets[:-1]
        rows = torch.arange(int(offsets[-1])) + shift.repeat_interleave(counts)
        return self._take_rows(rows, offsets)

    def keep_rows(self, kept: Tensor) -> PairChoices:
        """The rows where ``kept`` [P] holds; users may be left without any."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
        return self._take_rows(kept.nonzero().flatten(), before[self.user_offsets])

    def _take_rows(self, rows: Tensor, user_offsets: Tensor) -> PairChoices:
        row_weights = None if self.row_weights is None else self.row_weights[rows]
        return PairChoices(self.differences[rows], user_offsets, row_weights)

    def expectation(
        self,
        weight: Tensor,
        log_prior: Tensor,
        assignment: str = "soft",
        *,
        gradient: bool = False,
        block_rows: int | None = None,
    ) -> Expectation:
        """One E-step in one pass over the rows, with the gradient of the M-step that follows it.

        Blocks hold whole users, so a block's responsibilities are final when its margins are at
        hand, and nothing of size P x K or P x D is alive beside the features. By Fisher's identity
        the gradient is that of the observed log-likelihood.

        Args:
            weight: heads [K, D]; its dtype is computed in.
            log_prior: log mixing weights [K].
            assignment: ``soft`` or ``hard``.
            gradient: whether the gradient is wanted.
            block_rows: rows of a block, about; None chooses.
        """
        num_users, num_groups = len(self.user_offsets) - 1, len(weight)
        responsibilities = weight.new_empty(num_users, num_groups)
        log_likelihood = weight.new_empty(num_users)
        slope_sum = torch.zeros_like(weight)
        if block_rows is None:
            block_rows = BLOCK_ROWS if weight.dtype == self.dtype else BLOCK_ROWS_COPIED
        for users, rows in user_blocks(self.user_offsets, block_rows):
            x, row_weights = self._rows(rows, weight.dtype)
            margins = _margins(x, weight)
            offsets = self.user_offsets[users.start : users.stop + 1] - rows.start
            responsibilities[users], log_likelihood[users], _ = expectation(
                margins, offsets, log_prior, assignment, row_weights
            )
            if gradient:
                slope = margins.neg_().sigmoid_()
                slope *= responsibilities[users].repeat_interleave(offsets.diff(), 0, output_size=len(x))
                if row_weights is not None:
                    slope *= row_weights.unsqueeze(-1)
                slope_sum += _slope_sum(slope, x)
        return Expectation(responsibilities, log_likelihood, slope_sum if gradient else None)

    def maximise(self, responsibilities: Tensor, start: Tensor, l2: float) -> Tensor:
        """The M-step, to convergence: float64 heads [K, D], from ``start`` [K, D]."""
        penalty = l2 * self.num_choices
        return minimise(_WeightedLosses(self, responsibilities.double(), penalty), start.double())

    def _rows(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        x = self.differences[rows].to(dtype)
        return x, None if self.row_weights is None else self.row_weights[rows].to(dtype)


# Products of many rows with few columns: in tiles they take about 0.6 of the plain product's time.


def _margins(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T [P, K]."""
    margins = x.new_empty(len(x), len(weight))
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(weight.expand(len(tiles), -1, -1), tiles.transpose(1, 2))
    margins[:tiled].view(len(tiles), _TILE_ROWS, len(weight)).copy_(by_tile.transpose(1, 2))
    torch.mm(x[tiled:], weight.T, out=margins[tiled:])
    return margins


def _slope_sum(slope: Tensor, x: Tensor) -> Tensor:
    """slope.T @ x [K, D]."""
    tiles, tiled = _tiles(x)
    by_tile = torch.bmm(_tiles(slope)[0].transpose(1, 2), tiles)
    return by_tile.sum(0).addmm_(slope[tiled:].T, x[tiled:])


def _tiles(rows: Tensor) -> tuple[Tensor, int]:
    """The rows that fill whole tiles, as [tiles, rows of a tile, columns], and how many they are."""
    tiled = len(rows) - len(rows) % _TILE_ROWS
    return rows[:tiled].unflatten(0, (tiled // _TILE_ROWS, _TILE_ROWS)), tiled


@dataclass(frozen=True)
class _WeightedLosses:
    """-sum_p c_pk log sigmoid(w_k . x_p) + penalty |w_k|^2, with c the responsibility of the row's user."""

    choices: PairChoices
    responsibilities: Tensor
    penalty: float

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for low in range(0, len(self.choices.differences), BLOCK_ROWS_COPIED):
            rows = slice(low, low + BLOCK_ROWS_COPIED)
            x, row_weights = self.choices._rows(rows, torch.float64)
            share = self.responsibilities[self.choices.row_users[rows]]
            yield x, share if row_weights is None else share * row_weights.unsqueeze(-1)

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        value = self.penalty * weight.square().sum(-1)
        gradient = 2 * self.penalty * weight
        for x, share in self._blocks():
            margins = x @ weight.T
            value = value - (share * nn.functional.logsigmoid(margins)).sum(0)
            gradient = gradient - (share * torch.sigmoid(-margins)).T @ x
        return value, gradient

    def hessian(self, weight: Tensor) -> Tensor:
        # It only shapes the steps: float32 is enough, and the products are what an M-step costs.
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
    choices = PairChoices(differences, torch.tensor([0, len(differences)]), row_weights)
    start = torch.zeros(1, differences.shape[1])
    return choices.maximise(torch.ones(1, 1), start, l2)[0].to(differences.dtype)
