"""What the simulations of coverage share: where logits scatter around, and how often an interval covers."""

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

__all__ = ["WORSE", "centre", "covered"]

#: The true rate of the worst group.
WORSE = 0.6
_GRID = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)


def centre(mean: float, deviation: float) -> float:
    """The logit around which logits scatter by ``deviation`` so that rates have this mean."""
    return brentq(lambda mu: expit(mu + deviation * _GRID).mean() - mean, -9, 9)


def covered(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """Share of the studies whose interval holds the truth."""
    return float(np.mean((low <= truth) & (truth <= high)))
