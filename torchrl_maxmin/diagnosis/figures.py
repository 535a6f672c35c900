"""Figures of a diagnosis: from a fit and the pairs, without the bias of the fit, and with intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit

from torchrl_maxmin.clustering.linear import LinearMixture, PairChoices
from torchrl_maxmin.diagnosis.exact import ExactOutcome, exact_outcome
from torchrl_maxmin.diagnosis.theorem import distinctness, diversity

__all__ = [
    "Figures",
    "PairFigures",
    "calibrated_margins",
    "corrected",
    "interval_ends",
    "margins_of",
    "pair_outcome",
]

#: A figure by name: a number a group [K], or one a pair of groups [K, K].
Figures = dict[str, np.ndarray]

#: What a figure cannot leave, with its bias taken off, nor its interval.
_RANGES = {
    "share": (0.0, 1.0),
    "diversity": (0.0, 1.0),
    "distance_to_mixture": (0.0, 1.0),
    "single_gap": (0.0, np.inf),
    "maxmin_gap": (0.0, np.inf),
}


@dataclasses.dataclass(frozen=True)
class PairFigures:
    """Figures that get intervals.

    Attributes:
        beta: KL weight of the alignment gaps, rewards calibrated.
    """

    beta: float

    def __call__(
        self, choices: PairChoices, mixture: LinearMixture, single: LinearMixture
    ) -> tuple[Figures, ExactOutcome]:
        """Figures, and the policies on pairs that the gaps are from."""
        margins, alone = margins_of(choices, mixture), margins_of(choices, single)
        weights = None if choices.row_weights is None else choices.row_weights.numpy()
        p = expit(margins)
        shares = mixture.log_prior.double().softmax(-1).numpy()
        between = diversity(p, weights)
        outcome = pair_outcome(
            calibrated_margins(margins, weights), calibrated_margins(alone, weights), self.beta
        )
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
    """r(chosen) - r(rejected) of every pair by every head [P, K] float64."""
    return (choices.differences @ fit.weight.T).double().numpy()


def calibrated_margins(margins: ArrayLike, row_weights: ArrayLike | None = None) -> np.ndarray:
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
    weights = None if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    deviation = np.sqrt(np.average(values**2, axis=0, weights=weights) / 2)
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
