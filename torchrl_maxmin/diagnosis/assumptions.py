"""Check on the data at hand what Lemma 1 and Theorem 1 of arXiv 2402.08925 assume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.identifiability import MISASSIGNMENT_BAR
from torchrl_maxmin.clustering.linear import LinearMixture, PairChoices
from torchrl_maxmin.clustering.solvers import fit_bradley_terry
from torchrl_maxmin.diagnosis.exact import ExactOutcome

__all__ = ["check_assumptions", "feature_constants"]

#: A single reward that misses the mixture's probabilities by more than this does not realise it.
REALISABLE = 0.01

BLOCK_ROWS = 8192


def feature_constants(differences: Tensor) -> tuple[float, float]:
    """Compute D and lambda_psi of a pair's two responses, put at +-difference / 2.

    Bradley-Terry sees differences alone, so that this is the smallest D that bounds all features.

    Args:
        differences: [P, D].

    Returns:
        The largest norm, and the smallest eigenvalue of the second moment (0 with fewer pairs than features).

    Example:
        >>> feature_constants(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        (2.0, 0.5)
    """
    largest = max(float(block.double().norm(dim=1).max()) for block in differences.split(BLOCK_ROWS)) / 2
    num_pairs, num_features = differences.shape
    if num_pairs < num_features:
        return largest, 0.0
    moment = torch.zeros(num_features, num_features, dtype=torch.float64)
    for block in differences.split(BLOCK_ROWS):
        moment.addmm_(block.double().T, block.double())
    smallest = float(torch.linalg.eigvalsh(moment / num_pairs)[0]) / 4
    # Eigenvalues that rounding alone makes positive are none.
    return largest, smallest if smallest > 1e-12 else 0.0


def check_assumptions(
    choices: PairChoices,
    mixture: LinearMixture,
    found: Mapping[str, np.ndarray],
    outcome: ExactOutcome,
    constants: tuple[float, float],
    misassigned: Mapping[str, float],
    calibration: Mapping[str, float] | None,
) -> list[dict[str, Any]]:
    """Check every assumption: whether it holds here: true, false, or null where these data cannot say.

    Args:
        choices: The pairs.
        mixture: The groups' rewards.
        found: Epsilon, shares and diversity.
        outcome: The policies on pairs.
        constants: What :func:`feature_constants` gives.
        misassigned: Expected misassignment.
        calibration: Held-out accuracy less what the fit expected, with its interval.

    Returns:
        A list of ``{"assumption", "holds", "told"}``.
    """
    largest, smallest = constants
    num_groups = len(mixture.log_prior)
    num_parameters = num_groups * choices.features.shape[1]
    distance = _distance_to_bradley_terry(choices, mixture)
    checks: list[tuple[str, bool | None, str]] = [
        _linear(calibration),
        (
            "features are bounded by D",
            True,
            f"on these pairs D = {largest:.3g} (half the longest difference); other responses may be longer",
        ),
        (
            "features are linearly independent (smallest eigenvalue above 0)",
            smallest > 0,
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
    return [{"assumption": name, "holds": holds, "told": why} for name, holds, why in checks]


def _linear(calibration: Mapping[str, float] | None) -> tuple[str, bool | None, str]:
    name = "rewards are linear in these features"
    if calibration is None:
        return name, None, "cannot be said without held-out pairs"
    low, high = calibration["low"], calibration["high"]
    off = f"{calibration['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    why = f"held-out accuracy less what the fit expected is {off}"
    if low > 0 or high < 0:
        return name, False, why + ": the probabilities are off, by misfit, too few pairs or wrong groups"
    return name, None, why + ": not contradicted, which is no proof"


def _unique(epsilon: np.ndarray, num_groups: int) -> tuple[str, bool | None, str]:
    name = "a minority is farther from some group than all others are (epsilon above 0)"
    if num_groups == 1:
        return name, False, "one group: there is no minority"
    held = [f"group {k} ({value:.3f})" for k, value in enumerate(epsilon) if value > 0]
    if not held:
        return name, False, "no group is"
    return name, True, "holds for " + ", ".join(held)


def _distance_to_bradley_terry(choices: PairChoices, mixture: LinearMixture) -> float:
    """Measure the mean distance between the mixture's probabilities and the best linear Bradley-Terry's."""
    x = choices.differences
    shares = mixture.log_prior.double().softmax(-1)
    p = torch.sigmoid((x @ mixture.weight.T).double()) @ shares
    # Every pair in both directions, each as often as the mixture would choose it.
    counts = torch.ones(len(x), dtype=torch.float64)
    if choices.row_weights is not None:
        counts = choices.row_weights.double()
    weights = torch.cat([p * counts, (1 - p) * counts]).to(x.dtype)
    best = fit_bradley_terry(torch.cat([x, -x]), l2=1e-9, row_weights=weights)
    return float(((torch.sigmoid((x @ best).double()) - p).abs() * counts).sum() / counts.sum())
