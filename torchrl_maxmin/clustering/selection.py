"""The choice of K, by mixtures fitted without some users, and how likely these are then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.agreement import adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.heads import FeatureMap
from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.clustering.left_out import (
    NUM_USER_FOLDS,
    choose_penalty,
    gain_on_judgements,
    heldout_of,
    leave_users_out,
    user_folds,
)
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.core.progress import progress_bar

#: Penalties that are tried where one is chosen.
L2_CANDIDATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
#: Standard errors that a gain on left-out judgements must have: 95%, one-sided.
ONE_SIDED = 1.645


#: Fits by which K is chosen and groups are judged, wherever that is asked.
SEARCH: dict[str, Any] = {
    "m_step": "exact",
    "convergence_tolerance": 1e-4,
    "num_rounds": 100,
    "num_restarts": 4,
}


def searched_choices(choices: PairChoices, features: FeatureMap | None = None) -> PairChoices:
    """The choices as the search sees them: features standardised, wide ones by components, repeats found.

    Args:
        choices: with features [P, D].
        features: how, where it is known.

    Returns:
        The same with at most :data:`~.heads.MOST_FEATURES`; rewards linear in these are linear in the former.
    """
    features = FeatureMap.of(choices.differences) if features is None else features
    return replace(choices, differences=features(choices.differences)).find_distinct()


@dataclass(frozen=True)
class NumGroupsChoice:
    """A choice of K, and what it rests on.

    Attributes:
        num_groups: the smallest K within one standard error of the best by left-out users, lowered until it
            is seen to beat one reward on them (95%, one-sided) and on left-out judgements, too; 1 where no
            reward beats a coin.
        heldout_log_likelihood: nats a choice of users left out of the fit, by K, scales of users summed out.
        standard_error: of the difference to the best K, by K.
        coin: nats a choice of a coin; None where it was not asked.
        beats_coin: whether the best K is likelier by a standard error; None where it was not asked.
        judgement_gain: nats a choice by which K groups beat one reward on left-out judgements of known users,
            by K that was looked at; empty where nobody has two judgements.
        judgement_error: standard errors of these, over users.
        edges: sentences on where the search ended at an edge.
        heldout_pairs: nats a choice on held-out judgements of users in the fit, by K; this and what
            follows are empty unless ``diagnostics`` were asked for, and do not decide.
        heldout_pairs_error: of the difference to the best K, by K.
        bic: -2 log-likelihood + log(users) x parameters, by K; smaller is better.
        stability: mean adjusted Rand index of the groups that refits on resampled users give, by K.
        l2: the penalty that left-out users chose, by K; empty where it was given.
    """

    num_groups: int
    heldout_log_likelihood: dict[int, float]
    standard_error: dict[int, float]
    coin: float | None = None
    beats_coin: bool | None = None
    judgement_gain: dict[int, float] = field(default_factory=dict)
    judgement_error: dict[int, float] = field(default_factory=dict)
    edges: list[str] = field(default_factory=list)
    heldout_pairs: dict[int, float] = field(default_factory=dict)
    heldout_pairs_error: dict[int, float] = field(default_factory=dict)
    bic: dict[int, float] = field(default_factory=dict)
    stability: dict[int, float] = field(default_factory=dict)
    l2: dict[int, float] = field(default_factory=dict)

    @property
    def num_groups_by_pairs(self) -> int:
        """K by held-out judgements alone, under the same rule."""
        return _one_standard_error(self.heldout_pairs, self.heldout_pairs_error)

    @property
    def num_groups_by_bic(self) -> int:
        """K by BIC alone."""
        return min(self.bic, key=lambda k: self.bic[k])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by K, as for a JSON file."""
        by_k = ("heldout_log_likelihood", "standard_error", "judgement_gain", "judgement_error", "l2")
        found = {name: {str(k): value for k, value in getattr(self, name).items()} for name in by_k}
        return {
            "num_groups": self.num_groups,
            **found,
            "coin": self.coin,
            "beats_coin": self.beats_coin,
            "edges": self.edges,
            "report": self.report(),
        }

    def report(self) -> str:
        """A few plain lines: the answer, and what each K reached by every criterion."""
        tried = list(self.heldout_log_likelihood)
        if self.num_groups > 1:
            answer = f"your users form {self.num_groups} groups"
        elif self.beats_coin is False:
            answer = "nothing is learned: no reward predicts left-out users better than a coin"
        elif len(tried) == 1:
            answer = "too few users to look for more than one group"
        else:
            answer = "your users do not differ: no more groups than one predict left-out users better"
        lines = [f"{answer} (K={self.num_groups})"]
        for k in tried:
            line = f"  K={k}: left-out users {self.heldout_log_likelihood[k]:.4f} nats a choice"
            if k in self.judgement_gain:
                line += (
                    f", left-out judgements {self.judgement_gain[k]:+.4f} of one reward's "
                    f"(standard error {self.judgement_error[k]:.4f})"
                )
            if self.heldout_pairs:
                line += f", left-out pairs {self.heldout_pairs[k]:.4f}, BIC {self.bic[k]:.0f}"
                line += f", stability {self.stability[k]:.2f}" if k > 1 else ""
            lines.append(line)
        if self.coin is not None:
            lines.append(f"  a coin: {self.coin:.4f}")
        if self.heldout_pairs:
            lines.append(
                f"  left-out pairs alone would say K={self.num_groups_by_pairs}, "
                f"BIC K={self.num_groups_by_bic}"
            )
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.edges)])


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
    answer may be that the users do not differ. Likelihoods have each user's scale summed out, so that
    users who choose with more noise are no group. The K that is found must be seen to beat one reward on
    left-out users, and on left-out judgements of known users as well, and a coin.

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
    choices, *_ = judged_choices(differences, user_offsets, row_weights, judgements, choice_offsets)
    return choose_num_groups(choices, max_groups, **settings)


def choose_num_groups(
    choices: PairChoices,
    max_groups: int = 3,
    *,
    num_folds: int = NUM_USER_FOLDS,
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
        l2_candidates: penalties to choose among for every K, by the same left-out users, and beyond them
            where the last is the best; empty takes that of ``fit``.
        diagnostics: whether to look at held-out pairs of known users, BIC and stability too, for
            ``2 + num_refits`` more fits a K.
        num_refits: resamples of the users behind the stability.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """
    num_users = len(choices.user_offsets) - 1
    folds = user_folds(num_users, num_folds, seed)
    candidates = range(1, min(max_groups, num_users - max(map(len, folds))) + 1)
    user_ll: dict[int, Tensor] = {}
    penalty: dict[int, float] = {}
    edges: list[str] = []
    criteria = _Diagnostics(choices, seed, num_refits)
    with progress_bar("choosing the number of groups", len(candidates)) as advance:
        for k in candidates:
            settings = {"seed": seed, **fit}
            if l2_candidates:
                settings["first"] = penalty.get(k - 1)
                penalty[k], left_out = choose_penalty(choices, k, folds, l2_candidates, **settings)
            else:
                left_out = leave_users_out(choices, k, folds, **settings)
            user_ll[k] = left_out.robust
            if diagnostics:
                criteria.add(k, fit | ({"l2": penalty[k]} if l2_candidates else {}))
            advance()
    total, errors = _compare(user_ll)
    found = _one_standard_error(total, errors)
    coin = coin_log_likelihood(choices)
    above = user_ll[found] - coin
    beats_coin = bool(above.sum() > above.std() * num_users**0.5) if num_users > 2 else None
    if beats_coin is False:
        found = 1
    gains: dict[int, float] = {}
    gain_errors: dict[int, float] = {}
    while found > 1:
        over_one = user_ll[found] - user_ll[1]
        if over_one.sum().item() <= ONE_SIDED * _error(over_one):
            found -= 1
            continue
        by_l2 = {k: fit | ({"l2": penalty[k]} if l2_candidates else {}) for k in (1, found)}
        gained = gain_on_judgements(choices, found, by_l2, seed)
        if gained is None:  # nobody has two judgements: left-out users alone decide
            break
        gain, held = (values.sum(1) for values in gained)
        num_held = held.sum().item()
        gains[found] = gain.sum().item() / num_held
        gain_errors[found] = _error(gain[held > 0]) / num_held
        if gains[found] > ONE_SIDED * gain_errors[found]:
            break
        found -= 1
    if found == max(candidates) and found > 1:
        edges.append(f"K={found} is the largest that was tried: raise --max_groups.")
    pairs_total, pairs_errors = _compare(criteria.user_ll)
    num_choices = choices.num_choices
    return NumGroupsChoice(
        found,
        _scaled(total, num_choices),
        _scaled(errors, num_choices),
        coin.sum().item() / num_choices,
        beats_coin,
        gains,
        gain_errors,
        edges,
        _scaled(pairs_total, criteria.heldout.num_choices),
        _scaled(pairs_errors, criteria.heldout.num_choices),
        criteria.bic,
        criteria.stability,
        penalty,
    )


def coin_log_likelihood(choices: PairChoices) -> Tensor:
    """Log-likelihood [U] in float64 of every user's choices where each item is as likely."""
    nothing = choices.differences.new_zeros(1, choices.differences.shape[1])
    return choices.user_log_likelihood(nothing)[:, 0, 0].cpu()


def _error(values: Tensor) -> float:
    """Standard error of the sum of values of users [U]."""
    return (values.std() * len(values) ** 0.5).item() if len(values) > 1 else math.inf


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
    choices, *_ = judged_choices(differences, user_offsets, row_weights, judgements, choice_offsets)
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


def predictive_log_likelihood(known: LinearMixture, heldout: PairChoices) -> Tensor:
    """Log-likelihood [U] of further pairs of the users that ``known`` was fitted on, by their posterior."""
    margins = heldout.differences @ known.weight.T
    by_user = heldout.log_likelihood_by_user(margins)
    return torch.logsumexp(known.responsibilities.double().log() + by_user, -1).cpu()


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
