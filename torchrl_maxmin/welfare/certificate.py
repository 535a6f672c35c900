"""A certificate of the max-min gap from samples, with an interval, or a reason why there is none.

How it works, for a policy with worst-group utility ``min_u F_u``:

* the best possible value is at most ``g(w)`` for *any* weights ``w`` (weak duality, see
  :mod:`torchrl_maxmin.welfare.dual`), so weights need not be optimal, only not chosen on the data that
  evaluate them;
* ``log Z <= Z / c - 1 + log c`` for any ``c > 0``, so an unbiased estimate of ``Z`` gives an unbiased
  estimate of an upper bound, where the logarithm of an estimate is biased low (which in turn gives the
  lower end);
* ``w`` and ``c`` come from one half of every prompt's responses, ``Z`` from the other, then the halves
  are swapped;
* half the responses come from the reference: a policy that dropped the best responses does not sample
  them, and its own samples cannot show what it misses.

Modes that neither policy nor reference sampled are not certified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from scipy.stats import t as student
from torch import Tensor

from torchrl_maxmin.welfare.dual import Array, check_samples, dual_terms, minimise_dual

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Certificate:
    """The gap ``max_pi min_u F_u(pi) - min_u F_u(policy)``, or why it cannot be said.

    Attributes:
        value: the estimate of (an upper bound on) the gap; None if nothing is certified.
        low: the lower end of the interval, at least 0; None likewise.
        high: the upper end of the interval; None likewise.
        reason: None, or in words why nothing is certified.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None


def _halves(num_responses: int) -> tuple[Indices, Indices]:
    # 0 3 4 7 ... and 1 2 5 6 ...: each half holds as many policy as reference responses, whether the two
    # lie one behind the other or alternate.
    first = np.isin(np.arange(num_responses) % 4, (0, 3))
    return np.flatnonzero(first), np.flatnonzero(~first)


def _over_prompts(differences: Array) -> Array:
    """Standard errors ``[K]`` of the means of ``[X, K]``."""
    return differences.std(0, ddof=1) / np.sqrt(len(differences))


def _over_responses(terms: Array) -> Array:
    """Squared standard errors of the means over the responses: ``[X, n, ...]`` to ``[X, ...]``."""
    return terms.var(1, ddof=1) / terms.shape[1]


def _effective_sample_size(log_terms: Array) -> Array:
    return np.exp(2 * logsumexp(log_terms, axis=1) - logsumexp(2 * log_terms, axis=1))


def certify(
    rewards: Tensor,
    log_weights: Tensor,
    policy_utilities: Tensor,
    beta: float,
    *,
    confidence: float = 0.95,
    min_effective_samples: float = 10.0,
    prompts: Literal["drawn", "given"] = "drawn",
) -> Certificate:
    """Bound how far a policy is from the KL-regularised max-min optimum, from samples.

    For each prompt draw n/2 responses from the policy and n/2 from the reference, and let
    ``m = (pi + pi_ref) / 2``. Prompts are independent draws; standard errors are taken over them, of
    the paired differences between the bound and the policy's utilities. With ``prompts="given"`` the gap
    over these very prompts is meant: standard errors are those of the responses within each prompt, and
    the interval is narrower, as prompts differ more than their responses leave unsure.

    Args:
        rewards: ``[X, n, K]``, n a multiple of 4; the policy's responses first and the reference's after
            (or the two alternating), so that halves of the responses hold as many of each.
        log_weights: ``[X, n]``, ``log pi_ref(y) - log m(y) - log n``, *not* normalised to sum to 1: then
            ``sum_i exp(log_weights_i) f(y_i)`` is an unbiased estimate of ``E_ref f``.
        policy_utilities: ``[X, K]`` or ``[X, m, K]``, for each prompt an unbiased estimate of
            ``F_u = E_policy[r_u - beta log(pi / pi_ref)]``, KL inside: the mean of
            ``r_u - beta * (log pi - log pi_ref)`` over policy responses to this prompt (those in
            ``rewards`` or others), or these terms of each of m responses.
        beta: the KL coefficient of the objective, positive.
        confidence: the level of the interval: Student's t over prompts (or over half a prompt's
            responses), Bonferroni-corrected over the K groups.
        min_effective_samples: the least effective sample size of
            ``exp(log_weights + w . r / beta)`` that each prompt must have.
        prompts: ``drawn`` for the gap over the distribution that they come from, ``given`` for the gap over
            these alone (then ``policy_utilities`` must be ``[X, m, K]``).

    Returns:
        The certificate; its numbers are None where nothing can be said, with the reason in words.

    Raises:
        ValueError: on wrong shapes, values that are not finite, n not a multiple of 4, ``beta <= 0``,
            a ``confidence`` outside (0, 1), or given prompts without the terms of two responses or more.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import certify
        >>> rewards = torch.rand(32, 64, 2, generator=torch.Generator().manual_seed(0))
        >>> log_weights = torch.full((32, 64), 1 / 64).log()  # the policy is the reference
        >>> certificate = certify(rewards, log_weights, rewards.mean(1), beta=1.0)
        >>> certificate.low <= certificate.value <= certificate.high
        True
    """
    values, logs = check_samples(rewards, log_weights, beta)
    num_prompts, num_responses, num_groups = values.shape
    if policy_utilities.ndim not in (2, 3) or (
        (policy_utilities.shape[0], policy_utilities.shape[-1]) != (num_prompts, num_groups)
    ):
        raise ValueError(
            f"policy_utilities must be [prompts, groups] = {(num_prompts, num_groups)}, or have the policy's "
            f"responses between the two, got {tuple(policy_utilities.shape)}."
        )
    if prompts not in ("drawn", "given"):
        raise ValueError(f"prompts must be 'drawn' or 'given', got {prompts!r}.")
    given = prompts == "given"
    if given and (policy_utilities.ndim == 2 or policy_utilities.shape[1] < 2):
        raise ValueError(
            "With prompts='given' the standard errors come from the responses: give policy_utilities "
            "[prompts, responses, groups] of two responses or more, not their means."
        )
    policy_terms = policy_utilities.detach().to("cpu", torch.float64).numpy()
    utilities = policy_terms if policy_terms.ndim == 2 else policy_terms.mean(1)
    if not np.isfinite(utilities).all():
        raise ValueError("policy_utilities hold NaN or infinite values.")
    if num_responses % 4:
        raise ValueError(
            f"certify splits the responses of a prompt into two halves with as many policy as reference "
            f"responses in each: their number must be a multiple of 4, got {num_responses}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    if num_prompts < 2 and not given:
        return Certificate(None, None, None, "one prompt gives no standard error; use two or more")

    first, second = _halves(num_responses)
    bound, spread = np.zeros(num_prompts), np.zeros(num_prompts)
    least = np.inf
    for fitted, held_out in ((first, second), (second, first)):
        # A half has n/2 responses: its weights count double.
        half_logs = logs + np.log(2.0)
        if np.isneginf(half_logs[:, fitted].max(1)).any():
            return Certificate(
                None, None, None, "a prompt has no response of positive reference weight in one half"
            )
        weights, _, _ = minimise_dual(values[:, fitted], beta, half_logs[:, fitted])
        terms, _ = dual_terms(weights, values[:, fitted], beta, half_logs[:, fitted])
        log_c = terms / beta
        log_z = logsumexp(half_logs[:, held_out] + values[:, held_out] @ weights / beta, axis=1)
        with np.errstate(over="ignore"):  # too few samples for the beta: said below
            bound += 0.5 * beta * (np.exp(log_z - log_c) - 1.0 + log_c)
            if given:
                exponents = half_logs[:, held_out] + values[:, held_out] @ weights / beta - log_c[:, None]
                terms = beta * np.exp(exponents + np.log(len(held_out)))
                spread += 0.25 * _over_responses(terms)
        least = min(least, _effective_sample_size(logs + values @ weights / beta).min())
    if least < min_effective_samples:
        return Certificate(
            None,
            None,
            None,
            f"the effective sample size of a prompt is {least:.1f}, below {min_effective_samples:g}: "
            "draw more responses, or certify at a larger beta",
        )

    # Jensen's inequality and the minimisation over w both bias the plain estimate low: a lower end.
    weights, _, _ = minimise_dual(values, beta, logs)
    floor, _ = dual_terms(weights, values, beta, logs)
    freedom = (num_responses // 2 if given else num_prompts) - 1
    quantile = float(student.ppf(1.0 - (1.0 - confidence) / (2 * num_groups), freedom))
    gaps, floor_gaps = (bound[:, None] - utilities).mean(0), (floor[:, None] - utilities).mean(0)
    if given:
        # The same responses may stand in both, so the two errors are added, not their squares.
        own = np.sqrt(_over_responses(policy_terms).sum(0)) / num_prompts
        tilts = num_responses * softmax(logs + values @ weights / beta, axis=1)
        errors = own + np.sqrt(spread.sum()) / num_prompts
        floor_errors = own + beta * np.sqrt(_over_responses(tilts).sum()) / num_prompts
    else:
        errors = _over_prompts(bound[:, None] - utilities)
        floor_errors = _over_prompts(floor[:, None] - utilities)
    value = max(float(gaps.max()), 0.0)  # a gap is never negative
    return Certificate(
        value=value,
        low=min(max(float((floor_gaps - quantile * floor_errors).max()), 0.0), value),
        high=max(float((gaps + quantile * errors).max()), 0.0),
    )
