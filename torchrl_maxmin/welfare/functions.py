"""Welfare functions: K group utilities in, one value and the gradient with respect to them out.

A welfare holds no state. The egalitarian family (:class:`Egalitarian`, :class:`SoftMin`) and the
utilitarian mean have gradients on the probability simplex: these are the group weights with which a
policy gradient climbs the welfare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


def check_utilities(utilities: Tensor, num_groups: int | None = None) -> Tensor:
    """Return ``utilities`` if they are usable, raise otherwise.

    Args:
        utilities: float tensor ``[..., K]``, one utility per group in the last dimension.
        num_groups: the K that is expected, if it is known.

    Raises:
        TypeError: if ``utilities`` is no floating point tensor.
        ValueError: if the last dimension is empty or not ``num_groups``, or a value is NaN or infinite.
    """
    if not isinstance(utilities, Tensor) or not utilities.is_floating_point():
        raise TypeError(
            f"Utilities must be a floating point tensor [..., K], got "
            f"{utilities.dtype if isinstance(utilities, Tensor) else type(utilities).__name__}."
        )
    if utilities.ndim == 0 or utilities.shape[-1] == 0:
        raise ValueError(f"Utilities need one entry per group, got shape {tuple(utilities.shape)}.")
    if num_groups is not None and utilities.shape[-1] != num_groups:
        raise ValueError(
            f"Expected the utilities of {num_groups} groups in the last dimension, got shape "
            f"{tuple(utilities.shape)}."
        )
    if not bool(utilities.isfinite().all()):
        raise ValueError(
            f"Utilities hold NaN or infinite values: {utilities.tolist()}. Look for a group without "
            "samples in this batch, or a reward that diverged."
        )
    return utilities


def check_simplex(weights: Tensor | Sequence[float], name: str) -> Tensor:
    """Return ``weights`` as a float64 tensor ``[K]``, raise if it is no point of the simplex.

    Args:
        weights: K non-negative numbers that sum to 1.
        name: what to call them in the error.

    Raises:
        ValueError: if they are not one-dimensional, non-negative and summing to 1 (to 1e-4).
    """
    point = torch.as_tensor(weights, dtype=torch.float64)
    if point.ndim != 1 or point.numel() == 0:
        raise ValueError(f"{name} must be K numbers, got shape {tuple(point.shape)}.")
    if not bool((point >= 0).all()) or abs(float(point.sum()) - 1.0) > 1e-4:
        raise ValueError(f"{name} must be non-negative and sum to 1, got {point.tolist()}.")
    return point


def weights_like(weights: Tensor | None, utilities: Tensor) -> Tensor:
    """Expand weights ``[K]``, or equal ones for None, to checked utilities ``[..., K]``.

    Raises:
        TypeError, ValueError: as :func:`check_utilities`.
    """
    check_utilities(utilities, None if weights is None else weights.numel())
    if weights is None:
        return torch.full_like(utilities, 1.0 / utilities.shape[-1])
    return weights.to(utilities).expand_as(utilities)


class Welfare(ABC):
    """A function of K group utilities, with its gradient.

    Subclasses write :meth:`value` and :meth:`weights`. Calling the object is calling :meth:`value`.
    Leading dimensions are batch dimensions.
    """

    @property
    def everywhere(self) -> bool:
        """Whether it is defined for all finite utilities."""
        return True

    @abstractmethod
    def value(self, utilities: Tensor) -> Tensor:
        """The welfare ``[...]`` of utilities ``[..., K]``; differentiable."""

    @abstractmethod
    def weights(self, utilities: Tensor) -> Tensor:
        """The gradient ``[..., K]`` of :meth:`value` at ``utilities`` ``[..., K]``."""

    def normalized_weights(self, utilities: Tensor) -> Tensor:
        """The gradient divided by its sum: group weights ``[..., K]`` on the simplex.

        The same as :meth:`weights` for all but :class:`AlphaFair` and :class:`Nash`.
        """
        weights = self.weights(utilities)
        return weights / weights.sum(-1, keepdim=True)

    def __call__(self, utilities: Tensor) -> Tensor:
        """The same as :meth:`value`."""
        return self.value(utilities)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class LinearWelfare(Welfare):
    """A welfare that is the mean of the utilities under its own gradient."""

    def value(self, utilities: Tensor) -> Tensor:
        """The mean ``[...]`` of utilities ``[..., K]`` under :meth:`weights`."""
        return (self.weights(utilities) * utilities).sum(-1)


class Egalitarian(Welfare):
    """The utility of the group that is worst off, ``min_k u_k`` (MaxMin-RLHF, eq. 14, arXiv 2402.08925).

    Ties go to the lowest index, in the value's gradient and in the weights alike.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Egalitarian
        >>> utilities = torch.tensor([0.5, -1.0, 2.0])
        >>> Egalitarian()(utilities), Egalitarian().weights(utilities)
        (tensor(-1.), tensor([0., 1., 0.]))
    """

    def value(self, utilities: Tensor) -> Tensor:
        """The minimum ``[...]`` over the last dimension of ``[..., K]``."""
        worst = check_utilities(utilities).argmin(-1, keepdim=True)
        return utilities.gather(-1, worst).squeeze(-1)

    def weights(self, utilities: Tensor) -> Tensor:
        """One-hot ``[..., K]`` at the (first) worst group."""
        worst = check_utilities(utilities).argmin(-1, keepdim=True)
        return torch.zeros_like(utilities).scatter_(-1, worst, 1.0)


class Utilitarian(LinearWelfare):
    """The mean utility, weighted by population shares.

    With the groups' shares this behaves like training on a single reward model. ``shares=None`` is the
    equal-weight mean, another objective: it gives a small group as much weight as a large one.

    Args:
        shares: the groups' shares of the population ``[K]``, summing to 1; None for equal weights.

    Raises:
        ValueError: if ``shares`` is no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Utilitarian
        >>> Utilitarian(shares=[0.75, 0.25])(torch.tensor([1.0, -1.0]))
        tensor(0.5000)
    """

    def __init__(self, shares: Tensor | Sequence[float] | None = None) -> None:
        self.shares = None if shares is None else check_simplex(shares, "shares")

    def weights(self, utilities: Tensor) -> Tensor:
        """The shares, expanded to ``[..., K]``."""
        return weights_like(self.shares, utilities)


class SoftMin(Welfare):
    """The entropic soft minimum ``-T log sum_k p_k exp(-u_k / T)``.

    It lies between ``min_k u_k`` (T to 0) and the ``p``-weighted mean (T to infinity); equal utilities
    give their common value. Its weights are the fixed point of
    :class:`~torchrl_maxmin.welfare.EntropyRegularized` at ``tau * scale = T``.

    Args:
        temperature: T > 0, in the units of the utilities.
        prior: the prior weights ``p`` ``[K]``, summing to 1; None for equal ones.

    Raises:
        ValueError: if ``temperature`` is not positive or ``prior`` is no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import SoftMin
        >>> SoftMin(temperature=0.1)(torch.tensor([1.0, 1.0]))
        tensor(1.)
    """

    def __init__(self, temperature: float, prior: Tensor | Sequence[float] | None = None) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}.")
        self.temperature = float(temperature)
        self.prior = None if prior is None else check_simplex(prior, "prior")

    def _logits(self, utilities: Tensor) -> Tensor:
        return weights_like(self.prior, utilities).log() - utilities / self.temperature

    def value(self, utilities: Tensor) -> Tensor:
        """The soft minimum ``[...]`` over the last dimension of ``[..., K]``."""
        prior = weights_like(self.prior, utilities)
        lowest = utilities.detach().amin(-1, keepdim=True)
        logits = self._logits(utilities - lowest)
        # Sum of p (exp(-u / T) - 1), which keeps its digits where T is far above the differences.
        shortfall = (prior * torch.expm1((lowest - utilities) / self.temperature)).sum(-1)
        log_mean = torch.where(shortfall > -0.5, torch.log1p(shortfall.clamp_min(-0.5)), logits.logsumexp(-1))
        return lowest.squeeze(-1) - self.temperature * log_mean

    def weights(self, utilities: Tensor) -> Tensor:
        """``softmax(log p - u / T)``, ``[..., K]``."""
        return self._logits(utilities).softmax(-1)
