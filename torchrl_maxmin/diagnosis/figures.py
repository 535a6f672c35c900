"""Figures of a diagnosis; their errors, their bias and accuracy, from fits to parts of the pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.identifiability import balanced_misassignment_bound, expected_misassignment
from torchrl_maxmin.clustering.left_out import (
    heldout_of,
    judgement_numbers,
    leave_users_out,
    match_groups,
    user_folds,
)
from torchrl_maxmin.clustering.linear import LinearMixture, fit_choices
from torchrl_maxmin.clustering.luce import log_choices, redraw
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.diagnosis.exact import ExactOutcome, exact_outcome
from torchrl_maxmin.diagnosis.theorem import distinctness, diversity
from torchrl_maxmin.stats.clustered import interval_over_users
from torchrl_maxmin.stats.rates import accuracy_by_group

__all__ = [
    "Figures",
    "Fitter",
    "Measure",
    "bias_of_fit",
    "calibrated_margins",
    "corrected",
    "heldout_accuracy",
    "interval_ends",
    "jackknife_error",
    "margins_of",
    "misassignment",
    "pair_figures",
    "pair_outcome",
]

#: A figure by name: a number a group [K], or one a pair of groups [K, K].
Figures = dict[str, np.ndarray]

#: Figures of (pairs, mixture, single).
Measure = Callable[[PairChoices, LinearMixture, LinearMixture], Figures]

#: What a figure cannot leave, with its bias taken off, nor its interval.
_RANGES = {
    "share": (0.0, 1.0),
    "diversity": (0.0, 1.0),
    "distance_to_mixture": (0.0, 1.0),
    "single_gap": (0.0, np.inf),
    "maxmin_gap": (0.0, np.inf),
}


def pair_figures(
    choices: PairChoices, mixture: LinearMixture, single: LinearMixture, beta: float
) -> tuple[Figures, ExactOutcome]:
    """Compute the figures that get intervals, and the policies on pairs that their gaps are from.

    Args:
        choices: The pairs.
        mixture: A fit by groups.
        single: The one reward.
        beta: KL weight of the alignment gaps, rewards calibrated.
    """
    weights = None if choices.row_weights is None else choices.row_weights.numpy()
    margins = margins_of(choices, mixture)
    shares = mixture.log_prior.double().softmax(-1).numpy()
    p = expit(margins)
    between = diversity(p, weights)
    own, alone = (calibrated_margins(each, weights) for each in (margins, margins_of(choices, single)))
    outcome = pair_outcome(own, alone, beta)
    figures = {
        "diversity": between,
        "share": shares,
        "epsilon": distinctness(between).epsilon,
        "distance_to_mixture": np.average(np.abs(p - (p @ shares)[:, None]), axis=0, weights=weights),
        "single_gap": outcome.single_gap.gap,
        "maxmin_gap": outcome.maxmin_gap.gap,
    }
    return figures, outcome


def margins_of(choices: PairChoices, fit: LinearMixture) -> np.ndarray:
    """Compute r(chosen) - r(rejected) of every pair by every head [P, K] float64."""
    return (choices.differences @ fit.weight.T).double().numpy()


def calibrated_margins(margins: ArrayLike, row_weights: np.ndarray | None = None) -> np.ndarray:
    """Scale rewards to deviation 1 within a pair, as ``sft_std`` has it; a zero reward stays.

    Args:
        margins: [P, K].
        row_weights: How much each pair counts [P].

    Example:
        >>> calibrated_margins([[3.0, 0.0], [-3.0, 0.0]]).round(3).tolist()
        [[1.414, 0.0], [-1.414, 0.0]]
    """
    values = np.asarray(margins, dtype=np.float64)
    # The unbiased variance of two numbers is half their squared difference.
    deviation = np.sqrt(np.average(values**2, axis=0, weights=row_weights) / 2)
    return values / np.where(deviation > 1e-8, deviation, 1.0)


def pair_outcome(margins: np.ndarray, alone: np.ndarray, beta: float) -> ExactOutcome:
    """Compute what the single reward and MaxMin leave each group, each pair a prompt with two responses.

    Args:
        margins: The groups' [P, K].
        alone: The single reward's [P, 1].
        beta: KL weight.
    """
    # Only the difference of the two rewards is known.
    rewards = np.stack([margins / 2, -margins / 2], axis=1)
    return exact_outcome(rewards, np.concatenate([alone, -alone], axis=1) / 2, beta)


def corrected(fitted: Figures, bias: Figures | None) -> Figures:
    """Return figures less their bias, within their range; shares, which no penalty shrinks, as they are."""
    taken = {name: 0.0 if bias is None or name == "share" else bias[name] for name in fitted}
    return {name: _within(name, value - taken[name]) for name, value in fitted.items()}


def interval_ends(
    found: Figures, errors: Figures | None, bias_errors: Figures | None, num_parts: int, confidence: float
) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Compute lower and upper ends by figure: t over the parts of a jackknife.

    Args:
        found: The figures.
        errors: Their standard errors; None gives None.
        bias_errors: Standard errors of what was taken off.
        num_parts: Parts of the jackknife.
        confidence: Coverage asked for.
    """
    if errors is None:
        return None
    quantile = stats.t.ppf((1 + confidence) / 2, num_parts - 1)
    ends = {}
    for name, value in found.items():
        of_bias = 0.0 if bias_errors is None or name == "share" else bias_errors[name]
        half = quantile * np.sqrt(errors[name] ** 2 + of_bias**2)
        ends[name] = _within(name, value - half), _within(name, value + half)
    return ends


def _within(name: str, value: np.ndarray) -> np.ndarray:
    return np.clip(value, *_RANGES.get(name, (-np.inf, np.inf)))


@dataclass(frozen=True)
class Fitter:
    """Fits linear mixtures as they were fitted first.

    Attributes:
        l2: Penalty by K.
        seed: Of the starts.
        settings: Passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
        device: Where they are fitted; what comes back is on the CPU.
    """

    l2: dict[int, float]
    seed: int
    settings: dict[str, Any]
    device: torch.device | str = "cpu"

    def __call__(
        self,
        choices: PairChoices,
        num_groups: int,
        like: LinearMixture | None = None,
        start: Tensor | None = None,
    ) -> LinearMixture:
        """Fit K groups, the largest first; or in the order of another fit, and from heads that are given."""
        given = {"start": start} if start is not None and num_groups > 1 else {}
        asked = {"l2": self.l2[num_groups], **self.settings, **given}
        fit = fit_choices(choices.to(self.device), num_groups, self.seed, **asked).to("cpu")
        largest_first = fit.log_prior.argsort(descending=True)
        return fit.ordered(largest_first if like is None else match_groups(fit.weight, like.weight))


def jackknife_error(
    choices: PairChoices, mixture: LinearMixture, fitter: Fitter, measure: Measure, num_parts: int
) -> Figures | None:
    """Estimate standard errors of the figures: fit again without each part of the users.

    K and the penalties stay as they were chosen: their chance is not in it.

    Args:
        choices: All pairs.
        mixture: The fit to all, whose order of groups holds.
        fitter: Fits.
        measure: What is measured.
        num_parts: Parts that the users are cut into.

    Returns:
        Errors by figure; None with one group, which has nothing to vary, or fewer than two parts.
    """
    num_users, num_groups = len(choices.user_offsets) - 1, len(mixture.log_prior)
    if num_groups == 1 or min(num_parts, num_users) < 2:
        return None
    folds = user_folds(num_users, num_parts, fitter.seed)
    parts: list[Figures] = []
    with progress_bar("leaving users out for intervals", len(folds)) as advance:
        for fold in folds:
            inside = torch.ones(num_users, dtype=torch.bool)
            inside[fold] = False
            rest = choices.take_users(inside.nonzero().flatten())
            fits = fitter(rest, num_groups, like=mixture, start=mixture.weight), fitter(rest, 1)
            parts.append(measure(rest, *fits))
            advance()
    return {name: value.std(axis=0) * np.sqrt(len(folds) - 1) for name, value in _stacked(parts).items()}


def bias_of_fit(
    choices: PairChoices,
    mixture: LinearMixture,
    fitter: Fitter,
    measure: Measure,
    found: Figures,
    num_resamples: int,
) -> tuple[Figures, Figures] | None:
    """Measure how far a fit is from what it was fitted to: parametric bootstrap.

    The fitted mixture chooses anew between the same responses, every user in a group drawn by its share, and
    is fitted to that: what the figures lose on the way is what the penalty (and wrong groups) take. ``found``
    are the figures of the fit; the arguments before it are those of :func:`jackknife_error`.

    Returns:
        Bias and its standard error by figure; None with one group or fewer than two resamples.
    """
    num_users, num_groups = len(choices.user_offsets) - 1, len(mixture.log_prior)
    if num_groups == 1 or num_resamples < 2:
        return None
    rng = np.random.default_rng([fitter.seed, num_resamples])
    shares = mixture.log_prior.double().softmax(-1).numpy()
    margins = choices.differences @ mixture.weight.T
    # Heads as long as random starts are: fits that stop early must be as early again.
    start = torch.nn.functional.normalize(mixture.weight, dim=-1)
    resamples: list[Figures] = []
    with progress_bar("measuring the bias of the fit", num_resamples) as advance:
        for _ in range(num_resamples):
            groups = torch.from_numpy(rng.choice(num_groups, size=num_users, p=shares))
            own = margins.gather(1, groups[choices.row_users].unsqueeze(1)).squeeze(1)
            chance = torch.from_numpy(rng.random(len(choices.choice_users)))
            chosen = redraw(own, choices.choice_offsets, choices.differences, chance)
            simulated = replace(choices, differences=chosen, distinct=None)
            if choices.distinct is not None:
                simulated = simulated.find_distinct()
            fits = fitter(simulated, num_groups, like=mixture, start=start), fitter(simulated, 1)
            resamples.append(measure(simulated, *fits))
            advance()
    values = _stacked(resamples)
    bias = {name: values[name].mean(axis=0) - found[name] for name in found}
    return bias, {name: value.std(axis=0, ddof=1) / np.sqrt(num_resamples) for name, value in values.items()}


def _stacked(parts: list[Figures]) -> Figures:
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def heldout_accuracy(
    choices: PairChoices,
    mixture: LinearMixture,
    fitter: Fitter,
    fraction: float,
    confidence: float,
    prompts: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Score single and mixture on held-out pairs of known users, by the group of their other pairs.

    A ``fraction`` of each user's judgements is held out, pairs of one judgement together. The first arguments
    are those of :func:`jackknife_error`. With ``prompts`` [P], those that users share are clusters of
    single's and mixture's accuracies too.

    Returns:
        ``groups``: by group single, mixture and difference with intervals over users, or a ``reason``;
        ``calibration``: accuracy less what the mixture expected, or None; ``left_out``: of how many pairs.
    """
    num_groups = len(mixture.log_prior)
    held = heldout_of(choices, fraction, fitter.seed)
    left_out = _held_pairs(choices, held, fraction)
    empty = dict.fromkeys(("single", "mixture", "difference"))
    if not held.any():
        groups = [{**empty, "reason": left_out["reason"]}] * num_groups
        return {"groups": groups, "calibration": None, "left_out": left_out}
    known, later = choices.keep_rows(~held), choices.keep_rows(held)
    alone, both = fitter(known, 1), fitter(known, num_groups, like=mixture)
    groups = both.assignments
    margins = (later.differences @ both.weight.T).gather(1, groups[later.row_users].unsqueeze(1))
    margins = torch.cat([later.differences @ alone.weight.T, margins], 1).double().numpy()
    right = (np.sign(margins) + 1) / 2
    settings: dict[str, Any] = {"confidence": confidence, "seed": fitter.seed, "warn": False}
    shown = None if prompts is None else [prompts[row] for row in held.nonzero().flatten().tolist()]
    rates = accuracy_by_group(
        right, later.row_users, groups, num_groups, row_weights=later.row_weights, prompts=shown, **settings
    )
    settings["scale"] = "identity"
    out = []
    for k, rate in enumerate(rates):
        if rate is None:
            out.append({**empty, "reason": "no user with held-out pairs was given to this group"})
            continue
        gain = interval_over_users(_user_means(right[:, 1] - right[:, 0], later, groups == k), **settings)
        sides = {name: rate.to_dict(side) for side, name in enumerate(("single", "mixture"))}
        out.append({**sides, "difference": gain.to_dict(), **rate.clusters, "notes": list(rate.notes)})
    everyone = torch.ones_like(groups, dtype=torch.bool)
    off = interval_over_users(
        _user_means(_off(torch.from_numpy(margins[:, 1:]), later), later, everyone), **settings
    )
    return {"groups": out, "calibration": off.to_dict(), "left_out": left_out}


def _held_pairs(choices: PairChoices, held: Tensor, fraction: float) -> dict[str, Any]:
    """How many pairs, judgements and users a held-out part has, and why none."""
    unique, which = judgement_numbers(choices)
    there = np.unique(which[held.numpy()])
    none = "no user has two judgements, so that none can be held out"
    reason = None if len(there) else none if fraction else "no pairs were held out"
    origin = f"{fraction:.0%} of each user's, one at least of two"
    users = len(np.unique(unique[there, 0]))
    pairs = {"count": int(held.sum()), "judgements": len(there), "users": users}
    return pairs | {"origin": origin, "reason": reason}


def _off(margins: Tensor, choices: PairChoices) -> np.ndarray:
    """Whether the likeliest item of each choice was chosen, less how often it should be, at the rows [P]."""
    offsets = choices.choice_offsets
    log_choice = log_choices(margins, offsets)
    behind = -margins  # log odds of another item against the chosen one
    if offsets is not None:
        behind = torch.segment_reduce(behind, "max", offsets=offsets, axis=0, unsafe=True)
    likeliest = (log_choice + behind.clamp_min(0)).exp()
    right = ((1 - behind.sign()) / 2).to(likeliest)
    return choices.at_rows(right - likeliest).squeeze(1).numpy()


def misassignment(
    choices: PairChoices, mixture: LinearMixture, fitter: Fitter, num_folds: int
) -> dict[str, float]:
    """Estimate how many users sit in a wrong group of a fit, as posteriors of left-out users expect it.

    The fits without some of the users begin at this one: another optimum would speak of other groups.
    """
    num_groups = len(mixture.log_prior)
    if num_groups == 1:
        return {"plain": 0.0, "balanced": 0.0, "balanced_high": 0.0}
    folds = user_folds(len(choices.user_offsets) - 1, num_folds, fitter.seed)
    settings = {"seed": fitter.seed, "l2": fitter.l2[num_groups], **fitter.settings}
    starts = [mixture.weight.to(fitter.device)] * len(folds)
    left_out = leave_users_out(choices.to(fitter.device), num_groups, folds, starts=starts, **settings)
    plain, balanced = expected_misassignment(left_out.posterior)
    high = balanced_misassignment_bound(left_out.posterior, seed=fitter.seed)
    return {"plain": plain, "balanced": balanced, "balanced_high": high}


def _user_means(values: np.ndarray, choices: PairChoices, kept: Tensor) -> np.ndarray:
    """Average a figure of every pair over each user's pairs, for the kept users that have any."""
    weights = np.ones(len(values)) if choices.row_weights is None else choices.row_weights.double().numpy()
    users, count = choices.row_users.numpy(), len(choices.user_offsets) - 1
    total = np.bincount(users, weights, minlength=count)
    mine = kept.numpy() & (total > 0)
    return np.bincount(users, values * weights, minlength=count)[mine] / total[mine]
