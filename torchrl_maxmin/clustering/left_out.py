"""Users and judgements left out of a fit, and how likely mixtures find them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.luce import offsets_of
from torchrl_maxmin.clustering.scales import (
    log_likelihood_with,
    log_prior_of_scales,
    scaled_log_likelihood,
)

__all__ = [
    "NUM_JUDGEMENT_FOLDS",
    "NUM_USER_FOLDS",
    "LeftOutUsers",
    "choose_penalty",
    "gain_on_judgements",
    "heldout_of",
    "heldout_rows",
    "judgement_folds",
    "judgement_numbers",
    "leave_users_out",
    "match_groups",
    "user_folds",
]

#: Factor by which the search of a penalty goes beyond the last one.
WIDER = 4.0
#: Rounds of every start before the best goes on alone, where M-steps converge.
SHORT_ROUNDS = 10
#: Parts of the users, each left out once.
NUM_USER_FOLDS = 4
#: Parts of each user's judgements, each left out once.
NUM_JUDGEMENT_FOLDS = 5
_MOST_WIDER = 6
_WORTHWHILE = 0.5  # nats over all users


@dataclass(frozen=True)
class LeftOutUsers:
    """Every user as a mixture sees them that was fitted without them.

    Attributes:
        posterior: [U, K] float64; the folds' groups are matched to one another.
        log_likelihood: [U] float64.
        robust: the same with each user's scale summed out [U].
        weight: heads [K, D] of each fold's fit.
    """

    posterior: Tensor
    log_likelihood: Tensor
    robust: Tensor
    weight: list[Tensor]


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
    starts: Sequence[Tensor] | None = None,
    thorough: bool = False,
    **fit: Any,
) -> LeftOutUsers:
    """Fit a mixture without each fold, and score the fold's users with it.

    Args:
        choices: all users.
        num_groups: K.
        folds: indices of the users left out each time; together all users.
        seed: of the starts, the same in every fold.
        starts: heads [K, D] to begin each fold's fit from, in the place of random ones.
        thorough: whether every random start runs to its end, and not the one that is best after some rounds.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """
    num_users = len(choices.user_offsets) - 1
    exact = fit.get("m_step") == "exact"
    short: dict[str, Any] = {"short_rounds": SHORT_ROUNDS} if exact and not thorough else {}
    posterior = torch.zeros(num_users, num_groups, dtype=torch.float64)
    log_likelihood, robust = torch.zeros(2, num_users, dtype=torch.float64)
    reference: Tensor | None = None
    weights: list[Tensor] = []
    for i, fold in enumerate(folds):
        inside = torch.ones(num_users, dtype=torch.bool)
        inside[fold] = False
        rest, outside = choices.take_users(inside.nonzero().flatten()), choices.take_users(fold)
        start = None if starts is None or num_groups == 1 else starts[i]
        mixture = fit_choices(rest, num_groups, seed, start=start, **short, **fit)
        weights.append(mixture.weight)
        seen = mixture.expectation_of(outside)
        reference = mixture.weight if reference is None else reference
        order = match_groups(mixture.weight, reference)
        posterior[fold] = seen.responsibilities[:, order].double().cpu()
        log_likelihood[fold] = seen.log_likelihood.double().cpu()
        prior = log_prior_of_scales(scaled_log_likelihood(rest, mixture.weight), mixture.log_prior)
        robust[fold] = log_likelihood_with(scaled_log_likelihood(outside, mixture.weight), prior).cpu()
    return LeftOutUsers(posterior, log_likelihood, robust, weights)


def choose_penalty(
    choices: PairChoices,
    num_groups: int,
    folds: list[Tensor],
    candidates: Sequence[float],
    *,
    first: float | None = None,
    thorough: bool = False,
    **settings: Any,
) -> tuple[float, LeftOutUsers]:
    """The penalty under which left-out users are likeliest, and these users as it sees them.

    The search climbs from one candidate to the next, each fit beginning where the last one ended; from the
    first and the last of several it goes on by factors of :data:`WIDER`.

    Args:
        choices: all users.
        num_groups: K.
        folds: as in :func:`leave_users_out`.
        candidates: penalties to try, in the units of the fit; a single one is taken.
        first: where the search begins; the middle of the candidates by default.
        thorough: whether each fit takes random starts, each to its end: of few choices a user a fold's fit
            that fell into a bad optimum would hand it on from candidate to candidate.
        **settings: passed to :func:`leave_users_out`.
    """
    grid = sorted(candidates)
    widest = grid[0] / WIDER**_MOST_WIDER, grid[-1] * WIDER**_MOST_WIDER
    tried: dict[float, LeftOutUsers] = {}
    reached: dict[float, float] = {}
    waiting = [grid[len(grid) // 2] if first is None else first]
    while waiting:
        l2 = waiting.pop()
        near = min(tried, key=lambda other: abs(math.log(other / l2)), default=None)
        starts = None if near is None or thorough else tried[near].weight
        begin: dict[str, Any] = {"starts": starts, "thorough": thorough}
        tried[l2] = leave_users_out(choices, num_groups, folds, l2=l2, **begin, **settings)
        # not the robust one: heads of any length would do for it, and posteriors would be too unsure
        reached[l2] = tried[l2].log_likelihood.sum().item()
        best = max(reached, key=lambda l2: reached[l2])
        others = [value for l2, value in reached.items() if l2 != best]
        outside = best in (min(tried), max(tried)) and not grid[0] < best < grid[-1]
        if outside and others and reached[best] - max(others) < _WORTHWHILE:
            break  # flat beyond the candidates
        below = max((other for other in grid if other < best), default=best / WIDER)
        above = min((other for other in grid if other > best), default=best * WIDER)
        if len(grid) > 1:
            waiting = [l2 for l2 in (below, above) if l2 not in tried and widest[0] <= l2 <= widest[1]]
    return best, tried[best]


def match_groups(weight: Tensor, reference: Tensor) -> Tensor:
    """The order of the rows of ``weight`` [K, D] that points most where ``reference`` [K, D] does."""
    unit, other = (torch.nn.functional.normalize(heads.double(), dim=-1) for heads in (reference, weight))
    return torch.from_numpy(linear_sum_assignment((unit @ other.T).cpu().numpy(), maximize=True)[1])


def heldout_of(choices: PairChoices, fraction: float, seed: int) -> Tensor:
    """Mark the rows [P] of a random ``fraction`` of each user's judgements, never a part of one."""
    alone = choices.judgements is None and choices.choice_offsets is None
    judgements = None if alone else _row_judgements(choices).cpu()
    return heldout_rows(choices.user_offsets.cpu(), fraction, seed, judgements)


def _row_judgements(choices: PairChoices) -> Tensor:
    """What each row follows from [P]; its choice where nothing is said."""
    if choices.judgements is not None:
        return choices.judgements
    return choices.at_rows(torch.arange(len(choices.choice_users), device=choices.user_offsets.device))


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


def judgement_numbers(choices: PairChoices) -> tuple[np.ndarray, np.ndarray]:
    """Number the judgements: user and name of each [J, 2], and which each row follows from [P]."""
    pairs = np.stack([choices.row_users.cpu().numpy(), _row_judgements(choices).cpu().numpy()], axis=1)
    unique, which = np.unique(pairs, axis=0, return_inverse=True)
    return unique, which.reshape(-1)


def judgement_folds(choices: PairChoices, num_folds: int, seed: int) -> list[Tensor]:
    """Deal every user's judgements into parts at random: rows of each part, bool [P]; none is cut.

    A user's only judgement is in no part.
    """
    unique, which = judgement_numbers(choices)
    order = np.lexsort((np.random.default_rng(seed).random(len(unique)), unique[:, 0]))
    counts = np.bincount(unique[:, 0], minlength=len(choices.user_offsets) - 1)
    place = np.empty(len(unique), np.int64)
    place[order] = np.arange(len(unique)) - np.repeat(np.cumsum(counts) - counts, counts)
    part = np.where(counts[unique[:, 0]] > 1, place % num_folds, -1)[which]
    return [torch.from_numpy(part == fold) for fold in range(num_folds) if (part == fold).any()]


def gain_on_judgements(
    choices: PairChoices,
    num_groups: int,
    fits: dict[int, dict[str, Any]],
    seed: int,
    *,
    num_folds: int = NUM_JUDGEMENT_FOLDS,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Nats by which K groups predict left-out judgements of known users better than one reward does.

    Args:
        choices: all users.
        num_groups: K.
        fits: arguments of :func:`~torchrl_maxmin.clustering.fit_choices` by number of groups, 1 and K.
        seed: of the parts and the starts.
        num_folds: parts of each user's judgements, each left out once.
        reference: heads [K, D] in whose order the groups are to be.

    Returns:
        Nats and left-out choices of every user, by the group that the other judgements put them in [U, K];
        None where nobody has two judgements.
    """
    gain, held = torch.zeros(2, len(choices.user_offsets) - 1, num_groups, dtype=torch.float64)
    start: dict[int, Tensor] = {}
    for fold in judgement_folds(choices, num_folds, seed):
        known, later = choices.keep_rows(~fold), choices.keep_rows(fold)
        found = []
        for k in (1, num_groups):
            mixture = fit_choices(known, k, seed, start=start.get(k), **fits[k])
            if k > 1:
                reference = mixture.weight if reference is None else reference
                mixture = mixture.ordered(match_groups(mixture.weight, reference))
                start[k] = mixture.weight
            before, after = (scaled_log_likelihood(part, mixture.weight) for part in (known, later))
            found.append(log_likelihood_with(after, log_prior_of_scales(before, mixture.log_prior), before))
        counts = later.choices_by_user.cpu()
        there = (counts > 0).nonzero().flatten()
        where = there, mixture.assignments.cpu()[there]
        gain[where] += (found[1] - found[0]).cpu()[there]
        held[where] += counts[there]
    return None if held.sum() == 0 else (gain, held)
