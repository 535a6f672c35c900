"""The alignment gap: what a group loses against the policy that was trained for it alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["AlignmentGap", "alignment_gap"]


class AlignmentGap(NamedTuple):
    """Alignment gap by group.

    Attributes:
        gap: F_u(pi_u*) - F_u(pi) by group [K].
        standard_error: Its standard error over prompts [K]; NaN with one prompt.
        num_prompts: Number of prompts behind it.
    """

    gap: np.ndarray
    standard_error: np.ndarray
    num_prompts: int


def alignment_gap(policy_utilities: ArrayLike, best_utilities: ArrayLike) -> AlignmentGap:
    """Compute the gap of each group to its own best policy, F_u(pi_u*) - F_u(pi) (arXiv 2402.08925, eq. 12).

    F_u is E[r_u(x, y)], less beta KL(pi || pi_ref) where the KL is part of the objective: give
    ``r_u - beta * (log pi - log pi_ref)`` as the utility then. Samples of a prompt are averaged first, and
    the two policies are paired by prompt; the standard error is the deviation of the prompts' differences
    over sqrt(N). It says nothing of chance in training: compare seeds for that.

    Args:
        policy_utilities: [..., K]. The first dimension is the prompt, further ones are its samples; [K]
            alone is a gap without a standard error.
        best_utilities: [..., K]; column u holds group u's utility under pi_u*, the policy that was trained
            for u alone. Same prompts; the number of samples may differ.

    Returns:
        :class:`AlignmentGap`. A negative gap says that pi_u* was not the best after all.

    Raises:
        ValueError: If groups or prompts differ in number, or there is nothing.

    Example:
        >>> alignment_gap([[1.0, 0.0], [1.0, 0.5]], [[1.0, 2.0], [1.0, 1.5]]).gap
        array([0. , 1.5])
    """
    policy, best = _by_prompt(policy_utilities), _by_prompt(best_utilities)
    if policy.shape != best.shape:
        raise ValueError(
            "policy and best utilities must share prompts (first dimension) and groups (last); got "
            f"{list(np.shape(policy_utilities))} and {list(np.shape(best_utilities))}"
        )
    difference = best - policy
    count, mean = len(difference), difference.mean(axis=0)
    error = difference.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full_like(mean, np.nan)
    return AlignmentGap(mean, error, count)


def _by_prompt(utilities: ArrayLike) -> np.ndarray:
    array = np.asarray(utilities, dtype=np.float64)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"utilities must be [..., K] and not empty, got {list(array.shape)}")
    if array.ndim == 1:
        return array[None]
    return array.mean(axis=tuple(range(1, array.ndim - 1))) if array.ndim > 2 else array
