"""Diversity between groups, Lemma 1 and Theorem 1 of arXiv 2402.08925 (v2), and what they assume.

The bounds are given as they are printed. They are a diagnostic, not a certificate: :data:`PROOF_GAPS`
names where the printed proof does not carry them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.identifiability import MISASSIGNMENT_BAR
from torchrl_maxmin.clustering.linear import LinearMixture
from torchrl_maxmin.clustering.solvers import fit_bradley_terry
from torchrl_maxmin.diagnosis.exact import ExactOutcome

__all__ = [
    "PROOF_GAPS",
    "Distinctness",
    "check_assumptions",
    "distinctness",
    "diversity",
    "feature_constants",
    "lemma1_bound",
    "theorem1_bound",
]

#: Steps of the printed proof of Theorem 1 that do not hold as they stand.
PROOF_GAPS = (
    "Lemma 1 enters squared, (49) to (50), but the theorem keeps epsilon (1 - share) unsquared. Both are at "
    "most 1, so the printed bound is stronger than the proof supports; the squared one stands beside it.",
    "The difference of the two policies' log-partition functions is dropped (47).",
    "The strong concavity of F comes from -beta KL, so it should carry beta; the proof takes 1.",
    "The Lipschitz constant of log pi should enter squared.",
    "A mixture of Bradley-Terry models is in general none, so no single reward gives the mixture's "
    "probabilities (Lemma 3); the distance that remains is measured here.",
)

#: A single reward that misses the mixture's probabilities by more than this does not realise it.
REALISABLE = 0.01

BLOCK_ROWS = 8192


def diversity(probabilities: ArrayLike, row_weights: np.ndarray | None = None) -> np.ndarray:
    """Compute the diversity between groups (Definition 1): total variation of their preference probabilities.

    A comparison has two outcomes, so that half the sum of absolute differences is |p_i - p_j|; it is
    averaged over the pairs.

    Args:
        probabilities: P(first preferred) of every pair under every group [P, K].
        row_weights: How much each pair counts [P].

    Returns:
        [K, K] float64, symmetric, zero on the diagonal.

    Example:
        >>> diversity([[0.9, 0.1], [0.5, 0.5]]).tolist()
        [[0.0, 0.4], [0.4, 0.0]]
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.size == 0:
        raise ValueError(f"probabilities must be [P, K] and not empty, got {list(p.shape)}")
    if not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1):
        raise ValueError("probabilities must lie in [0, 1]")
    out = np.zeros((p.shape[1], p.shape[1]))
    for i, j in zip(*np.tril_indices(len(out), -1), strict=True):
        out[i, j] = out[j, i] = np.average(np.abs(p[:, i] - p[:, j]), weights=row_weights)
    return out


class Distinctness(NamedTuple):
    """Lead of a group: how much farther than all others it is from some group (Lemma 1).

    Attributes:
        epsilon: By group [K]. Where it is not positive, Lemma 1 says nothing of the group.
        reference: The group j from which it was taken [K].
    """

    epsilon: np.ndarray
    reference: np.ndarray


def distinctness(between: ArrayLike) -> Distinctness:
    """Compute Lemma 1's epsilon: Diversity(u, j) - max over k != u of Diversity(k, j), for the best j.

    With two groups it is their diversity. With one it is 0.

    Args:
        between: Diversity [K, K].

    Example:
        >>> distinctness([[0.0, 0.1, 0.5], [0.1, 0.0, 0.4], [0.5, 0.4, 0.0]]).epsilon.round(2).tolist()
        [0.1, -0.1, 0.4]
    """
    d = np.asarray(between, dtype=np.float64)
    if len(d) == 1:
        return Distinctness(np.zeros(1), np.zeros(1, dtype=int))
    lead = np.full(d.shape, -np.inf)
    for u in range(len(d)):
        others = np.delete(np.arange(len(d)), u)
        lead[u, others] = d[u, others] - d[np.ix_(others, others)].max(axis=0)
    return Distinctness(lead.max(axis=1), lead.argmax(axis=1))


def lemma1_bound(epsilon: ArrayLike, shares: ArrayLike, feature_bound: float) -> np.ndarray:
    """Compute Lemma 1: one reward's parameters are at least epsilon (1 - share) / (4 D) from group u's.

    Args:
        epsilon: By group [K]; not positive gives 0, as the lemma is silent.
        shares: Population shares [K].
        feature_bound: D, the largest norm of a response's features.

    Example:
        >>> lemma1_bound([0.4], [0.2], 1.0).round(3).tolist()
        [0.08]
    """
    return np.maximum(epsilon, 0) * (1 - np.asarray(shares, dtype=np.float64)) / (4 * feature_bound)


def theorem1_bound(
    epsilon: ArrayLike,
    shares: ArrayLike,
    *,
    beta: float,
    smallest_eigenvalue: float,
    lipschitz: float,
    feature_bound: float,
    squared: bool = False,
) -> np.ndarray:
    """Compute Theorem 1: Align-Gap >= lambda_psi / (64 beta^2 L_pi) * epsilon (1 - share) / D^2, as printed.

    Args:
        epsilon: By group [K]; not positive gives 0.
        shares: Population shares [K].
        beta: KL weight.
        smallest_eigenvalue: lambda_psi, of the features' second moment.
        lipschitz: L_pi = 1 / c, where every policy gives every response at least probability c.
        feature_bound: D, the largest norm of a response's features.
        squared: Square epsilon (1 - share), as the proof's own steps do; see :data:`PROOF_GAPS`.

    Example:
        >>> settings = {"beta": 0.5, "smallest_eigenvalue": 1.0, "lipschitz": 4.0, "feature_bound": 1.0}
        >>> theorem1_bound([0.4], [0.2], **settings).round(4).tolist()
        [0.005]
    """
    distance = (np.maximum(epsilon, 0) * (1 - np.asarray(shares, np.float64))) ** (2 if squared else 1)
    return smallest_eigenvalue / (64 * beta**2 * lipschitz) * distance / feature_bound**2


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
    """Check whether every assumption holds here: true, false, or null where these data cannot say.

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
    leading = [f"group {k} ({value:.3f})" for k, value in enumerate(found["epsilon"]) if value > 0]
    alone = "one group: there is no minority" if num_groups == 1 else "no group is"
    distance = _distance_to_bradley_terry(choices, mixture)
    checks: list[tuple[str, bool | None, str]] = [
        ("rewards are linear in these features", *_linear(calibration)),
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
        (
            "a minority is farther from some group than all others are (epsilon above 0)",
            bool(leading),
            "holds for " + ", ".join(leading) if leading else alone,
        ),
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


def _linear(calibration: Mapping[str, float] | None) -> tuple[bool | None, str]:
    if calibration is None:
        return None, "cannot be said without held-out pairs"
    low, high = calibration["low"], calibration["high"]
    off = f"{calibration['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
    why = f"held-out accuracy less what the fit expected is {off}"
    if low > 0 or high < 0:
        return False, why + ": the probabilities are off, by misfit, too few pairs or wrong groups"
    return None, why + ": not contradicted, which is no proof"


def _distance_to_bradley_terry(choices: PairChoices, mixture: LinearMixture) -> float:
    """Measure the mean distance between the mixture's probabilities and the best linear Bradley-Terry's."""
    x = choices.differences
    p = torch.sigmoid((x @ mixture.weight.T).double()) @ mixture.log_prior.double().softmax(-1)
    # Every pair in both directions, each as often as the mixture would choose it.
    counts = torch.ones(len(x)).double() if choices.row_weights is None else choices.row_weights.double()
    weights = torch.cat([p * counts, (1 - p) * counts]).to(x.dtype)
    best = fit_bradley_terry(torch.cat([x, -x]), l2=1e-9, row_weights=weights)
    return float(((torch.sigmoid((x @ best).double()) - p).abs() * counts).sum() / counts.sum())
