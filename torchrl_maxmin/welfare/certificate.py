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

What samples cannot show stands beside the numbers, and in the upper end:

* a response of reference mass below ``p0`` may be missing among the reference's draws. It is taken to be
  worth no more than the best response drawn for its prompt (or the given ``reward_bound``): ``log Z`` is
  bounded with ``p0`` of the mass spent where it raises the bound most;
* a kind of prompt may be missing too. The upper end is a betting bound on the mean over prompts, with a
  ceiling that no prompt is taken to pass: the worst that a policy could do on any prompt that was drawn.

Both are said in words by ``Certificate.statement``: where a certificate is false, its statement is.
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

from torchrl_maxmin.stats.bounded import mean_upper_bound, unseen_mass
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
        mass: reference mass below which a response may have stayed unseen, a mean over the prompts.
        worth: the most that such a response is taken to be worth above its prompt's mean under the reference,
            in rewards weighted by group weights; a mean over the prompts.
        prompt_mass: share of prompts below which a kind of prompt may have stayed unseen; None if the prompts
            are given.
        prompt_loss: the most that the policy is taken to lose on such a prompt.
        statement: in words what the numbers rest on, with these four; None if nothing is certified.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    mass: float | None = None
    worth: float | None = None
    prompt_mass: float | None = None
    prompt_loss: float | None = None
    statement: str | None = None


def _nothing(reason: str) -> Certificate:
    return Certificate(None, None, None, reason)


def _halves(num_responses: int) -> tuple[Indices, Indices]:
    # 0 3 4 7 ... and 1 2 5 6 ...: each half holds as many policy as reference responses, whether the two
    # lie one behind the other or alternate.
    first = np.isin(np.arange(num_responses) % 4, (0, 3))
    return np.flatnonzero(first), np.flatnonzero(~first)


def _over_responses(terms: Array) -> Array:
    """Squared standard errors of the means over the responses: ``[X, n, ...]`` to ``[X, ...]``."""
    return terms.var(1, ddof=1) / terms.shape[1]


def _effective_sample_size(log_terms: Array) -> Array:
    return np.exp(2 * logsumexp(log_terms, axis=1) - logsumexp(2 * log_terms, axis=1))


def _water_level(log_heights: Array, volume: float) -> float:
    """The logarithm of the level at which ``mean_x (level - height_x)+`` is ``volume``."""
    heights = np.sort(np.exp(np.minimum(log_heights, 300.0)))
    levels = (volume * len(heights) + np.cumsum(heights)) / np.arange(1, len(heights) + 1)
    # the level over the k lowest is the right one as soon as it stays below the next
    return float(np.log(levels[np.argmax(levels <= np.append(heights[1:], np.inf))]))


def spend_unseen(log_c: Array, log_best: Array, mass: float) -> tuple[Array, Array]:
    """Raise ``c`` for responses that nobody drew, so that ``Z / c - 1 + log c`` bounds ``log Z`` with them.

    Let the unseen have masses ``q_x``, ``mass`` in the mean over prompts, and ``exp(w . r / beta)`` be at
    most ``best_x`` on it. Samples estimate ``Z'_x``, that of the seen alone: ``Z_x <= (1 - q_x) Z'_x + q_x
    best_x``, near ``Z'_x + q_x spare_x`` with ``spare_x = (best_x - c_x)+``. For any ``c'`` the bound
    ``mean_x [(Z'_x + q_x spare_x) / c'_x - 1 + log c'_x]`` is largest with all of the mass where ``spare_x /
    c'_x`` is. ``c'_x = max(c_x, level * spare_x)`` makes that ratio ``1 / level`` at most, and the level with
    ``mean_x (level - c_x / spare_x)+ = mass`` makes the bound smallest where ``Z' = c``.

    Args:
        log_c: ``[X]``.
        log_best: ``[X]``, of ``exp(w . r / beta)``.
        mass: the mean mass.

    Returns:
        ``damping = c / c'`` and ``lift = log(c' / c)``, ``[X]`` each: the bound is the mean of
        ``damping * (Z' / c - 1) + log c + lift``.

    Example:
        >>> import numpy as np
        >>> damping, lift = spend_unseen(np.zeros(1), np.log([2001.0]), mass=0.001)
        >>> bool(np.isclose(lift[0], np.log(1 + 0.001 * 2000)))
        True
    """
    above = np.maximum(log_best - log_c, 0.0)
    with np.errstate(divide="ignore"):  # nothing to spare: infinitely high, and never raised
        log_heights = -above - np.log(-np.expm1(-above))
    lift = np.maximum(_water_level(log_heights, mass) - log_heights, 0.0)
    return np.exp(-lift), lift


@dataclass(frozen=True)
class _Crossed:
    """What the halves say of each other: terms by prompt of an upper bound on the best value.

    Attributes:
        bound: ``[X]``, unbiased for an upper bound where all responses may be drawn.
        upper: ``[X]``, the same with the mass of the unseen spent.
        spread: ``[X]``, squared standard errors of ``upper`` over the responses.
        regrets: ``[K]``, the most that one prompt's best response is worth above a group's worst one.
        worth: what an unseen response may be worth above the reference's mean, a mean over the prompts.
        effective: the least effective sample size of a prompt.
    """

    bound: Array
    upper: Array
    spread: Array
    regrets: Array
    worth: float
    effective: float


def _cross(
    values: Array, logs: Array, beta: float, mass: float, reward_bound: float | None
) -> _Crossed | None:
    """Fit weights and ``c`` on one half, evaluate on the other, and swap; None where a half has no weight."""
    num_prompts, num_responses, num_groups = values.shape
    first, second = _halves(num_responses)
    # a half has n/2 responses: its weights count double
    half_logs, seen = logs + np.log(2.0), np.isfinite(logs)
    bound, upper, spread = np.zeros(num_prompts), np.zeros(num_prompts), np.zeros(num_prompts)
    regrets = np.full(num_groups, -np.inf)
    effective, worth = np.inf, 0.0
    for fitted, held_out in ((first, second), (second, first)):
        if np.isneginf(half_logs[:, fitted].max(1)).any():
            return None
        weights, _, _ = minimise_dual(values[:, fitted], beta, half_logs[:, fitted])
        terms, _ = dual_terms(weights, values[:, fitted], beta, half_logs[:, fitted])
        log_c, scores = terms / beta, values @ weights
        best = np.where(seen, scores, -np.inf).max(1)
        centres = (softmax(logs, axis=1) * scores).sum(1)
        if reward_bound is None:
            regrets = np.maximum(regrets, (best[:, None] - values.min(1)).max(0))
        else:
            best, regrets[:] = np.full(num_prompts, reward_bound), 2 * reward_bound
        worth += 0.5 * float((best - centres).mean())
        damping, lift = spend_unseen(log_c, best / beta, mass)
        exponents = half_logs[:, held_out] + scores[:, held_out] / beta - log_c[:, None]
        with np.errstate(over="ignore", invalid="ignore"):  # too few samples for the beta: certify says so
            ratios = np.exp(logsumexp(exponents, axis=1))
            bound += 0.5 * beta * (ratios - 1.0 + log_c)
            upper += 0.5 * beta * (damping * (ratios - 1.0) + log_c + lift)
            spread += 0.25 * _over_responses(beta * damping[:, None] * np.exp(exponents) * len(held_out))
        effective = min(effective, float(_effective_sample_size(logs + scores / beta).min()))
    return _Crossed(bound, upper, spread, regrets, worth, effective)


# What a policy says at worst on a prompt that was not drawn: one response of reference mass .01, always.
_COLLAPSED = float(np.log(100.0))


def _largest_log_ratio(logs: Array) -> float:
    """The largest ``log(pi / pi_ref)`` that is taken to be possible, from ``log(pi_ref / m) - log n``.

    The largest of a response that was drawn, or ``log 100`` if that is more; 0 for a policy that is the
    reference on every response.
    """
    log_share = float(-logs[np.isfinite(logs)].min() - np.log(logs.shape[1]))  # log((pi / pi_ref + 1) / 2)
    if log_share < 1e-6:
        return 0.0
    return max(log_share + float(np.log(2.0 - np.exp(-log_share))), _COLLAPSED)


def certify(
    rewards: Tensor,
    log_weights: Tensor,
    policy_utilities: Tensor,
    beta: float,
    *,
    confidence: float = 0.95,
    min_effective_samples: float = 10.0,
    prompts: Literal["drawn", "given"] = "drawn",
    reward_bound: float | None = None,
    looks: int = 1,
    min_prompts: int = 16,
) -> Certificate:
    """Bound how far a policy is from the KL-regularised max-min optimum, from samples.

    For each prompt draw n/2 responses from the policy and n/2 from the reference, and let
    ``m = (pi + pi_ref) / 2``. Prompts are independent draws and the units: the upper end is a betting bound
    (:func:`~torchrl_maxmin.stats.mean_upper_bound`) on the mean over prompts of the paired differences
    between the bound and the policy's utilities, so that a policy that is bad on few prompts is not called
    good where few were drawn. Its ceiling: on a prompt that was not drawn the policy may at worst always say
    the response that is worth least of those drawn for a prompt, at a log-ratio to the reference of ``log
    100`` or of the largest drawn, where the optimum says the best. With ``prompts="given"`` the gap over
    these very prompts is meant: standard errors are those of the responses within each prompt, and the
    interval is narrower, as prompts differ more than their responses leave unsure.

    Half of the upper end's error probability goes to responses that nobody drew, half to what was drawn, and
    this half to the K groups. The fewer the prompts the wider: with 16 of them a kind of prompt with a share
    of a quarter may be missing, with 64 one of 8%, with 256 one of 2%.

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
        confidence: the level of the interval. Its lower end is Student's t over prompts (or over half a
            prompt's responses), Bonferroni-corrected over the K groups.
        min_effective_samples: the least effective sample size of
            ``exp(log_weights + w . r / beta)`` that each prompt must have.
        prompts: ``drawn`` for the gap over the distribution that they come from, ``given`` for the gap over
            these alone (then ``policy_utilities`` must be ``[X, m, K]``).
        reward_bound: the largest absolute value that a reward of any response to any prompt can have, in the
            units of ``rewards`` (calibrated, a penalty for a missing end included). None takes responses that
            nobody drew to be worth no more than the best one drawn.
        looks: how many certificates are looked at before one is acted on; the error probability is shared
            among them.
        min_prompts: the least number of drawn prompts.

    Returns:
        The certificate; its numbers are None where nothing can be said, with the reason in words.

    Raises:
        ValueError: on wrong shapes, values that are not finite, n not a multiple of 4, ``beta <= 0``,
            a ``confidence`` outside (0, 1), a ``reward_bound`` or ``looks`` that is not positive, or given
            prompts without the terms of two responses or more.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import certify
        >>> rewards = torch.rand(32, 64, 2, generator=torch.Generator().manual_seed(0))
        >>> log_weights = torch.full((32, 64), 1 / 64).log()  # the policy is the reference
        >>> certificate = certify(rewards, log_weights, rewards.mean(1), beta=1.0, reward_bound=1.0)
        >>> certificate.low <= certificate.value <= certificate.high
        True
        >>> f"mass {certificate.mass:.4f} worth {certificate.worth:.2f}"
        'mass 0.0043 worth 0.50'
    """
    values, logs = check_samples(rewards, log_weights, beta)
    num_prompts, num_responses, num_groups = values.shape
    given = prompts == "given"
    if not 0 < confidence < 1 or looks < 1 or not (reward_bound is None or reward_bound > 0):
        raise ValueError(
            "confidence must be in (0, 1), looks at least 1 and reward_bound positive, got "
            f"{confidence}, {looks} and {reward_bound}."
        )
    policy_terms = _policy_terms(policy_utilities, values, prompts)
    utilities = policy_terms if policy_terms.ndim == 2 else policy_terms.mean(1)
    if num_prompts < min_prompts and not given:
        return _nothing(
            f"prompts are the units, and {num_prompts} of them give no standard error to rely on and say "
            f"nothing of those that were not drawn: use {min_prompts} or more"
        )
    largest = float(np.abs(values).max())
    if reward_bound is not None and largest > reward_bound * (1.0 + 1e-6):  # rewards may be float32
        return _nothing(f"a reward of size {largest:.4g} was seen, above the given bound of {reward_bound:g}")
    tail = (1.0 - confidence) / (2 * looks)  # of either end
    mass = unseen_mass(num_prompts * num_responses // 2, tail / 2)

    crossed = _cross(values, logs, beta, mass, reward_bound)
    if crossed is None:
        return _nothing("a prompt has no response of positive reference weight in one half")
    if crossed.effective < min_effective_samples or not np.isfinite(crossed.bound).all():
        return _nothing(
            f"the effective sample size of a prompt is {crossed.effective:.1f}, below "
            f"{min_effective_samples:g}: draw more responses, or certify at a larger beta"
        )

    # Jensen's inequality and the minimisation over w both bias the plain estimate low: a lower end.
    weights, _, _ = minimise_dual(values, beta, logs)
    floor, _ = dual_terms(weights, values, beta, logs)
    gaps, floors, uppers = (terms[:, None] - utilities for terms in (crossed.bound, floor, crossed.upper))
    lost = crossed.regrets + beta * _largest_log_ratio(logs)
    value = max(float(gaps.mean(0).max()), 0.0)  # a gap is never negative
    prompt_mass = prompt_loss = None
    if given:
        # The same responses may stand in both, so the two errors are added, not their squares.
        own = np.sqrt(_over_responses(policy_terms).sum(0)) / num_prompts
        tilts = num_responses * softmax(logs + values @ weights / beta, axis=1)
        floor_errors = own + beta * np.sqrt(_over_responses(tilts).sum()) / num_prompts
        freedom = num_responses // 2 - 1
        quantile = float(student.ppf(1.0 - tail / (2 * num_groups), freedom))
        # what the policy says too rarely to be drawn may be as bad as the worst that was
        worst = policy_terms.min(1) if reward_bound is None else utilities - lost
        missed = unseen_mass(num_prompts * policy_terms.shape[1], tail / (2 * num_groups))
        errors = quantile * (own + np.sqrt(crossed.spread.sum()) / num_prompts)
        ends = uppers.mean(0) + errors + missed * (utilities - worst).max(0)
    else:
        floor_errors, freedom = floors.std(0, ddof=1) / np.sqrt(num_prompts), num_prompts - 1
        ceilings = np.maximum(lost, uppers.max(0))
        share = tail / (2 * num_groups)
        ends = np.array(
            [mean_upper_bound(each, top, share) for each, top in zip(uppers.T, ceilings, strict=True)]
        )
        prompt_mass, prompt_loss = unseen_mass(num_prompts, share), float(ceilings.max())
    quantile = float(student.ppf(1.0 - tail / num_groups, freedom))
    return Certificate(
        value=value,
        low=min(max(float((floors.mean(0) - quantile * floor_errors).max()), 0.0), value),
        high=max(float(ends.max()), value),
        mass=mass,
        worth=crossed.worth,
        prompt_mass=prompt_mass,
        prompt_loss=prompt_loss,
        statement=_statement(mass, crossed.worth, reward_bound, prompt_mass, prompt_loss),
    )


def _policy_terms(policy_utilities: Tensor, values: Array, prompts: str) -> Array:
    """Check the policy's utilities against the rewards ``values``, and return them as float64."""
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
    if prompts == "given" and (policy_utilities.ndim == 2 or policy_utilities.shape[1] < 2):
        raise ValueError(
            "With prompts='given' the standard errors come from the responses: give policy_utilities "
            "[prompts, responses, groups] of two responses or more, not their means."
        )
    policy_terms: Array = policy_utilities.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(policy_terms).all():
        raise ValueError("policy_utilities hold NaN or infinite values.")
    if num_responses % 4:
        raise ValueError(
            f"certify splits the responses of a prompt into two halves with as many policy as reference "
            f"responses in each: their number must be a multiple of 4, got {num_responses}."
        )
    return policy_terms


def _statement(
    mass: float,
    worth: float,
    reward_bound: float | None,
    prompt_mass: float | None,
    prompt_loss: float | None,
) -> str:
    """Say in words what the numbers rest on, and samples of this size cannot show."""
    why = (
        "as the best one drawn for it is"
        if reward_bound is None
        else f"since no reward is above {reward_bound:g} in size, as was given"
    )
    text = (
        f"no response of reference mass below {mass:.2g} is worth more than {worth:.3g} above its prompt's "
        f"mean under the reference, {why}"
    )
    if prompt_mass is None:
        return text
    return f"{text}; on no kind of prompt rarer than {prompt_mass:.2g} is the gap above {prompt_loss:.3g}"
