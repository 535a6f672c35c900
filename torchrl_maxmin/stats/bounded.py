"""Bound what was not seen: the mass of the unseen, and the mean of skewed values below a known ceiling."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

__all__ = ["mean_upper_bound", "unseen_mass"]


def unseen_mass(draws: int, alpha: float) -> float:
    """Bound the mass of what none of ``draws`` independent draws has shown: ``1 - alpha ** (1 / draws)``.

    An event of a larger mass stays unseen with a probability below ``alpha``; about ``3 / draws`` at .05.
    Where draws differ in their distributions, the same holds of the event's mean mass, since the mean of
    ``log(1 - q)`` is at most the logarithm of its mean.

    Args:
        draws: independent draws, at least 1.
        alpha: the probability allowed, in (0, 1).

    Raises:
        ValueError: without a draw, or for an ``alpha`` outside (0, 1).

    Example:
        >>> round(unseen_mass(59, 0.05), 3)
        0.05
    """
    if draws < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs a draw and alpha in (0, 1), got {draws} draws and alpha {alpha}.")
    return -math.expm1(math.log(alpha) / draws)


def mean_upper_bound(values: NDArray[np.floating], ceiling: float, alpha: float) -> float:
    """Bound from above the mean of a distribution that lies below ``ceiling``, however skewed, by betting.

    Against the hypothesis of a mean ``m`` a gambler bets the fraction ``f`` of what may be lost at most on
    values below ``m``: ``prod_i (1 + f (m - values_i) / (ceiling - m))`` has a mean of at most 1 if the mean
    is ``m`` or more, and so has its average over several fractions; by Markov's inequality it exceeds ``1 /
    alpha`` with a probability of at most ``alpha``. The bound is the smallest mean that is refuted. It needs
    no variance, no normality and no lower end, and holds for any number of values. Where all values are equal
    it allows an unseen share of ``1 - (alpha / F) ** (1 / n)`` at the ceiling, a little more than there may
    be. The F fractions are 1, 1/2, 1/4, ... down to ``1 / sqrt(n)``: large ones for rare large values, small
    ones for many ordinary ones.

    After Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS-B 2024, arXiv
    2010.09686); fixed fractions instead of predicted ones make it the same in any order.

    Args:
        values: ``[n]``, independent and of one distribution; n at least 1.
        ceiling: no value of the distribution is above it.
        alpha: the probability, in (0, 1), with which the bound may be below the mean.

    Returns:
        The bound, between the mean of ``values`` and ``ceiling``.

    Raises:
        ValueError: for no values, values that are not finite or above ``ceiling``, or an ``alpha`` outside
            (0, 1).

    Example:
        >>> bad_prompts = np.zeros(16)  # none of 16 was seen to be bad, yet many may be
        >>> round(mean_upper_bound(bad_prompts, ceiling=1.0, alpha=0.05), 2)
        0.22
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or not math.isfinite(ceiling):
        raise ValueError("values must be a vector of finite numbers, and the ceiling finite.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}.")
    # where all values are at the ceiling, their mean may miss it by rounding
    slack = 1e-12 * max(abs(ceiling), float(np.abs(values).max()))
    if values.max() > ceiling + slack:
        raise ValueError(f"a value of {values.max()} is above the ceiling of {ceiling}.")
    width = ceiling - float(values.mean())
    if width <= slack:
        return float(ceiling)
    # (m - values) / (ceiling - m) is s * below - 1 with s = width / (ceiling - m), 1 at the values' mean
    below = np.maximum(ceiling - values, 0.0) / width
    fractions = 0.5 ** np.arange(1 + math.ceil(math.log2(len(values)) / 2))
    wanted = math.log(len(fractions) / alpha)

    def capital(log_s: float) -> float:
        with np.errstate(divide="ignore"):  # the fraction 1 loses all on a value at the ceiling
            logs = np.log1p(fractions[:, None] * (math.exp(log_s) * below - 1.0)).sum(1)
        return float(np.logaddexp.reduce(logs)) - wanted

    top = 1.0
    while capital(top) < 0 and top < 64.0:
        top *= 2.0
    return ceiling - width * math.exp(-float(brentq(capital, 0.0, top))) if capital(top) > 0 else ceiling
