"""What Lemma 1 and Theorem 1 of arXiv 2402.08925 assume, checked on the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.evaluation.exact import ExactOutcome
from torchrl_maxmin.rewards.choices import PairChoices, fit_bradley_terry
from torchrl_maxmin.rewards.identifiability import MISASSIGNMENT_BAR
from torchrl_maxmin.rewards.linear_em import LinearMixture

__all__ = ["check_assumptions"]

#: A single reward that misses the mixture's probabilities by more than this does not realise it.
REALISABLE = 0.01


def check_assumptions(
    choices: PairChoices,
    mixture: LinearMixture,
    single: LinearMixture,
    found: Mapping[str, np.ndarray],
    outcome: ExactOutcome,
    misassigned: Mapping[str, float],
    calibration: Mapping[str, float] | None,
) -> list[dict[str, Any]]:
    """Every assumption with whether it holds here: true, false, or null where these data cannot say.

    Args:
        choices: The pairs.
        mixture: The groups' rewards.
        single: The one reward.
        found: Epsilon, shares and diversity.
        outcome: The policies on pairs.
        misassigned: Expected misassignment.
        calibration: Held-out accuracy less what the fit expected, with its interval.

    Returns:
        A list of ``{"assumption", "holds", "told"}``.
    """
    x = choices.differences.double()
    num_groups = len(mixture.log_prior)
    smallest = max(float(torch.linalg.eigvalsh(x.T @ x / len(x)).min()) / 4, 0.0)
    num_parameters = num_groups * x.shape[1]
    distance = _distance_to_bradley_terry(choices, mixture)
    checks: list[tuple[str, bool | None, str]] = [
        _linear(calibration),
        (
            "features are bounded by D",
            True,
            f"on these pairs D = {float(x.norm(dim=1).max()) / 2:.3g} (half the longest difference); other "
            "responses may be longer",
        ),
        (
            "features are linearly independent (smallest eigenvalue above 0)",
            smallest > 1e-12,
            f"the smallest eigenvalue of their second moment is {smallest:.3g}",
        ),
        (
            "unlimited data",
            False,
            f"{choices.num_choices:g} choices of {len(choices.user_offsets) - 1} users for {num_parameters} "
            "parameters; the intervals say what that leaves open",
        ),
        (
            "one Bradley-Terry reward gives the mixture's probabilities",
            distance <= REALISABLE,
            f"the best one misses them by {distance:.4f} on average over the pairs",
        ),
        (
            "every policy gives every response at least probability c",
            outcome.smallest_probability > 0,
            f"c = {outcome.smallest_probability:.3g} for policies that choose between a pair's responses; "
            "a language model gives whole responses no such floor",
        ),
        _unique(found["epsilon"], num_groups),
        (
            "the groups are known",
            None if num_groups == 1 else misassigned["balanced_high"] <= MISASSIGNMENT_BAR,
            "one group: nobody can be misplaced"
            if num_groups == 1
            else f"{misassigned['balanced']:.1%} of the users (averaged over groups) are expected in a wrong "
            f"group, up to {misassigned['balanced_high']:.1%} by chance of the users",
        ),
    ]
    return [{"assumption": name, "holds": holds, "told": told} for name, holds, told in checks]


def _linear(calibration: Mapping[str, float] | None) -> tuple[str, bool | None, str]:
    name = "rewards are linear in these features"
    if calibration is None:
        return name, None, "cannot be said without held-out pairs"
    low, high = calibration["low"], calibration["high"]
    off = f"{calibration['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    told = f"held-out accuracy less what the fit expected is {off}"
    if low > 0 or high < 0:
        return name, False, told + ": the probabilities are off, by misfit, too few pairs or wrong groups"
    return name, None, told + ": not contradicted, which is no proof"


def _unique(epsilon: np.ndarray, num_groups: int) -> tuple[str, bool | None, str]:
    name = "a minority is farther from some group than all others are (epsilon above 0)"
    if num_groups == 1:
        return name, False, "one group: there is no minority"
    held = [f"group {k} ({value:.3f})" for k, value in enumerate(epsilon) if value > 0]
    if not held:
        return name, False, "no group is"
    return name, True, "holds for " + ", ".join(held)


def _distance_to_bradley_terry(choices: PairChoices, mixture: LinearMixture) -> float:
    """Mean distance between the mixture's probabilities on the pairs and the best linear Bradley-Terry's."""
    x = choices.differences
    shares = mixture.log_prior.double().softmax(-1)
    p = torch.sigmoid(x.double() @ mixture.weight.double().T) @ shares
    # Every pair in both directions, each as often as the mixture would choose it.
    counts = torch.ones(len(x), dtype=torch.float64)
    if choices.row_weights is not None:
        counts = choices.row_weights.double()
    weights = torch.cat([p * counts, (1 - p) * counts]).to(x.dtype)
    best = fit_bradley_terry(torch.cat([x, -x]), l2=1e-9, row_weights=weights)
    return float(((torch.sigmoid(x.double() @ best.double()) - p).abs() * counts).sum() / counts.sum())
