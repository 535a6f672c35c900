"""Rankings of several items in place of pairs: a Plackett-Luce mixture over users.

Pairs alone say little of which kinds of people there are: without features, comparisons of two do
not identify the types, rankings of three do (Chidambaram et al., arXiv 2405.15065).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.clustering.em import Expectation, offsets_of, posterior, sum_by_segment
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.solvers import minimise

__all__ = ["RankingChoices", "fit_ranking_mixture", "ranking_log_likelihood"]


@dataclass(frozen=True)
class RankingChoices:
    """Rankings under linear Plackett-Luce rewards, as choices of the best item of those left.

    A ranking of n items is n - 1 such choices; with two items it is Bradley-Terry.

    Attributes:
        item_features: [N, D], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1], the items of a ranking.
        user_offsets: int64 [U + 1], the rankings of a user.
    """

    item_features: Tensor
    ranking_offsets: Tensor
    user_offsets: Tensor

    @property
    def features(self) -> Tensor:
        """What heads are applied to [N, D]; fits come back in its dtype."""
        return self.item_features

    @cached_property
    def choices_by_user(self) -> Tensor:
        """Choices of every user, n - 1 a ranking: float64 [U]."""
        return self.stages.user_offsets.diff().double()

    @cached_property
    def num_choices(self) -> float:
        """All users' choices together."""
        return float(len(self.stages.chosen))

    @cached_property
    def stages(self) -> _Stages:
        """The choices that the rankings consist of."""
        return _stages(self.ranking_offsets, self.user_offsets)

    def expectation(self, weight: Tensor, log_prior: Tensor) -> Expectation:
        """One E-step: responsibilities [U, K] and log-likelihood [U] at heads [K, D]."""
        scores = self.item_features.to(weight.dtype) @ weight.T
        by_user = sum_by_segment(self.stages.log_probability(scores)[0], self.stages.user_offsets)
        return posterior(by_user, log_prior)

    def maximise(self, responsibilities: Tensor, start: Tensor, l2: float) -> Tensor:
        """The M-step, to convergence: float64 heads [K, D], from ``start`` [K, D]."""
        share = responsibilities.double().repeat_interleave(self.stages.user_offsets.diff(), 0)
        losses = _WeightedLosses(self.item_features.double(), self.stages, share, l2 * self.num_choices)
        return minimise(losses, start.double())


@dataclass(frozen=True)
class _Stages:
    """S choices of one item among those that are left.

    Attributes:
        chosen: the item that was taken [S].
        items: the items that were left, choices side by side [M].
        offsets: [S + 1] into ``items``.
        user_offsets: [U + 1], the choices of a user.
    """

    chosen: Tensor
    items: Tensor
    offsets: Tensor
    user_offsets: Tensor

    def log_probability(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of what was chosen [S, K], and of every item that was left [M, K], from scores [N, K]."""
        left = scores[self.items]
        log_total = segment_logsumexp(left, self.offsets)
        return scores[self.chosen] - log_total, left - log_total.repeat_interleave(self.offsets.diff(), 0)


def _stages(ranking_offsets: Tensor, user_offsets: Tensor) -> _Stages:
    """Take rankings apart: every item but the last was chosen among itself and those after it."""
    sizes = ranking_offsets.diff()
    if (sizes < 1).any():
        raise ValueError("a ranking needs at least one item; drop empty rankings")
    last = torch.zeros(int(ranking_offsets[-1]), dtype=torch.bool)
    last[ranking_offsets[1:] - 1] = True
    chosen = (~last).nonzero().flatten()
    lengths = ranking_offsets[1:].repeat_interleave(sizes)[chosen] - chosen
    offsets = offsets_of(lengths)
    items = torch.arange(int(offsets[-1])) + (chosen - offsets[:-1]).repeat_interleave(lengths)
    return _Stages(chosen, items, offsets, offsets_of(sizes - 1)[user_offsets])


def segment_logsumexp(values: Tensor, offsets: Tensor) -> Tensor:
    """log sum exp [S, K] of the rows of ``values`` [M, K] between offsets [S + 1], none empty."""
    largest = torch.segment_reduce(values.detach(), "max", offsets=offsets, axis=0, unsafe=True)
    shifted = values - largest.repeat_interleave(offsets.diff(), 0)
    return largest + sum_by_segment(shifted.exp(), offsets).log()


@dataclass(frozen=True)
class _WeightedLosses:
    """-sum_s c_sk log p_k(chosen item of s) + penalty |w_k|^2, with c the responsibility [S, K]."""

    features: Tensor
    stages: _Stages
    share: Tensor
    penalty: float

    def value_and_gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_chosen, log_left = self.stages.log_probability(self.features @ weight.T)
        value = self.penalty * weight.square().sum(-1) - (self.share * log_chosen).sum(0)
        by_item = self._expected(log_left).index_add_(0, self.stages.chosen, self.share, alpha=-1)
        return value, 2 * self.penalty * weight + by_item.T @ self.features

    def hessian(self, weight: Tensor) -> Tensor:
        """The weighted covariance of the features that were left, under the model, and the penalty."""
        _, log_left = self.stages.log_probability(self.features @ weight.T)
        counts = self._expected(log_left)
        found = []
        for k in range(len(weight)):
            chance = log_left[:, k : k + 1].exp()
            mean = sum_by_segment(chance * self.features[self.stages.items], self.stages.offsets)
            square = (counts[:, k : k + 1] * self.features).T @ self.features
            found.append(square - (self.share[:, k : k + 1] * mean).T @ mean)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        return torch.stack(found) + 2 * self.penalty * identity

    def _expected(self, log_left: Tensor) -> Tensor:
        """Expected number of times that each item is chosen [N, K], each choice counted by its share."""
        weighted = log_left.exp() * self.share.repeat_interleave(self.stages.offsets.diff(), 0)
        return weighted.new_zeros(len(self.features), weighted.shape[1]).index_add_(
            0, self.stages.items, weighted
        )


def ranking_log_likelihood(scores: Tensor, ranking_offsets: Tensor) -> Tensor:
    """Plackett-Luce log-likelihood of rankings: [R, K], differentiable in the scores.

    log p = sum_i (s_i - log sum_{j >= i} exp s_j), items from best to worst (Plackett, 1975).

    Args:
        scores: rewards of items [N, K], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1].

    Raises:
        ValueError: for a ranking without items.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0], [0.0]])  # two items: Bradley-Terry
        >>> round(ranking_log_likelihood(scores, torch.tensor([0, 2])).exp().item(), 4)  # sigmoid(1)
        0.7311
    """
    stages = _stages(ranking_offsets, torch.arange(len(ranking_offsets)))
    return sum_by_segment(stages.log_probability(scores)[0], stages.user_offsets)


def fit_ranking_mixture(
    item_features: Tensor, ranking_offsets: Tensor, user_offsets: Tensor, num_groups: int, **settings: Any
) -> LinearMixture:
    """Fit K linear rewards to rankings by EM with exact M-steps; the best of several starts wins.

    With rankings of two items this is :func:`~torchrl_maxmin.clustering.fit_linear_mixture` with
    ``m_step="exact"`` on the differences of their features.

    Args:
        item_features: standardised [N, D], rankings side by side, the best item of each first.
        ranking_offsets: int64 [R + 1], the items of a ranking.
        user_offsets: int64 [U + 1], the rankings of a user.
        num_groups: K.
        **settings: of :func:`~torchrl_maxmin.clustering.fit_choices`, a choice being one of the n - 1 that a
            ranking of n consists of; by default EM stops once its objective rises by less than 1e-5.

    Returns:
        The fit; its heads score items, so it takes pairs of new users too.

    Raises:
        ValueError: for an unknown assignment, or a ranking without items.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> items = torch.randn(120, 3, 2, generator=generator)  # 20 users rank 6 times 3 items
        >>> utility = torch.cat([items[:60, :, 0], items[60:, :, 1]])  # two tastes
        >>> best_first = utility.argsort(1, descending=True).unsqueeze(2).expand(-1, -1, 2)
        >>> items = items.gather(1, best_first).flatten(0, 1)
        >>> rankings, users = torch.arange(121) * 3, torch.arange(21) * 6
        >>> groups = fit_ranking_mixture(items, rankings, users, 2, generator=generator).assignments
        >>> bool((groups[:10] == groups[0]).all() and (groups[10:] == groups[10]).all())
        True
    """
    choices = RankingChoices(item_features, ranking_offsets, user_offsets)
    return fit_choices(choices, num_groups, **({"convergence_tolerance": 1e-5} | settings), m_step="exact")
