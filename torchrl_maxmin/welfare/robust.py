"""Distributionally robust welfares: the mean utility under the worst shares near the population's.

Each is ``min_w sum_k w_k u_k`` over a set of weights around the shares ``p``. By the envelope theorem the
minimiser is the gradient, so these are the group weights to train under. Groups of share zero stay out.
The sets: Rahimian & Mehrotra, Distributionally Robust Optimization: A Review (arXiv 1908.05659).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrl_maxmin.welfare.functions import LinearWelfare, check_simplex, check_utilities, weights_like

__all__ = ["CVaR", "Chi2Ball", "KLBall"]

_BISECTIONS = 60  # halvings of a bracket of about 60 in the logarithm: to the last digit of float64


class RobustWelfare(LinearWelfare):
    """The worst mean utility over a set of weights around the shares.

    Args:
        shares: the groups' shares of the population ``[K]``, summing to 1; None for equal ones.
    """

    def __init__(self, shares: Tensor | Sequence[float] | None = None) -> None:
        self.shares = None if shares is None else check_simplex(shares, "shares")

    def weights(self, utilities: Tensor) -> Tensor:
        """The worst weights ``[..., K]``, in float64 inside and in the dtype of the utilities outside."""
        with torch.no_grad():
            values = check_utilities(utilities).double()
            return self._worst(values, weights_like(self.shares, values)).to(utilities.dtype)

    @abstractmethod
    def _worst(self, utilities: Tensor, shares: Tensor) -> Tensor:
        """The minimiser ``[..., K]``, all in float64."""


class _Ball(RobustWelfare):
    """Weights whose divergence from the shares is at most a radius.

    Args:
        radius: of the ball; 0 gives the shares themselves, a large one the minimum.
        shares: the groups' shares ``[K]``; None for equal ones.

    Raises:
        ValueError: if the radius is negative or not a number, or ``shares`` no point of the simplex.
    """

    def __init__(self, radius: float, shares: Tensor | Sequence[float] | None = None) -> None:
        super().__init__(shares)
        if not radius >= 0:
            raise ValueError(f"radius must not be negative, got {radius}.")
        self.radius = float(radius)

    def _worst(self, utilities: Tensor, shares: Tensor) -> Tensor:
        there = shares > 0
        lowest = torch.where(there, utilities, torch.inf).amin(-1, keepdim=True)
        above = torch.where(there, utilities - lowest, 0.0)
        spread = above.amax(-1, keepdim=True)
        on_lowest = torch.where(there & (above == 0), shares, 0.0)
        corner = on_lowest / on_lowest.sum(-1, keepdim=True)
        if self.radius == 0:
            return shares.clone()
        # In units of the spread; a spread of 0 leaves every weighting alike, and the shares are one.
        unit = torch.where(spread > 0, spread, 1.0)
        inside = self._bisect(lambda t: self._tilt(above / unit, shares, t), shares)
        reached = self._divergence(corner, shares) <= self.radius
        return torch.where(spread == 0, shares, torch.where(reached, corner, inside))

    def _bisect(self, weights_at: Callable[[Tensor], Tensor], shares: Tensor) -> Tensor:
        """The weights on the ball's surface: the divergence falls as the parameter grows."""
        like = shares[..., :1]
        low = torch.full_like(like, -40.0)
        high = torch.full_like(like, 3.0 - 0.5 * torch.tensor(min(self.radius, 1.0)).double().log().item())
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            outside = self._divergence(weights_at(middle.exp()), shares) > self.radius
            low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
        return weights_at(high.exp())

    @abstractmethod
    def _tilt(self, above: Tensor, shares: Tensor, parameter: Tensor) -> Tensor:
        """The weights ``[..., K]`` of a dual parameter ``[..., 1]``, for utilities above the lowest."""

    @abstractmethod
    def _divergence(self, weights: Tensor, shares: Tensor) -> Tensor:
        """Compute how far the weights are from the shares ``[..., 1]``."""


class KLBall(_Ball):
    """The worst mean over weights with ``KL(w || p) <= radius``.

    The weights are ``p exp(-u / T)``, normalised, as those of :class:`SoftMin`; here the temperature T
    follows from the radius (it is the multiplier of the constraint).

    Args:
        radius: in nats.
        shares: the groups' shares ``[K]``; None for equal ones.

    Raises:
        ValueError: if the radius is negative, or ``shares`` no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import KLBall
        >>> utilities = torch.tensor([1.0, 0.0])
        >>> KLBall(0.0, [0.9, 0.1])(utilities), KLBall(10.0, [0.9, 0.1])(utilities)
        (tensor(0.9000), tensor(0.))
    """

    def _tilt(self, above: Tensor, shares: Tensor, parameter: Tensor) -> Tensor:
        return (shares.log() - above / parameter).softmax(-1)

    def _divergence(self, weights: Tensor, shares: Tensor) -> Tensor:
        log_ratio = torch.where(weights > 0, weights, 1.0).log() - torch.where(weights > 0, shares, 1.0).log()
        return (weights * log_ratio).sum(-1, keepdim=True)


class Chi2Ball(_Ball):
    """The worst mean over weights with ``sum_k (w_k - p_k)^2 / p_k <= radius``.

    The weights are ``p (eta - u)_+``, normalised; eta follows from the radius. For a small radius the
    value is the mean less ``sqrt(radius * variance)`` (Duchi & Namkoong, arXiv 1610.02581).

    Args:
        radius: of the chi-square divergence.
        shares: the groups' shares ``[K]``; None for equal ones.

    Raises:
        ValueError: if the radius is negative, or ``shares`` no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Chi2Ball
        >>> Chi2Ball(0.01)(torch.tensor([1.0, 0.0]))  # 1/2 - sqrt(.01 / 4)
        tensor(0.4500)
    """

    def _tilt(self, above: Tensor, shares: Tensor, parameter: Tensor) -> Tensor:
        weights = shares * (parameter - above).clamp_min(0)
        return weights / weights.sum(-1, keepdim=True)

    def _divergence(self, weights: Tensor, shares: Tensor) -> Tensor:
        there = shares > 0
        terms = torch.where(there, weights - shares, 0.0).square() / torch.where(there, shares, 1.0)
        return terms.sum(-1, keepdim=True)


class CVaR(RobustWelfare):
    """The mean utility of the worst ``level`` of the population (conditional value at risk).

    ``min_w sum_k w_k u_k`` over ``0 <= w_k <= p_k / level``: level 1 is the mean, and a level that is
    no larger than the worst group's share is the minimum (Rockafellar & Uryasev, 2000). Equal groups get
    weight in proportion to their shares.

    Args:
        level: in (0, 1].
        shares: the groups' shares ``[K]``; None for equal ones.

    Raises:
        ValueError: if the level is not in (0, 1], or ``shares`` no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import CVaR
        >>> CVaR(0.5, [0.75, 0.25])(torch.tensor([1.0, 0.0]))
        tensor(0.5000)
    """

    def __init__(self, level: float, shares: Tensor | Sequence[float] | None = None) -> None:
        super().__init__(shares)
        if not 0 < level <= 1:
            raise ValueError(f"level must be in (0, 1], got {level}.")
        self.level = float(level)

    def _worst(self, utilities: Tensor, shares: Tensor) -> Tensor:
        # How much of the population is worse off than each group, and as badly off: equal groups share
        # what is left of the level between them, in proportion to their shares.
        worse = utilities.unsqueeze(-2) < utilities.unsqueeze(-1)
        alike = utilities.unsqueeze(-2) == utilities.unsqueeze(-1)
        before = (worse * shares.unsqueeze(-2)).sum(-1)
        size = (alike * shares.unsqueeze(-2)).sum(-1)
        part = (self.level - before).clamp_min(0).minimum(size) / torch.where(size > 0, size, 1.0)
        taken = shares * part
        return taken / taken.sum(-1, keepdim=True)
