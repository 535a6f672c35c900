"""Can these preferences tell who belongs to which group?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.agreement import LEAST_AGREEMENT, adjusted_rand_index
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.judged import judged_choices
from torchrl_maxmin.clustering.left_out import choose_penalty, heldout_of, match_groups, user_folds
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.luce import offsets_of, redraw
from torchrl_maxmin.clustering.selection import L2_CANDIDATES
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.stats import accuracy_by_group

#: Expected misassignment, averaged over groups, above which groups are called not identifiable.
MISASSIGNMENT_BAR = 0.05

_MOST_MORE_PAIRS = 1024
_SIMULATED_USERS = 2000  # a group: the simulated rate is good to half a point


@dataclass(frozen=True)
class GroupAccuracy:
    """How often a group's head is right on held-out pairs of the users given to it.

    Attributes:
        users: how many users with held-out pairs the group holds.
        pairs: how many such pairs, ties halved.
        accuracy: share of pairs whose margin is positive, each user counted once; None without pairs.
        low, high: ends of the t interval over users; None with one user.
    """

    users: int
    pairs: float
    accuracy: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class IdentifiabilityReport:
    """Evidence for the groups, largest first, and whether it is enough.

    Attributes:
        num_users: U.
        num_groups: K.
        pairs_per_user: quartiles.
        prompt_overlap: share of the prompts that two or more users saw; None without prompts.
        head_correlation: correlation of the heads' margins over the pairs [K][K].
        rms_margin_difference: root mean square difference of the heads' margins [K][K].
        responsibility_entropy: mean over left-out users, nats.
        misassignment: expected share of left-out users whose likeliest group is not theirs.
        balanced_misassignment: the same averaged over groups, so that a small group counts as much.
        balanced_misassignment_high: what nine in ten resamples of the users stay under.
        agreement: adjusted Rand index of the groups of left-out users with those of the fit to all.
        identifiable: whether ``balanced_misassignment_high`` is at most :data:`MISASSIGNMENT_BAR`: a
            small group has few users to judge by, and the claim needs evidence; and ``agreement`` at least
            :data:`LEAST_AGREEMENT`: fits that are sure of different groups identify none.
        more_pairs_per_user: about so many more pairs a user would make it so; 0 where it is,
            None where :data:`_MOST_MORE_PAIRS` would not do.
        group_accuracy: by group.
        l2: the penalty, as left-out users chose it.
        mixture: the fit to all users at that penalty; not in :meth:`to_dict`.
        posterior: of every user by a fit without them [U, K]; not in :meth:`to_dict`.
    """

    num_users: int
    num_groups: int
    pairs_per_user: tuple[float, float, float]
    prompt_overlap: float | None
    head_correlation: list[list[float]]
    rms_margin_difference: list[list[float]]
    responsibility_entropy: float
    misassignment: float
    balanced_misassignment: float
    balanced_misassignment_high: float
    agreement: float
    identifiable: bool
    more_pairs_per_user: int | None
    group_accuracy: list[GroupAccuracy]
    l2: float
    mixture: LinearMixture = field(repr=False)
    posterior: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, as for a JSON file."""
        return {key: value for key, value in asdict(self).items() if key not in ("mixture", "posterior")}

    def report(self) -> str:
        """A few plain lines."""
        low, median, high = self.pairs_per_user
        first = f"{self.num_users} users with {median:g} pairs each (quartiles {low:g} to {high:g})"
        if self.prompt_overlap is not None:
            first += f"; {self.prompt_overlap:.0%} of the prompts were seen by two users or more"
        lines = [first]
        if self.num_groups > 1:
            closest, a, b = max(
                (self.head_correlation[a][b], a, b) for b in range(self.num_groups) for a in range(b)
            )
            lines += [
                f"the closest groups, {a} and {b}: margins correlate {closest:.2f} and differ by "
                f"{self.rms_margin_difference[a][b]:.2f} (rms)",
                f"users left out of the fit: {self.misassignment:.1%} misassigned in expectation, "
                f"{self.balanced_misassignment:.1%} averaged over groups and up to "
                f"{self.balanced_misassignment_high:.1%} by chance of the users "
                f"(entropy {self.responsibility_entropy:.3f} nats)",
                self._verdict(),
            ]
        for k, group in enumerate(self.group_accuracy):
            found = "no held-out pairs"
            if group.accuracy is not None:
                ends = "" if group.low is None else f" [{group.low:.3f}, {group.high:.3f}]"
                found = f"{group.users} users, accuracy on held-out pairs {group.accuracy:.3f}{ends}"
            lines.append(f"group {k}: {found}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.identifiable:
            return f"{self.num_groups} groups are identifiable from this many pairs"
        if self.agreement < LEAST_AGREEMENT:
            return (
                "not identifiable: users left out of the fit fall into other groups than in the fit to all "
                f"(adjusted Rand index {self.agreement:.2f})"
            )
        wanted, more = f"under {MISASSIGNMENT_BAR:.0%}", "more pairs per user"
        if self.more_pairs_per_user is None:
            return f"not identifiable: even {_MOST_MORE_PAIRS} {more} would not bring it {wanted}"
        about = f"about {self.more_pairs_per_user} {more}"
        return f"not identifiable from this many pairs: {about} would bring it {wanted}"


def identifiability_report(
    differences: Tensor,
    user_offsets: Tensor,
    num_groups: int,
    *,
    prompts: Sequence[Any] | None = None,
    row_weights: Tensor | None = None,
    judgements: np.ndarray | Tensor | None = None,
    choice_offsets: Tensor | None = None,
    l2_candidates: Sequence[float] = L2_CANDIDATES,
    num_folds: int = 5,
    seed: int = 0,
    **fit: Any,
) -> IdentifiabilityReport:
    """Say whether users can be told apart, from linear mixtures on frozen features.

    Misassignment is what the posteriors of users expect who were left out of the fit, at the
    penalty that explains left-out users best: in-sample posteriors are too sure. How many more
    pairs are needed is simulated: users of the fitted groups who choose between observed pairs.

    Args:
        differences: standardised feature differences [P, D], rows sorted by user.
        user_offsets: int64 [U + 1].
        num_groups: K.
        prompts: what each pair was a choice about [P], ids or text.
        row_weights: how much each pair counts [P]; a tie is both directions at one half.
        judgements: as in :func:`~torchrl_maxmin.clustering.select_num_groups`.
        choice_offsets: likewise.
        l2_candidates: penalties to choose among.
        num_folds: parts the users are cut into, each left out once.
        seed: of folds, starts, simulation and bootstrap.
        **fit: passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`; by default exact
            M-steps until nobody changes group and the likelihood stands, from 6 starts.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(800, 4, generator=generator)  # 40 users with 20 pairs each
        >>> taste = torch.eye(4)[torch.arange(800) // 400]  # two tastes
        >>> x = torch.where((x * taste).sum(-1, keepdim=True) > 0, x, -x)
        >>> report = identifiability_report(x, torch.arange(41) * 20, 2)
        >>> report.identifiable, report.more_pairs_per_user
        (True, 0)
    """
    # Few pairs have many local optima, and one fold that falls into a bad one spoils its users.
    fit = {"num_restarts": 6, "m_step": "exact", "num_rounds": 100, "convergence_tolerance": 1e-4, **fit}
    overlap = None if prompts is None else _prompt_overlap(prompts, user_offsets)
    choices, _, rows = judged_choices(differences, user_offsets, row_weights, judgements, choice_offsets)
    if prompts is not None:
        prompts = [prompts[row] for row in rows.tolist()]
    choices = choices.find_distinct()
    differences, user_offsets = choices.differences, choices.user_offsets
    folds = user_folds(len(user_offsets) - 1, num_folds, seed)
    with progress_bar("leaving users out", 1) as advance:
        search = {"seed": seed, "thorough": True, **fit}
        best, left_out = choose_penalty(choices, num_groups, folds, l2_candidates, **search)
        advance()
    mixture = fit_choices(choices, num_groups, seed, l2=best, **fit)
    mixture = mixture.ordered(mixture.responsibilities.sum(0).argsort(descending=True))
    matched = match_groups(left_out.posterior.T, mixture.responsibilities.T)
    posterior = left_out.posterior[:, matched]
    plain, balanced = expected_misassignment(posterior)
    high = balanced_misassignment_bound(posterior, seed=seed)
    margins = differences @ mixture.weight.T
    wide = margins.double()
    unit = torch.nn.functional.normalize(wide, dim=0)  # uncentred: which side a difference is on is chance
    agreement = adjusted_rand_index(posterior.argmax(-1), mixture.assignments)
    alike = agreement >= LEAST_AGREEMENT
    identifiable = alike and high <= MISASSIGNMENT_BAR
    counts = choices.choices_by_user.round().long()  # the two orders of a tie are one choice
    asked = margins, counts, mixture.log_prior, seed
    more = (
        0
        if identifiable
        else None
        if not alike
        else more_pairs_needed(*asked, choice_offsets=choices.choice_offsets)
    )
    held = heldout_of(choices, 0.2, seed)
    known = fit_choices(choices.keep_rows(~held), num_groups, seed, l2=best, **fit)
    known = known.ordered(match_groups(known.weight, mixture.weight))
    return IdentifiabilityReport(
        num_users=len(user_offsets) - 1,
        num_groups=num_groups,
        pairs_per_user=tuple(np.quantile(choices.choices_by_user.numpy(), (0.25, 0.5, 0.75)).tolist()),
        prompt_overlap=overlap,
        head_correlation=(unit.T @ unit).tolist(),
        rms_margin_difference=(torch.cdist(wide.T, wide.T) / len(wide) ** 0.5).tolist(),
        responsibility_entropy=torch.special.entr(posterior).sum(-1).mean().item(),
        misassignment=plain,
        balanced_misassignment=balanced,
        balanced_misassignment_high=high,
        agreement=agreement,
        identifiable=identifiable,
        more_pairs_per_user=more,
        group_accuracy=group_accuracy(
            known,
            choices.keep_rows(held),
            prompts=None if prompts is None else list(compress(prompts, held.tolist())),
        ),
        l2=best,
        mixture=mixture,
        posterior=posterior,
    )


def expected_misassignment(posterior: Tensor) -> tuple[float, float]:
    """Share of users whose likeliest group is expected not to be theirs: (plain, averaged over groups).

    Args:
        posterior: [U, K]; calibrated only if these users were left out of the fit.

    Example:
        >>> import torch
        >>> plain, balanced = expected_misassignment(torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]))
        >>> round(plain, 3), round(balanced, 3)
        (0.133, 0.15)
    """
    kept, mass = _kept_and_mass(posterior)
    balanced = 1 - (kept.sum(0) / mass.sum(0).clamp_min(1e-12)).mean()
    return 1 - kept.sum(-1).mean().item(), balanced.item()


def balanced_misassignment_bound(
    posterior: Tensor, *, quantile: float = 0.9, num_resamples: int = 1000, seed: int = 0
) -> float:
    """Upper end of the misassignment averaged over groups: a quantile over resamples of the users.

    Args:
        posterior: [U, K] of left-out users.
        quantile: share of the resamples that stay under it.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    num_users = len(posterior)
    drawn = np.random.default_rng(seed).multinomial(
        num_users, np.full(num_users, 1 / num_users), num_resamples
    )
    kept, mass = (drawn @ tensor.numpy() for tensor in _kept_and_mass(posterior))
    return float(np.quantile(1 - (kept / mass.clip(1e-12)).mean(-1), quantile))


def _kept_and_mass(posterior: Tensor) -> tuple[Tensor, Tensor]:
    """By user and group [U, K]: the posterior of the likeliest group alone, and of all."""
    mass = posterior.double()
    confidence, likeliest = mass.max(-1, keepdim=True)
    return torch.zeros_like(mass).scatter_(1, likeliest, confidence), mass


def more_pairs_needed(
    margins: Tensor,
    pairs_per_user: Tensor,
    log_prior: Tensor,
    seed: int = 0,
    *,
    choice_offsets: Tensor | None = None,
) -> int | None:
    """How many more pairs a user would bring the misassignment, averaged over groups, under the bar.

    Users of each group are simulated: as many choices as observed users have and then more, drawn
    from the observed ones, made by the group's own head.

    Args:
        margins: [P, K] of the observed pairs under the fitted heads.
        pairs_per_user: choices of observed users, int64 [U].
        log_prior: log mixing weights [K].
        seed: of the simulation, the same at every number of pairs.
        choice_offsets: int64 [C + 1], the rows of a choice; None where each is one.

    Returns:
        At least 1; None where :data:`_MOST_MORE_PAIRS` would not do.
    """

    def enough(more: int) -> bool:
        counts = pairs_per_user + more
        wrong = _simulated_misassignment(margins, choice_offsets, counts, log_prior, seed)
        return wrong <= MISASSIGNMENT_BAR

    high = 1
    while not enough(high):
        high *= 2
        if high > _MOST_MORE_PAIRS:
            return None
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _simulated_misassignment(
    margins: Tensor, choice_offsets: Tensor | None, choices_per_user: Tensor, log_prior: Tensor, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    num_choices = len(margins) if choice_offsets is None else len(choice_offsets) - 1
    wrong = 0.0
    for k in range(len(log_prior)):
        drawn = torch.randint(len(choices_per_user), (_SIMULATED_USERS,), generator=generator)
        users = offsets_of(choices_per_user[drawn])
        index = torch.randint(num_choices, (int(users[-1]),), generator=generator)
        one = PairChoices(margins, torch.tensor([0, len(margins)]), None, None, choice_offsets)
        rows = one.take_choices(index, users)
        chance = torch.rand(len(index), generator=generator)
        answered = redraw(rows.differences[:, k], rows.choice_offsets, rows.differences, chance)
        found = rows.expectation_of(answered, log_prior).responsibilities
        wrong += (found.argmax(-1) != k).double().mean().item()
    return wrong / len(log_prior)


def group_accuracy(
    known: LinearMixture,
    heldout: PairChoices,
    *,
    confidence: float = 0.95,
    prompts: Sequence[Any] | None = None,
) -> list[GroupAccuracy]:
    """Score each head on further pairs of the users it was given, with t intervals over users.

    Args:
        known: fitted on other pairs of the same users.
        heldout: their held-out pairs.
        confidence: of the intervals.
        prompts: what each held-out pair was a choice about, so that prompts which users share are clusters
            too.
    """
    groups = known.assignments[heldout.row_users]
    right = (heldout.differences @ known.weight.T).gather(1, groups.unsqueeze(1)).squeeze(1) > 0
    weights = torch.ones(len(right)) if heldout.row_weights is None else heldout.row_weights
    num_groups = len(known.log_prior)
    found = accuracy_by_group(
        right, heldout.row_users, known.assignments, num_groups,
        row_weights=weights, prompts=prompts, confidence=confidence, num_resamples=0, warn=False,
    )  # fmt: skip
    pairs = groups.bincount(weights.double(), num_groups).tolist()
    none = GroupAccuracy(0, 0.0, None, None, None)
    return [
        none if one is None else GroupAccuracy(one.clusters["users"], count, *one.to_list())
        for one, count in zip(found, pairs, strict=True)
    ]


def _prompt_overlap(prompts: Sequence[Any], user_offsets: Tensor) -> float:
    """Share of distinct prompts that two users or more saw."""
    row_users = torch.repeat_interleave(user_offsets.diff())
    if len(prompts) != len(row_users):
        raise ValueError(f"{len(prompts)} prompts for {len(row_users)} pairs; give one a pair")
    users: dict[Any, set[int]] = {}
    for prompt, user in zip(prompts, row_users.tolist(), strict=True):
        users.setdefault(prompt, set()).add(user)
    return sum(len(seen) > 1 for seen in users.values()) / len(users)
