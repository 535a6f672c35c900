"""Diversity between groups, and what the paper's Lemma 1 and Theorem 1 say of it (arXiv 2402.08925, v2).

The bounds are given as they are printed. They are a diagnostic, not a certificate: :data:`PROOF_GAPS`
names where the printed proof does not carry them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "PROOF_GAPS",
    "Distinctness",
    "distinctness",
    "diversity",
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


def diversity(probabilities: ArrayLike, row_weights: ArrayLike | None = None) -> np.ndarray:
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
    weights = None if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    out = np.zeros((p.shape[1], p.shape[1]))
    for i in range(p.shape[1]):
        for j in range(i):
            out[i, j] = out[j, i] = np.average(np.abs(p[:, i] - p[:, j]), weights=weights)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Distinctness:
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
    count = len(d)
    if count == 1:
        return Distinctness(np.zeros(1), np.zeros(1, dtype=int))
    lead = np.full((count, count), -np.inf)
    for u in range(count):
        others = [k for k in range(count) if k != u]
        lead[u, others] = d[u, others] - d[np.ix_(others, others)].max(axis=0)
    reference = lead.argmax(axis=1)
    return Distinctness(lead.max(axis=1), reference)


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
    distance = np.maximum(epsilon, 0) * (1 - np.asarray(shares, dtype=np.float64))
    if squared:
        distance = distance**2
    return smallest_eigenvalue / (64 * beta**2 * lipschitz) * distance / feature_bound**2
