"""Mixtures fitted again without some users or pairs: intervals, held-out accuracy, misassignment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.special import expit
from torch import Tensor

from torchrl_maxmin.evaluation.clustered import CoverageWarning, Interval, interval_over_users
from torchrl_maxmin.evaluation.metrics import group_accuracy_by_user
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards.choices import PairChoices
from torchrl_maxmin.rewards.crossfit import fit_choices, leave_users_out, match_groups, user_folds
from torchrl_maxmin.rewards.identifiability import balanced_misassignment_bound, expected_misassignment
from torchrl_maxmin.rewards.linear_em import LinearMixture
from torchrl_maxmin.rewards.selection import heldout_rows

__all__ = ["Fitter", "heldout_accuracy", "jackknife", "misassignment"]

Figures = dict[str, np.ndarray]


@dataclass(frozen=True)
class Fitter:
    """Fits linear mixtures as they were fitted first.

    Attributes:
        l2: Penalty by K.
        seed: Of the starts.
        settings: Passed to :func:`~torchrl_maxmin.rewards.linear.fit_linear_mixture`.
    """

    l2: dict[int, float]
    seed: int
    settings: dict[str, Any]

    def __call__(
        self, choices: PairChoices, num_groups: int, like: LinearMixture | None = None, warm: bool = False
    ) -> LinearMixture:
        """Fit K groups, the largest first; or in the order of another fit, and ``warm`` from its heads."""
        settings = self.settings
        if warm and like is not None and num_groups > 1:
            settings = settings | {"start": like.weight}
        fit = fit_choices(choices, num_groups, self.seed, l2=self.l2[num_groups], **settings)
        if like is not None:
            return fit.ordered(match_groups(fit.weight, like.weight))
        return fit.ordered(fit.log_prior.argsort(descending=True))


def jackknife(
    choices: PairChoices,
    mixture: LinearMixture,
    fitter: Fitter,
    measure: Callable[[PairChoices, LinearMixture, LinearMixture], Figures],
    found: Figures,
    num_parts: int,
    confidence: float,
) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Ends of each figure: t over parts of the users, each left out once and all fitted again.

    K and the penalties stay as they were chosen, so that their chance, and the bias of the penalty, are not
    in the intervals.

    Args:
        choices: All pairs.
        mixture: The fit to all, whose order of groups holds.
        fitter: Fits.
        measure: Figures of (pairs, mixture, single).
        found: The figures of all pairs.
        num_parts: Parts that the users are cut into.
        confidence: Coverage asked for.

    Returns:
        (low, high) by figure; None with one group, which has nothing to vary, or fewer than two parts.
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
            fits = fitter(rest, num_groups, like=mixture, warm=True), fitter(rest, 1)
            parts.append(measure(rest, *fits))
            advance()
    quantile = stats.t.ppf((1 + confidence) / 2, len(folds) - 1)
    ends = {}
    for name, value in found.items():
        left_out = np.stack([part[name] for part in parts])
        spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0) * (len(folds) - 1) / len(folds)
        half = quantile * np.sqrt(spread)
        ends[name] = value - half, value + half
    return ends


def heldout_accuracy(
    choices: PairChoices,
    mixture: LinearMixture,
    fitter: Fitter,
    judgements: Sequence[int] | np.ndarray | None,
    fraction: float,
    confidence: float,
) -> dict[str, Any]:
    """Single and mixture on held-out pairs of known users, by the group that their other pairs gave them.

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
    settings: dict[str, Any] = {"confidence": confidence, "seed": fitter.seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)  # the notes say it, group by group
        rates = group_accuracy_by_user(
            right, later.row_users, groups, num_groups, row_weights=later.row_weights, **settings
        )
        settings["scale"] = "identity"
        out = []
        for k, rate in enumerate(rates):
            if rate is None:
                out.append({**empty, "reason": "no user with held-out pairs was given to this group"})
                continue
            gain = interval_over_users(_user_means(right[:, 1] - right[:, 0], later, groups == k), **settings)
            sides = {name: _ends_of(rate, side) for side, name in enumerate(("single", "mixture"))}
            out.append({**sides, "difference": _ends_of(gain), **rate.clusters, "notes": list(rate.notes)})
        everyone = torch.ones_like(groups, dtype=torch.bool)
        off = interval_over_users(_user_means(right[:, 1] - expected[:, 1], later, everyone), **settings)
    return {"groups": out, "calibration": _ends_of(off)}


def misassignment(choices: PairChoices, num_groups: int, fitter: Fitter, num_folds: int) -> dict[str, float]:
    """How many users sit in a wrong group, as posteriors of left-out users expect it."""
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
    """Mean of a figure of every pair over each user's pairs, for the kept users that have any."""
    weights = np.ones(len(values)) if choices.row_weights is None else choices.row_weights.double().numpy()
    users, count = choices.row_users.numpy(), len(choices.user_offsets) - 1
    total = np.bincount(users, weights, minlength=count)
    mine = kept.numpy() & (total > 0)
    return np.bincount(users, values * weights, minlength=count)[mine] / total[mine]


def _ends_of(interval: Interval, *index: int) -> dict[str, float]:
    return {name: float(np.asarray(getattr(interval, name))[index]) for name in ("mean", "low", "high")}
