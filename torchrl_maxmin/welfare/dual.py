"""The exact solution of KL-regularised max-min, by its dual.

With ``F_u(pi) = E[r_u] - beta KL(pi || pi_ref)`` the population max-min ``max_pi min_u F_u(pi)`` has a
saddle point: ``pi*`` is proportional to ``pi_ref exp(sum_u w_u r_u / beta)`` with

    w* = argmin over the simplex of  g(w) = beta E_x log E_ref exp(w . r(x, y) / beta),

a convex problem in K variables, and ``g(w*) = max_pi min_u F_u(pi)``. For any ``w`` of the simplex and
any policy, ``g(w) >= min_u F_u(pi)`` (weak duality).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DualSolution:
    """Solution of :func:`solve_dual`.

    Attributes:
        weights: the optimal group weights ``[K]``, float64, on the simplex.
        value: ``g(weights)``, the best worst-group utility ``max_pi min_u F_u(pi)``, KL inside.
        beta: the KL coefficient.
        slack: a bound on ``value`` minus the true optimum: the duality gap of the policy that
            belongs to ``weights``.
    """

    weights: Tensor
    value: float
    beta: float
    slack: float

    def gap(self, utilities: Tensor, kl: float | Tensor) -> float:
        """Compute how far a policy is from the optimum: ``value - (min_u utilities_u - beta * kl)``.

        Args:
            utilities: ``[K]``, the policy's ``E[r_u]`` *without* the KL term.
            kl: the policy's ``E_x KL(pi || pi_ref)``, in nats.

        Returns:
            The gap; non-negative (to rounding) where the rewards were enumerated.
        """
        if utilities.shape != self.weights.shape:
            raise ValueError(
                f"Expected utilities of shape [{self.weights.numel()}], got {tuple(utilities.shape)}."
            )
        return self.value - (float(utilities.min()) - self.beta * float(kl))


def check_samples(rewards: Tensor, log_weights: Tensor | None, beta: float) -> tuple[Array, Array]:
    """Check rewards and log-weights and return both as float64 arrays.

    Args:
        rewards: ``[X, n, K]``.
        log_weights: ``[X, n]``, or None for ``-log n``; ``-inf`` takes a response out.
        beta: the KL coefficient.

    Raises:
        ValueError: on wrong shapes, values that are not finite, ``beta <= 0``, or a prompt without
            any response of positive weight.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if rewards.ndim != 3 or 0 in rewards.shape:
        raise ValueError(f"rewards must be [prompts, responses, groups], got {tuple(rewards.shape)}.")
    values = rewards.detach().to("cpu", torch.float64).numpy()
    if log_weights is None:
        logs = np.full(values.shape[:2], -np.log(values.shape[1]))
    elif log_weights.shape != rewards.shape[:2]:
        raise ValueError(
            f"log_weights must be [prompts, responses] = {tuple(rewards.shape[:2])}, got "
            f"{tuple(log_weights.shape)}."
        )
    else:
        logs = log_weights.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(values).all():
        raise ValueError("rewards hold NaN or infinite values.")
    if np.isnan(logs).any() or np.isposinf(logs).any() or np.isneginf(logs.max(1)).any():
        raise ValueError(
            "log_weights must be finite or -inf, with at least one finite entry for every prompt."
        )
    return values, logs


def dual_terms(weights: Array, rewards: Array, beta: float, log_weights: Array) -> tuple[Array, Array]:
    """Compute the terms of ``g`` by prompt, and their gradients.

    Args:
        weights: ``[K]``.
        rewards: ``[X, n, K]``.
        beta: the KL coefficient.
        log_weights: ``[X, n]``.

    Returns:
        ``beta log sum_i exp(log_weights_i + w . r_i / beta)`` ``[X]``, and the mean rewards under the
        tilted weights ``[X, K]``.
    """
    log_totals, shares = _tilt(weights, rewards, beta, log_weights)
    return beta * log_totals, np.matmul(shares[:, None], rewards)[:, 0]


def _tilt(weights: Array, rewards: Array, beta: float, log_weights: Array) -> tuple[Array, Array]:
    """Logarithm [X] of the sum of the tilted weights, and their shares [X, n] in it."""
    scores = (rewards.reshape(-1, len(weights)) @ weights).reshape(log_weights.shape)
    # prompts side by side: reductions over a few responses each take many times as long
    tilted = np.ascontiguousarray((log_weights + scores / beta).T)
    # one exponential serves both: scipy's logsumexp and softmax would each take their own
    top = tilted.max(0)
    masses = np.exp(tilted - top)
    totals = masses.sum(0)
    return top + np.log(totals), (masses / totals).T


def minimise_dual(rewards: Array, beta: float, log_weights: Array) -> tuple[Array, float, float]:
    """Minimise ``g`` over the simplex.

    Args:
        rewards: ``[X, n, K]``.
        beta: the KL coefficient.
        log_weights: ``[X, n]``.

    Returns:
        The weights ``[K]``, ``g`` there, and a bound on its distance from the minimum.
    """
    num_groups = rewards.shape[-1]
    # Shifting a head by a constant shifts g by a linear term, scaling scales it: solve in units of the
    # rewards' spread, where SLSQP's absolute tolerances mean something.
    scale = float(np.ptp(rewards, axis=(0, 1)).max()) or 1.0

    def scaled(weights: Array, temperature: float) -> tuple[float, Array]:
        log_totals, shares = _tilt(weights, rewards, temperature, log_weights)
        gradient = shares.reshape(-1) @ rewards.reshape(-1, num_groups) / len(rewards)
        return temperature * float(log_totals.mean()) / scale, gradient / scale

    weights = np.full(num_groups, 1.0 / num_groups)
    # At a small beta g is nearly piecewise linear: come down to it, each solution the next one's start.
    temperatures = [t for t in scale * 10.0 ** -np.arange(0.0, 12.0, 0.5) if t > beta] + [beta]
    for temperature in temperatures if num_groups > 1 else []:
        found = minimize(
            scaled,
            weights,
            args=(temperature,),
            jac=True,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * num_groups,
            constraints={
                "type": "eq",
                "fun": lambda w: w.sum() - 1.0,
                "jac": np.ones_like,
            },
            options={"ftol": 1e-14, "maxiter": 500},
        )
        candidate = np.clip(found.x, 0.0, None)
        candidate /= candidate.sum()
        if scaled(candidate, temperature)[0] <= scaled(weights, temperature)[0]:
            weights = candidate
    value, gradient = scaled(weights, beta)
    # Convexity: g(w) - g(v) <= gradient . (w - v) for every v, and the best v is a corner.
    slack = max(float(gradient @ weights - gradient.min()), 0.0)
    return weights, scale * value, scale * slack


def solve_dual(rewards: Tensor, beta: float, log_weights: Tensor | None = None) -> DualSolution:
    """Solve for the exact optimum of population max-min with a KL penalty.

    Exact where the responses are enumerated (``log_weights`` the reference's log-probabilities); an
    estimate, biased low, where they are samples.

    Args:
        rewards: ``[X, n, K]``, rewards of n responses to each of X prompts under K heads.
        beta: the KL coefficient, positive.
        log_weights: ``[X, n]`` such that ``sum_i exp(log_weights_i) f(y_i)`` is ``E_ref f``; None means
            ``-log n``, for samples of the reference or a uniform one.

    Returns:
        The weights, the best worst-group utility, and ``.gap(utilities, kl)`` for a policy's distance.

    Raises:
        ValueError: on wrong shapes, values that are not finite, or ``beta <= 0``.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import solve_dual
        >>> bandit = torch.tensor([[1.0, -0.5], [-0.4, 0.9], [0.45, 0.35], [0.0, 0.0]])
        >>> solution = solve_dual(bandit.unsqueeze(0), beta=0.05)
        >>> round(solution.value, 4)
        0.3341
    """
    values, logs = check_samples(rewards, log_weights, beta)
    weights, value, slack = minimise_dual(values, beta, logs)
    return DualSolution(torch.from_numpy(weights), value, float(beta), slack)
