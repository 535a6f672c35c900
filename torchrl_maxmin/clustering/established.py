"""Are groups that were found there? They must be found again, predict more, and lie apart.

EM gives as many groups as it is asked for. They are established only if fits to other users from other starts
put the same people together, if they predict left-out judgements of their own users better than one reward
does, and if left-out users are likelier to come from groups than from tastes that lie evenly between them.
A group is established only if the other groups' tastes, followed closely, hardly or not at all, do not
explain them as well: people who choose at random have no taste of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, qmc
from torch import Tensor

from torchrl_maxmin.clustering.agreement import LEAST_AGREEMENT, adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.left_out import (
    NUM_USER_FOLDS,
    SHORT_ROUNDS,
    choose_penalty,
    gain_on_judgements,
    match_groups,
    user_folds,
)
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.scales import (
    log_likelihood_with,
    log_prior_of_scales,
    scaled_log_likelihood,
)
from torchrl_maxmin.clustering.selection import L2_CANDIDATES, SEARCH, coin_log_likelihood
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.stats import interval_over_users

__all__ = ["Establishment", "GroupEvidence", "establish", "evidence_for", "searched_penalties"]

#: Spreads of the even alternative, in those of the groups' own tastes.
SPREADS = (0.5, 1.0, 1.5, 2.5)
_HEADS = 256  # drawn of the even alternative


@dataclass(frozen=True)
class Mean:
    """A mean over users or refits with its t interval; ends are None with fewer than two."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Any, confidence: float = 0.95, most: float = np.inf) -> Mean:
        """Compute it of values [n], n > 0, that are ``most`` at most."""
        found = interval_over_users(
            values, scale="identity", confidence=confidence, num_resamples=0, warn=False
        )
        low, high = float(found.low), min(float(found.high), most)
        return cls(float(found.estimate), *((None, None) if np.isnan(low) else (low, high)))

    def above(self, value: float) -> bool:
        """Whether the whole interval lies above a value."""
        return self.low is not None and self.low > value


@dataclass(frozen=True)
class GroupEvidence:
    """Evidence for one group.

    Attributes:
        established: whether it is claimed.
        reason: why not; None where it is.
        jaccard: users of the group and of its match in a refit, those in both over those in either; mean over
            refits, t interval.
        correlation: of the head with its match's, over the rows' margins, mean over refits, t interval.
        gain: nats a choice by which left-out judgements of its users are likelier than under one reward, mean
            over users, t interval; None where none was left out.
        beyond_others: nats a user by which left-out users are likelier with the group than with the others
            alone, mean over all users, t interval.
    """

    established: bool
    reason: str | None
    jaccard: Mean
    correlation: Mean
    gain: Mean | None
    beyond_others: Mean


@dataclass(frozen=True)
class Establishment:
    """Whether groups are established, and the evidence.

    Attributes:
        established: whether any difference between groups is claimed.
        reasons: why not, one sentence each.
        agreement: adjusted Rand index of the groups with those of refits to resampled users from other
            starts, t interval over refits.
        gain: nats a choice by which K groups beat one reward on left-out judgements, mean over users, t
            interval; None where nobody has two judgements.
        over_spectrum: nats a user by which groups beat tastes spread evenly between them, mean over left-out
            users, t interval.
        groups: by group.
        num_refits: refits.
    """

    established: bool
    reasons: list[str]
    agreement: Mean
    gain: Mean | None
    over_spectrum: Mean
    groups: list[GroupEvidence]
    num_refits: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, as for a JSON file."""
        return asdict(self)

    def report(self) -> str:
        """A few plain lines."""
        answer = "the groups are established" if self.established else "the groups are NOT established"
        lines = [f"{answer}:" if self.reasons else answer, *(f"  {reason}" for reason in self.reasons)]
        lines.append(
            f"  found again by {self.num_refits} refits: adjusted Rand index {_text(self.agreement)}"
        )
        if self.gain is not None:
            lines.append(f"  left-out judgements: {_text(self.gain, '+.4f')} nats a choice over one reward")
        lines.append(f"  against evenly spread tastes: {_text(self.over_spectrum, '+.3f')} nats a user")
        return "\n".join(lines)


def _text(value: Mean, form: str = ".2f") -> str:
    ends = "" if value.low is None else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.mean:{form}}{ends}"


def establish(
    choices: PairChoices,
    mixture: LinearMixture,
    fits: dict[int, dict[str, Any]],
    *,
    num_refits: int = 6,
    num_folds: int = NUM_USER_FOLDS,
    seed: int = 0,
) -> Establishment:
    """Ask whether the groups of a fit are there.

    Args:
        choices: all users.
        mixture: the fit to them, of two groups or more.
        fits: arguments of :func:`~torchrl_maxmin.clustering.fit_choices` by number of groups, 1 and K.
        num_refits: fits to users drawn with replacement, each from starts of its own.
        num_folds: parts of the users, each left out once.
        seed: of everything drawn.

    Returns:
        The verdict: not established where the agreement of refits is below :data:`LEAST_AGREEMENT` or its
        interval reaches below 0, where left-out judgements are not seen to gain, or where groups are not seen
        to beat a spectrum. A group but the largest must gain by itself, and every one beyond the others.
    """
    num_groups = len(mixture.log_prior)
    short = {"short_rounds": SHORT_ROUNDS}
    fits = {k: short | fit if fit.get("m_step") == "exact" else fit for k, fit in fits.items()}
    with progress_bar("are the groups there", num_refits + 1 + num_folds) as advance:
        agreement, jaccard, correlation = _refits(
            choices, mixture, fits[num_groups], num_refits, seed, advance
        )
        gained = gain_on_judgements(choices, num_groups, fits, seed, reference=mixture.weight)
        advance()
        over, beyond = _left_out_users(choices, mixture, fits[num_groups], num_folds, seed, advance)
    everyone = None if gained is None else _gain_a_choice(gained[0].sum(1), gained[1].sum(1))
    reasons = []
    if len(mixture.assignments.unique()) < num_groups:
        reasons.append("nobody's likeliest group is one of them")
    if agreement.mean < LEAST_AGREEMENT:
        reasons.append(
            f"other users and starts give other groups (adjusted Rand index {_text(agreement)}, "
            f"under {LEAST_AGREEMENT:g})"
        )
    if everyone is not None and not everyone.above(0):
        reasons.append(
            "left-out judgements of known users are not predicted better than by one reward "
            f"({_text(everyone, '+.4f')} nats a choice)"
        )
    if not over.above(0):
        reasons.append(
            f"tastes that lie evenly between people explain left-out users as well ({_text(over, '+.3f')} "
            "nats a user for groups)"
        )
    order = mixture.log_prior.argsort(descending=True).tolist()
    evidence = []
    for k in range(num_groups):
        gain = None if gained is None else _gain_a_choice(gained[0][:, k], gained[1][:, k])
        reason = reasons[0] if reasons else None
        if reason is None and jaccard[k].mean < LEAST_AGREEMENT:
            reason = f"refits hold other people in it (Jaccard index {_text(jaccard[k])})"
        if reason is None and gained is not None and k != order[0] and (gain is None or not gain.above(0)):
            reason = "its own reward is not seen to predict its users' left-out judgements better"
        if reason is None and not beyond[k].above(0):
            reason = (
                "people who follow another group's reward, closely or hardly, explain left-out users as well "
                f"({_text(beyond[k], '+.3f')} nats a user for the group)"
            )
        evidence.append(GroupEvidence(reason is None, reason, jaccard[k], correlation[k], gain, beyond[k]))
    if not reasons and sum(group.established for group in evidence) < 2:
        reasons.append("fewer than two groups hold by themselves")
    return Establishment(not reasons, reasons, agreement, everyone, over, evidence, num_refits)


def evidence_for(
    choices: PairChoices, num_groups: int, penalties: Mapping[int, float], seed: int = 0
) -> Establishment:
    """Fit K groups by the search's settings and ask whether they are there.

    Args:
        choices: of all users, of :func:`~torchrl_maxmin.clustering.selection.searched_choices`.
        num_groups: K, two or more.
        penalties: by number of groups; those of 1 and K are searched for where they are missing.
        seed: of everything drawn.
    """
    found = searched_penalties(choices, num_groups, penalties, seed)
    fits = {k: SEARCH | {"l2": found[k]} for k in (1, num_groups)}
    return establish(choices, fit_choices(choices, num_groups, seed, **fits[num_groups]), fits, seed=seed)


def searched_penalties(
    choices: PairChoices, num_groups: int, penalties: Mapping[int, float], seed: int = 0
) -> dict[int, float]:
    """Return penalties with those of 1 and K, searched for by left-out users where they are missing.

    Args:
        choices: of all users, of :func:`~torchrl_maxmin.clustering.selection.searched_choices`.
        num_groups: K.
        penalties: by number of groups.
        seed: of parts and starts.
    """
    folds = user_folds(len(choices.user_offsets) - 1, NUM_USER_FOLDS, seed)
    found = dict(penalties)
    for k in (1, num_groups):
        if not found.get(k):
            found[k] = choose_penalty(choices, k, folds, L2_CANDIDATES, seed=seed, **SEARCH)[0]
    return found


def _gain_a_choice(gain: Tensor, held: Tensor) -> Mean | None:
    """Nats a choice of users with left-out choices, mean over them."""
    there = held > 0
    return Mean.of((gain[there] / held[there]).numpy()) if bool(there.any()) else None


def _refits(
    choices: PairChoices,
    mixture: LinearMixture,
    fit: dict[str, Any],
    num_refits: int,
    seed: int,
    advance: Callable[[], None],
) -> tuple[Mean, list[Mean], list[Mean]]:
    """Agreement of refits as a whole, and by group Jaccard index and correlation of heads."""
    num_users, own = len(choices.user_offsets) - 1, mixture.assignments.cpu()
    margins = _unit_margins(choices, mixture)
    rand, jaccard, correlation = [], [], []
    for refit in range(num_refits):
        drawn = np.sort(np.random.default_rng([seed, refit]).integers(num_users, size=num_users))
        found = fit_choices(
            choices.take_users(torch.from_numpy(drawn)), len(margins), seed + refit + 1, **fit
        )
        groups = found.expectation_of(choices).responsibilities.argmax(-1).cpu()
        rand.append(adjusted_rand_index(own, groups))
        both = torch.stack([own * len(margins) + groups]).flatten().bincount(minlength=len(margins) ** 2)
        both = both.view(len(margins), -1).double()
        either = both.sum(1, keepdim=True) + both.sum(0) - both
        overlap = both / either.clamp_min(1)
        rows = match_groups(overlap.T, torch.eye(len(margins), dtype=torch.float64))
        jaccard.append(overlap[torch.arange(len(margins)), rows].tolist())
        correlation.append((margins * _unit_margins(choices, found)[rows]).sum(-1).tolist())
        advance()
    by_group = (zip(*values, strict=True) for values in (jaccard, correlation))
    similar, correlated = ([Mean.of(values, most=1.0) for values in columns] for columns in by_group)
    return Mean.of(rand, most=1.0), similar, correlated


def _unit_margins(choices: PairChoices, mixture: LinearMixture) -> Tensor:
    """Margins [K, P] of unit length; uncentred, as which side a difference is on is chance."""
    margins = (choices.differences.to(mixture.weight.dtype) @ mixture.weight.T).double()
    return torch.nn.functional.normalize(margins, dim=0).T


def _left_out_users(
    choices: PairChoices,
    mixture: LinearMixture,
    fit: dict[str, Any],
    num_folds: int,
    seed: int,
    advance: Callable[[], None],
) -> tuple[Mean, list[Mean]]:
    """Nats a left-out user by which groups beat tastes like theirs without gaps, and each the others alone.

    The former are normal, with the mean and the covariance of the groups' heads, times the spread that suits
    the users of the fit: as much difference between people, of the same kind. The latter have users follow
    the heads that are left, or none, at scales that are fitted anew.
    """
    num_users, num_groups = len(choices.user_offsets) - 1, len(mixture.log_prior)
    folds = user_folds(num_users, num_folds, seed)
    sobol = qmc.Sobol(num_groups - 1, seed=seed).random(_HEADS)
    normal = torch.from_numpy(norm.ppf(np.clip(sobol, 1e-6, 1 - 1e-6))).to(choices.differences.device)
    difference, beyond = np.zeros(num_users), np.zeros((num_groups, num_users))
    for fold in folds:
        inside = torch.ones(num_users, dtype=torch.bool)
        inside[fold] = False
        rest, outside = choices.take_users(inside.nonzero().flatten()), choices.take_users(fold)
        found = fit_choices(rest, num_groups, seed, **fit)
        mean, axes = _mean_and_axes(found)
        known, other = (scaled_log_likelihood(part, found.weight.double()) for part in (rest, outside))
        grouped = _log_likelihood(known, other, found.log_prior)[1]
        known, other = (_or_at_random(*both) for both in ((known, rest), (other, outside)))
        for k, own in enumerate(match_groups(found.weight, mixture.weight).tolist()):
            others = torch.arange(num_groups, device=grouped.device) != own
            alone = _log_likelihood(known[:, others], other[:, others], found.log_prior[others])[1]
            beyond[k, fold.numpy()] = (grouped - alone).cpu().numpy()
        even = normal.new_zeros(len(normal))
        spread = []
        for scale in SPREADS:
            tastes = mean + scale * normal @ axes
            known, other = (scaled_log_likelihood(part, tastes) for part in (rest, outside))
            spread.append(_log_likelihood(known, other, even))
        best = max(range(len(SPREADS)), key=lambda i: spread[i][0].sum().item())
        difference[fold.numpy()] = (grouped - spread[best][1]).cpu().numpy()
        advance()
    return Mean.of(difference), [Mean.of(values) for values in beyond]


def _mean_and_axes(mixture: LinearMixture) -> tuple[Tensor, Tensor]:
    """Mean [D] of the heads, and axes [K - 1, D] that give standard normals the heads' covariance."""
    weight, shares = mixture.weight.double(), mixture.log_prior.double().softmax(-1)
    mean = shares @ weight
    _, size, axes = torch.linalg.svd(shares.sqrt().unsqueeze(1) * (weight - mean), full_matrices=False)
    kept = len(shares) - 1
    return mean, size[:kept, None] * axes[:kept]


def _or_at_random(scaled: Tensor, choices: PairChoices) -> Tensor:
    """What heads say of users at all scales [U, K, A], and at scale 0 [U, K, A + 1]."""
    coin = coin_log_likelihood(choices).to(scaled)
    return torch.cat([scaled, coin[:, None, None].expand(-1, scaled.shape[1], 1)], -1)


def _log_likelihood(known: Tensor, other: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of users of the fit [U] and of others [U'], with scales as the former have them.

    Args:
        known: what heads say of the former at all scales [U, K, A].
        other: of the latter [U', K, A].
        log_prior: log mixing weights [K].
    """
    before = log_prior.double().log_softmax(-1)
    scales = log_prior_of_scales(known, log_prior) if len(before) <= 16 else None
    if scales is None:  # only how often each scale is met is fitted, not each of many heads
        summed = torch.logsumexp(known + before[:, None], 1, keepdim=True)
        scales = before[:, None] + log_prior_of_scales(summed, before.new_zeros(1))
    return log_likelihood_with(known, scales), log_likelihood_with(other, scales)
