"""The choice of K, by mixtures fitted without some users, and how likely these are then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from torchrl_maxmin.clustering.agreement import adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.luce import offsets_of
from torchrl_maxmin.core.progress import progress_bar

#: Penalties that are tried where one is chosen.
L2_CANDIDATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class NumGroupsChoice:
    """A choice of K, and what it rests on.

    Attributes:
        num_groups: the smallest K within one standard error of the best.
        heldout_log_likelihood: nats a pair on users left out of the fit, by K.
        standard_error: of the difference to the best K, by K.
        heldout_pairs: nats a pair on held-out pairs of users in the fit, by K; this and what
            follows are empty unless ``diagnostics`` were asked for, and do not decide.
        heldout_pairs_error: of the difference to the best K, by K.
        bic: -2 log-likelihood + log(users) x parameters, by K; smaller is better.
        stability: mean adjusted Rand index of the groups that refits on resampled users give, by K.
        l2: the penalty that left-out users chose, by K; empty where it was given.
    """

    num_groups: int
    heldout_log_likelihood: dict[int, float]
    standard_error: dict[int, float]
    heldout_pairs: dict[int, float] = field(default_factory=dict)
    heldout_pairs_error: dict[int, float] = field(default_factory=dict)
    bic: dict[int, float] = field(default_factory=dict)
    stability: dict[int, float] = field(default_factory=dict)
    l2: dict[int, float] = field(default_factory=dict)

    @property
    def num_groups_by_pairs(self) -> int:
        """K by held-out pairs alone, under the same rule."""
        return _one_standard_error(self.heldout_pairs, self.heldout_pairs_error)

    @property
    def num_groups_by_bic(self) -> int:
        """K by BIC alone."""
        return min(self.bic, key=lambda k: self.bic[k])

    def report(self) -> str:
        """A few plain lines: the answer, and what each K reached by every criterion."""
        tried = list(self.heldout_log_likelihood)
        if self.num_groups > 1:
            answer = f"your users form {self.num_groups} groups"
        elif len(tried) == 1:
            answer = "too few users to look for more than one group"
        else:
            answer = "your users do not differ: no more groups than one predict left-out users better"
        lines = [f"{answer} (K={self.num_groups})"]
        for k in tried:
            line = f"  K={k}: left-out users {self.heldout_log_likelihood[k]:.4f} nats a pair"
            if self.heldout_pairs:
                line += f", left-out pairs {self.heldout_pairs[k]:.4f}, BIC {self.bic[k]:.0f}"
                line += f", stability {self.stability[k]:.2f}" if k > 1 else ""
            lines.append(line)
        if self.heldout_pairs:
            lines.append(
                f"  left-out pairs alone would say K={self.num_groups_by_pairs}, "
                f"BIC K={self.num_groups_by_bic}"
            )
        return "\n".join(lines)


def select_num_groups(
    differences: Tensor,
    user_offsets: Tensor,
    max_groups: int = 3,
    *,
    row_weights: Tensor | None = None,
    judgements: np.ndarray | Tensor | None = None,
    choice_offsets: Tensor | None = None,
    **settings: Any,
) -> NumGroupsChoice:
    """Choose K on linear mixtures by the likelihood of whole users that were left out.

    Every user is left out once; the smallest K whose likelihood is within one standard
    error (paired over users) of the best is taken. K = 1 is always a candidate, so the
    answer may be that the users do not differ.

    Args:
        differences: standardised feature differences [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        max_groups: largest K tried; never more than the users of a fold's fit.
        row_weights: how much each pair counts [P].
        judgements: what each pair follows from [P]; without them, equal pairs of a user count as one, see
            :func:`~torchrl_maxmin.clustering.judged.judged_choices`.
        choice_offsets: int64 [C + 1], the rows of a choice among several items.
        **settings: of :func:`choose_num_groups`.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(600, 3, generator=generator)  # 60 users with 10 pairs each
        >>> x[x[:, 0] < 0] *= -1  # who all want more of the first feature
        >>> choice = select_num_groups(x, torch.arange(61) * 10, 2, m_step="exact", num_rounds=20)
        >>> print(choice.report().splitlines()[0])
        your users do not differ: no more groups than one predict left-out users better (K=1)
    """
    choices, _ = judged_choices(differences, user_offsets, row_weights, judgements, choice_offsets)
    return choose_num_groups(choices, max_groups, **settings)


def choose_num_groups(
    choices: PairChoices,
    max_groups: int = 3,
    *,
    num_folds: int = 4,
    seed: int = 0,
    l2_candidates: Sequence[float] = (),
    diagnostics: bool = False,
    num_refits: int = 3,
    **fit: Any,
) -> NumGroupsChoice:
    """Choose K as :func:`select_num_groups` does, on choices in which repeats count once already.

    Args:
        choices: all users.
        max_groups: largest K tried; never more than the users of a fold's fit.
        num_folds: parts the users are cut into.
        seed: of the folds and the starts.
        l2_candidates: penalties to choose among for every K, by the same left-out users; empty takes
            that of ``fit``.
        diagnostics: whether to look at held-out pairs of known users, BIC and stability too, for
            ``2 + num_refits`` more fits a K.
        num_refits: resamples of the users behind the stability.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """
    num_users = len(choices.user_offsets) - 1
    folds = user_folds(num_users, num_folds, seed)
    candidates = range(1, min(max_groups, num_users - max(map(len, folds))) + 1)
    fits = len(folds) * max(1, len(l2_candidates)) + (2 + num_refits if diagnostics else 0)
    user_ll: dict[int, Tensor] = {}
    penalty: dict[int, float] = {}
    criteria = _Diagnostics(choices, seed, num_refits)
    with progress_bar("choosing the number of groups", fits * len(candidates)) as advance:
        for k in candidates:
            settings = {"seed": seed, "advance": advance, **fit}
            if l2_candidates:
                penalty[k], left_out = choose_penalty(choices, k, folds, l2_candidates, **settings)
            else:
                left_out = leave_users_out(choices, k, folds, **settings)
            user_ll[k] = left_out.log_likelihood
            if diagnostics:
                criteria.add(k, fit | ({"l2": penalty[k]} if l2_candidates else {}))
                advance(2 + num_refits)
    total, errors = _compare(user_ll)
    pairs_total, pairs_errors = _compare(criteria.user_ll)
    return NumGroupsChoice(
        _one_standard_error(total, errors),
        _scaled(total, choices.num_choices),
        _scaled(errors, choices.num_choices),
        _scaled(pairs_total, criteria.heldout.num_choices),
        _scaled(pairs_errors, criteria.heldout.num_choices),
        criteria.bic,
        criteria.stability,
        penalty,
    )


def select_l2(
    differences: Tensor,
    user_offsets: Tensor,
    num_groups: int,
    *,
    candidates: Sequence[float] = L2_CANDIDATES,
    num_folds: int = 5,
    seed: int = 0,
    row_weights: Tensor | None = None,
    judgements: np.ndarray | Tensor | None = None,
    choice_offsets: Tensor | None = None,
    **fit: Any,
) -> float:
    """Choose the penalty by the likelihood of left-out users.

    A penalty that is too weak makes posteriors of new users too sure, one that is too strong hides
    a small group.

    Args:
        differences: standardised feature differences [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        num_groups: K.
        candidates: penalties, in the units of :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
        num_folds: parts the users are cut into.
        seed: of the folds and the starts.
        row_weights: how much each pair counts [P].
        judgements: as in :func:`select_num_groups`.
        choice_offsets: likewise.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """
    choices, _ = judged_choices(differences, user_offsets, row_weights, judgements, choice_offsets)
    folds = user_folds(len(user_offsets) - 1, num_folds, seed)
    return choose_penalty(choices, num_groups, folds, candidates, seed=seed, **fit)[0]


class _Diagnostics:
    """Criteria beside the one that decides, filled one K at a time."""

    def __init__(self, choices: PairChoices, seed: int, num_refits: int):
        held = heldout_of(choices, 0.2, seed)
        self.choices, self.known, self.heldout = choices, choices.keep_rows(~held), choices.keep_rows(held)
        self.seed, self.num_refits = seed, num_refits
        self.user_ll: dict[int, Tensor] = {}
        self.bic: dict[int, float] = {}
        self.stability: dict[int, float] = {}

    def add(self, k: int, fit: dict[str, Any]) -> None:
        on_known = fit_choices(self.known, k, self.seed, **fit)
        self.user_ll[k] = predictive_log_likelihood(on_known, self.heldout)
        everything = fit_choices(self.choices, k, self.seed, **fit)
        penalty = math.log(len(everything.responsibilities)) * (everything.weight.numel() + k - 1)
        self.bic[k] = -2 * everything.log_likelihood + penalty
        refits = [self._refitted_groups(k, refit, fit) for refit in range(self.num_refits)]
        indices = [adjusted_rand_index(a, b) for a, b in combinations(refits, 2)]
        self.stability[k] = sum(indices) / len(indices)

    def _refitted_groups(self, k: int, refit: int, fit: dict[str, Any]) -> Tensor:
        """Groups [U] by a fit on users drawn with replacement."""
        num_users = len(self.choices.user_offsets) - 1
        drawn = np.sort(np.random.default_rng([self.seed, refit]).integers(num_users, size=num_users))
        mixture = fit_choices(self.choices.take_users(torch.from_numpy(drawn)), k, self.seed + refit, **fit)
        return mixture.expectation_of(self.choices).responsibilities.argmax(-1)


def heldout_of(choices: PairChoices, fraction: float, seed: int) -> Tensor:
    """Mark the rows [P] of a random ``fraction`` of each user's judgements, never a part of one."""
    ids = choices.judgements
    if ids is None and choices.choice_offsets is not None:
        ids = choices.at_rows(torch.arange(len(choices.choice_users)))
    return heldout_rows(choices.user_offsets, fraction, seed, ids)


def heldout_rows(
    user_offsets: Tensor, fraction: float, seed: int, judgements: np.ndarray | Tensor | None = None
) -> Tensor:
    """Mark a random ``fraction`` of each user's judgements, one at least of two: bool [P].

    Args:
        user_offsets: int64 [U + 1].
        fraction: of a user's judgements.
        seed: of the draws.
        judgements: what each row follows from [P]; None makes each a judgement of its own.
    """
    if judgements is not None:
        users = torch.repeat_interleave(user_offsets.diff()).numpy()
        pairs = np.stack([users, np.asarray(judgements)], axis=1)
        unique, which = np.unique(pairs, axis=0, return_inverse=True)
        per_user = torch.from_numpy(np.bincount(unique[:, 0], minlength=len(user_offsets) - 1))
        return heldout_rows(offsets_of(per_user), fraction, seed)[torch.from_numpy(which.reshape(-1))]
    counts = user_offsets.diff()
    row_users = torch.repeat_interleave(counts)
    draw = np.random.default_rng(seed).random(len(row_users))
    order = torch.from_numpy(np.lexsort((draw, row_users.numpy())))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - user_offsets[row_users]
    wanted = torch.where(counts >= 2, (fraction * counts).long().clamp_min(1), 0)
    return rank < wanted[row_users]


def predictive_log_likelihood(known: LinearMixture, heldout: PairChoices) -> Tensor:
    """Log-likelihood [U] of further pairs of the users that ``known`` was fitted on, by their posterior."""
    margins = heldout.differences @ known.weight.T
    by_user = heldout.log_likelihood_by_user(margins)
    return torch.logsumexp(known.responsibilities.double().log() + by_user, -1)


def _compare(user_ll: dict[int, Tensor]) -> tuple[dict[int, float], dict[int, float]]:
    """Total log-likelihood by K, and the standard error of its difference to the best K's."""
    if not user_ll:
        return {}, {}
    total = {k: ll.sum().item() for k, ll in user_ll.items()}
    best = user_ll[max(total, key=lambda k: total[k])]
    return total, {k: ((best - ll).std() * len(ll) ** 0.5).item() for k, ll in user_ll.items()}


def _one_standard_error(total: dict[int, float], errors: dict[int, float]) -> int:
    """The smallest K within one standard error of the best."""
    best = max(total.values())
    return min(k for k in total if best - total[k] <= errors[k])


def _scaled(by_k: dict[int, float], num_choices: float) -> dict[int, float]:
    return {k: value / num_choices for k, value in by_k.items()}


# -- users left out of the fit ---------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOutUsers:
    """Every user as a mixture sees them that was fitted without them.

    Attributes:
        posterior: [U, K] float64; the folds' groups are matched to one another.
        log_likelihood: [U] float64.
    """

    posterior: Tensor
    log_likelihood: Tensor


def user_folds(num_users: int, num_folds: int, seed: int) -> list[Tensor]:
    """Cut the users into random parts of like size: sorted indices, each user in one part."""
    order = np.random.default_rng(seed).permutation(num_users)
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, min(num_folds, num_users))]


def leave_users_out(
    choices: PairChoices,
    num_groups: int,
    folds: list[Tensor],
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    **fit: Any,
) -> LeftOutUsers:
    """Fit a mixture without each fold, and score the fold's users with it.

    Args:
        choices: all users.
        num_groups: K.
        folds: indices of the users left out each time; together all users.
        seed: of the starts, the same in every fold.
        advance: called after every fit.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """
    num_users = len(choices.user_offsets) - 1
    posterior = torch.zeros(num_users, num_groups, dtype=torch.float64)
    log_likelihood = torch.zeros(num_users, dtype=torch.float64)
    reference: Tensor | None = None
    for fold in folds:
        inside = torch.ones(num_users, dtype=torch.bool)
        inside[fold] = False
        mixture = fit_choices(choices.take_users(inside.nonzero().flatten()), num_groups, seed, **fit)
        outside = choices.take_users(fold)
        seen = mixture.expectation_of(outside)
        reference = mixture.weight if reference is None else reference
        order = match_groups(mixture.weight, reference)
        posterior[fold] = seen.responsibilities[:, order].double()
        log_likelihood[fold] = seen.log_likelihood.double()
        advance()
    return LeftOutUsers(posterior, log_likelihood)


def choose_penalty(
    choices: PairChoices, num_groups: int, folds: list[Tensor], candidates: Sequence[float], **settings: Any
) -> tuple[float, LeftOutUsers]:
    """The penalty under which left-out users are likeliest, and these users as it sees them.

    Args:
        choices: all users.
        num_groups: K.
        folds: as in :func:`leave_users_out`.
        candidates: penalties to try, in the units of the fit.
        **settings: passed to :func:`leave_users_out`.
    """
    tried = {l2: leave_users_out(choices, num_groups, folds, l2=l2, **settings) for l2 in candidates}
    best = max(tried, key=lambda l2: tried[l2].log_likelihood.sum().item())
    return best, tried[best]


def match_groups(weight: Tensor, reference: Tensor) -> Tensor:
    """The order of the rows of ``weight`` [K, D] that points most where ``reference`` [K, D] does."""
    unit, other = (torch.nn.functional.normalize(heads.double(), dim=-1) for heads in (reference, weight))
    return torch.from_numpy(linear_sum_assignment((unit @ other.T).numpy(), maximize=True)[1])
