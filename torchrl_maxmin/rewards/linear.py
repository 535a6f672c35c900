"""A mixture of linear Bradley-Terry rewards on frozen features.

It takes seconds, finds who belongs together, and decides how many groups there are. It is
the warm start of the real reward model and never a reward itself: frozen heads cluster
users well and are useless to train a policy on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from maxmin_kernels import em_responsibilities
from torch import Tensor, nn

from torchrl_maxmin.progress import progress_bar

__all__ = ["LinearMixture", "NumGroupsChoice", "fit_linear_mixture", "select_num_groups"]


@dataclass(frozen=True)
class LinearMixture:
    """A fitted mixture of linear Bradley-Terry rewards.

    Attributes:
        weight: [K, D] on standardised feature differences.
        log_prior: log mixing weights [K].
        responsibilities: [U, K] of the users it was fitted on.
        log_likelihood: nats over all pairs, prior included.
    """

    weight: Tensor
    log_prior: Tensor
    responsibilities: Tensor
    log_likelihood: float

    def user_log_likelihood(self, differences: Tensor, user_offsets: Tensor) -> Tensor:
        """Log-likelihood [U] of users, their group summed out."""
        margins = differences @ self.weight.T
        return em_responsibilities(margins, torch.zeros_like(margins), user_offsets, self.log_prior)[1]


def fit_linear_mixture(
    differences: Tensor,
    user_offsets: Tensor,
    num_groups: int,
    *,
    num_restarts: int = 4,
    assignment: str = "soft",
    num_rounds: int = 50,
    steps_per_round: int = 4,
    learning_rate: float = 0.02,
    l2: float = 1e-4,
    generator: torch.Generator | None = None,
) -> LinearMixture:
    """Fit K linear rewards by EM from several random starts; the best likelihood wins.

    Args:
        differences: features(chosen) - features(rejected), standardised, [P, D].
        user_offsets: int64 [U + 1], rows of a user side by side.
        num_groups: K.
        num_restarts: random starts; K = 1 is convex and takes one.
        assignment: ``soft`` (EM) or ``hard`` (every user wholly in their likeliest group).
        num_rounds: E-steps.
        steps_per_round: Adam steps between them.
        learning_rate: of Adam.
        l2: penalty on the squared weights, in units of pairs.
        generator: source of the starts.
    """
    best: LinearMixture | None = None
    for _ in range(num_restarts if num_groups > 1 else 1):
        start = (
            torch.randn(num_groups, differences.shape[1], generator=generator) * differences.shape[1] ** -0.5
        )
        fitted = _fit_once(
            differences, user_offsets, start, assignment, num_rounds, steps_per_round, learning_rate, l2
        )
        if best is None or fitted.log_likelihood > best.log_likelihood:
            best = fitted
    assert best is not None
    return best


def _fit_once(
    differences: Tensor,
    user_offsets: Tensor,
    start: Tensor,
    assignment: str,
    num_rounds: int,
    steps_per_round: int,
    learning_rate: float,
    l2: float,
) -> LinearMixture:
    num_groups = len(start)
    row_users = torch.repeat_interleave(torch.arange(len(user_offsets) - 1), user_offsets.diff())
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    log_prior = torch.full((num_groups,), 1.0 / num_groups).log()
    for _ in range(num_rounds):
        responsibilities = expectation(differences @ weight.detach().T, user_offsets, log_prior, assignment)[
            0
        ]
        log_prior = mixing_weights(responsibilities)
        row_weights = responsibilities[row_users]
        for _ in range(steps_per_round):
            optimizer.zero_grad()
            log_likelihood = (row_weights * nn.functional.logsigmoid(differences @ weight.T)).sum(-1).mean()
            (l2 * weight.square().sum() - log_likelihood).backward()
            optimizer.step()
    margins = differences @ weight.detach().T
    responsibilities, user_ll = expectation(margins, user_offsets, log_prior, assignment)
    return LinearMixture(weight.detach(), log_prior, responsibilities, user_ll.double().sum().item())


def expectation(
    margins: Tensor, user_offsets: Tensor, log_prior: Tensor, assignment: str
) -> tuple[Tensor, Tensor]:
    """E-step on margins [P, K]: responsibilities [U, K] (one-hot when ``hard``) and log-likelihood [U]."""
    soft, log_likelihood = em_responsibilities(margins, torch.zeros_like(margins), user_offsets, log_prior)
    if assignment == "soft":
        return soft, log_likelihood
    return nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype), log_likelihood


def mixing_weights(responsibilities: Tensor) -> Tensor:
    """Log mixing weights [K] from responsibilities [U, K], with one pseudo-user over all groups."""
    num_users, num_groups = responsibilities.shape
    return ((responsibilities.sum(0) + 1.0 / num_groups) / (num_users + 1)).log()


@dataclass(frozen=True)
class NumGroupsChoice:
    """How many groups the users show.

    Attributes:
        num_groups: the smallest K within one standard error of the best.
        heldout_log_likelihood: nats a pair on users left out of the fit, by K.
        standard_error: of the difference to the best K, by K.
    """

    num_groups: int
    heldout_log_likelihood: dict[int, float]
    standard_error: dict[int, float]


def select_num_groups(
    differences: Tensor,
    user_offsets: Tensor,
    max_groups: int = 3,
    *,
    num_folds: int = 4,
    seed: int = 0,
    **fit: Any,
) -> NumGroupsChoice:
    """Choose K on linear mixtures by the likelihood of whole users that were left out.

    Every user is left out once; the smallest K whose likelihood is within one standard
    error (paired over users) of the best is taken. K = 1 is always a candidate, so the
    answer may be that the users do not differ.

    Args:
        differences: standardised feature differences [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        max_groups: largest K tried; never more than the users of a fold's fit.
        num_folds: parts the users are cut into.
        seed: of the folds and the starts.
        **fit: passed to :func:`fit_linear_mixture`.
    """
    num_users = len(user_offsets) - 1
    counts = user_offsets.diff()
    order = np.random.default_rng(seed).permutation(num_users)
    folds = [np.sort(part) for part in np.array_split(order, min(num_folds, num_users))]
    candidates = range(1, min(max_groups, num_users - max(map(len, folds))) + 1)
    user_ll = {k: torch.zeros(num_users, dtype=torch.float64) for k in candidates}
    with progress_bar("choosing the number of groups", len(folds) * len(candidates)) as advance:
        for fold in folds:
            left_out = torch.zeros(num_users, dtype=torch.bool)
            left_out[torch.from_numpy(fold)] = True
            row_out = torch.repeat_interleave(left_out, counts)
            inner, outer = _offsets(counts[~left_out]), _offsets(counts[left_out])
            for k in candidates:
                generator = torch.Generator().manual_seed(seed)
                fitted = fit_linear_mixture(differences[~row_out], inner, k, generator=generator, **fit)
                user_ll[k][left_out] = fitted.user_log_likelihood(differences[row_out], outer).double()
                advance()
    total = {k: ll.sum().item() for k, ll in user_ll.items()}
    best = max(total, key=lambda k: total[k])
    errors = {k: ((user_ll[best] - ll).std() * num_users**0.5).item() for k, ll in user_ll.items()}
    chosen = min(k for k in candidates if total[best] - total[k] <= errors[k])
    pairs = int(user_offsets[-1])
    return NumGroupsChoice(
        chosen, {k: v / pairs for k, v in total.items()}, {k: v / pairs for k, v in errors.items()}
    )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
