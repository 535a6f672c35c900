"""Fit mixtures again, without some users or pairs or to simulated choices: errors, bias, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from torchrl_maxmin.clustering.identifiability import balanced_misassignment_bound, expected_misassignment
from torchrl_maxmin.clustering.linear import LinearMixture, PairChoices, fit_choices
from torchrl_maxmin.clustering.selection import heldout_rows, leave_users_out, match_groups, user_folds
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.diagnosis.figures import Figures
from torchrl_maxmin.stats.clustered import interval_over_users
from torchrl_maxmin.stats.rates import accuracy_by_group

__all__ = ["Fitter", "Measure", "bias_of_fit", "heldout_accuracy", "jackknife_error", "misassignment"]

#: Figures of (pairs, mixture, single).
Measure = Callable[[PairChoices, LinearMixture, LinearMixture], Figures]


@dataclass(frozen=True)
class Fitter:
    """Fits linear mixtures as they were fitted first.

    Attributes:
        l2: Penalty by K.
        seed: Of the starts.
        settings: Passed to :func:`~torchrl_maxmin.clustering.fit_linear_mixture`.
    """

    l2: dict[int, float]
    seed: int
    settings: dict[str, Any]

    def __call__(
        self,
        choices: PairChoices,
        num_groups: int,
        like: LinearMixture | None = None,
        start: Tensor | None = None,
    ) -> LinearMixture:
        """Fit K groups, the largest first; or in the order of another fit, and from heads that are given."""
        settings = self.settings
        if start is not None and num_groups > 1:
            settings = settings | {"start": start}
        fit = fit_choices(choices, num_groups, self.seed, l2=self.l2[num_groups], **settings)
        if like is not None:
            return fit.ordered(match_groups(fit.weight, like.weight))
        return fit.ordered(fit.log_prior.argsort(descending=True))


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
    num_users = len(choices.user_offsets) - 1
    num_groups = len(mixture.log_prior)
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
    is fitted to that: what the figures lose on the way is what the penalty (and wrong groups) take.

    Args:
        choices: All pairs.
        mixture: The fit to all.
        fitter: Fits.
        measure: What is measured.
        found: The figures of the fit.
        num_resamples: How often.

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
            own = margins.gather(1, groups[choices.row_users].unsqueeze(1)).double().numpy()
            sign = np.where(rng.random(own.shape) < expit(own), 1, -1)
            chosen = choices.differences * torch.from_numpy(sign).to(choices.features.dtype)
            simulated = replace(choices, differences=chosen)
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
    judgements: Sequence[int] | np.ndarray | None,
    fraction: float,
    confidence: float,
) -> dict[str, Any]:
    """Score single and mixture on held-out pairs of known users, by the group of their other pairs.

    Args:
        choices: All pairs.
        mixture: The fit to all, whose order of groups holds.
        fitter: Fits.
        judgements: What each pair follows from [P]; pairs of one judgement stay together.
        fraction: Share of each user's judgements that is held out.
        confidence: Coverage asked for.

    Returns:
        ``groups``: by group single, mixture and difference with intervals over users, or a ``reason``;
        ``calibration``: accuracy less what the mixture expected, or None.
    """
    num_groups = len(mixture.log_prior)
    held = _heldout(choices.user_offsets, judgements, fraction, fitter.seed)
    empty: dict[str, Any] = {"single": None, "mixture": None, "difference": None}
    if not held.any():
        reason = "no user has two pairs, so that none can be held out"
        if fraction == 0:
            reason = "no pairs were held out"
        return {"groups": [{**empty, "reason": reason}] * num_groups, "calibration": None}
    known, later = choices.keep_rows(~held), choices.keep_rows(held)
    alone, both = fitter(known, 1), fitter(known, num_groups, like=mixture)
    groups = both.assignments
    margins = (later.differences @ both.weight.T).gather(1, groups[later.row_users].unsqueeze(1))
    margins = torch.cat([later.differences @ alone.weight.T, margins], 1).double().numpy()
    right = (np.sign(margins) + 1) / 2
    expected = expit(np.abs(margins))
    settings: dict[str, Any] = {"confidence": confidence, "seed": fitter.seed, "warn": False}
    rates = accuracy_by_group(
        right, later.row_users, groups, num_groups, row_weights=later.row_weights, **settings
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
    off = interval_over_users(_user_means(right[:, 1] - expected[:, 1], later, everyone), **settings)
    return {"groups": out, "calibration": off.to_dict()}


def misassignment(choices: PairChoices, num_groups: int, fitter: Fitter, num_folds: int) -> dict[str, float]:
    """Estimate how many users sit in a wrong group, as posteriors of left-out users expect it."""
    if num_groups == 1:
        return {"plain": 0.0, "balanced": 0.0, "balanced_high": 0.0}
    folds = user_folds(len(choices.user_offsets) - 1, num_folds, fitter.seed)
    settings = {"seed": fitter.seed, "l2": fitter.l2[num_groups], **fitter.settings}
    left_out = leave_users_out(choices, num_groups, folds, **settings)
    plain, balanced = expected_misassignment(left_out.posterior)
    high = balanced_misassignment_bound(left_out.posterior, seed=fitter.seed)
    return {"plain": plain, "balanced": balanced, "balanced_high": high}


def _heldout(
    user_offsets: Tensor, judgements: Sequence[int] | np.ndarray | None, fraction: float, seed: int
) -> Tensor:
    if judgements is None:
        return heldout_rows(user_offsets, fraction, seed)
    users = torch.repeat_interleave(user_offsets.diff()).numpy()
    pairs = np.stack([users, np.asarray(judgements)], axis=1)
    unique, which = np.unique(pairs, axis=0, return_inverse=True)
    counts = torch.from_numpy(np.bincount(unique[:, 0], minlength=len(user_offsets) - 1))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return heldout_rows(offsets, fraction, seed)[torch.from_numpy(which.reshape(-1))]


def _user_means(values: np.ndarray, choices: PairChoices, kept: Tensor) -> np.ndarray:
    """Average a figure of every pair over each user's pairs, for the kept users that have any."""
    weights = np.ones(len(values)) if choices.row_weights is None else choices.row_weights.double().numpy()
    users, count = choices.row_users.numpy(), len(choices.user_offsets) - 1
    total = np.bincount(users, weights, minlength=count)
    mine = kept.numpy() & (total > 0)
    return np.bincount(users, values * weights, minlength=count)[mine] / total[mine]
