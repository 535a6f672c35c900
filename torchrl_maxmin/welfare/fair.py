"""Welfares between the mean and the minimum that are no worst case over shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.welfare.functions import (
    LinearWelfare,
    Welfare,
    check_simplex,
    check_utilities,
    weights_like,
)

__all__ = ["AlphaFair", "GeneralizedGini", "Nash", "Regret"]


class AlphaFair(Welfare):
    """``sum_k p_k ((u_k - d_k)^(1 - a) - 1) / (1 - a)``, and ``sum_k p_k log(u_k - d_k)`` at ``a = 1``.

    a = 0 is the mean (less 1), 1 Nash, infinity the minimum (Mo & Walrand, 2000). Utilities must lie
    above the disagreement point d: take rewards as win rates (``--calibration win_rate``), or give one.

    Args:
        alpha: a, at least 0 and finite.
        shares: the groups' shares ``p`` ``[K]``; None for equal ones.
        disagreement: d ``[K]`` or a number, what a group has if nothing is agreed. Defaults to 0.

    Raises:
        ValueError: if alpha is negative or infinite, ``shares`` no point of the simplex, or, when it is
            called, a utility not above the disagreement point.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import AlphaFair
        >>> AlphaFair(2.0)(torch.tensor([1.0, 0.5]))
        tensor(-0.5000)
        >>> AlphaFair(2.0).weights(torch.tensor([1.0, 0.5]))
        tensor([0.5000, 2.0000])
    """

    def __init__(
        self,
        alpha: float,
        shares: Tensor | Sequence[float] | None = None,
        disagreement: Tensor | Sequence[float] | float = 0.0,
    ) -> None:
        if not 0 <= alpha < float("inf"):
            raise ValueError(
                f"alpha must be finite and not negative, got {alpha}; Egalitarian is its limit at infinity."
            )
        self.alpha = float(alpha)
        self.shares = None if shares is None else check_simplex(shares, "shares")
        self.disagreement = torch.as_tensor(disagreement, dtype=torch.float64)

    @property
    def everywhere(self) -> bool:
        """False: utilities must lie above the disagreement point."""
        return False

    def _surplus(self, utilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's gain above the disagreement point, and the shares, both ``[..., K]``."""
        shares = weights_like(self.shares, utilities)
        surplus = utilities - self.disagreement.to(utilities)
        if not bool((surplus > 0).all()):
            # which a policy may come to in the middle of a run
            raise UserError(
                f"{type(self).__name__} needs utilities above the disagreement point, got "
                f"{utilities.tolist()} for {self.disagreement.tolist()}: take win rates for rewards "
                "(--calibration win_rate), give a lower disagreement point, or take soft_min, which has none"
            )
        return surplus, shares

    def value(self, utilities: Tensor) -> Tensor:
        """The welfare ``[...]`` of ``[..., K]``."""
        surplus, shares = self._surplus(utilities)
        power = 1.0 - self.alpha
        # expm1 keeps the digits near a = 1, where the difference to 1 is small
        terms = surplus.log() if power == 0 else torch.expm1(power * surplus.log()) / power
        return (shares * terms).sum(-1)

    def weights(self, utilities: Tensor) -> Tensor:
        """``p (u - d)^-a``, ``[..., K]``: the gradient, which does not sum to 1."""
        surplus, shares = self._surplus(utilities)
        return shares * surplus.pow(-self.alpha)

    def normalized_weights(self, utilities: Tensor) -> Tensor:
        """``softmax(log p - a log(u - d))``, ``[..., K]``: finite where a large a overflows the gradient."""
        surplus, shares = self._surplus(utilities)
        return (shares.log() - self.alpha * surplus.log()).softmax(-1)


class Nash(AlphaFair):
    """The mean log utility above the disagreement point: the Nash product (Nash, 1950).

    Args:
        shares: the groups' shares ``[K]``; None for equal ones.
        disagreement: ``[K]`` or a number. Defaults to 0.

    Raises:
        ValueError: as :class:`AlphaFair`.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Nash
        >>> Nash().weights(torch.tensor([0.5, 0.25]))
        tensor([1., 2.])
    """

    def __init__(
        self,
        shares: Tensor | Sequence[float] | None = None,
        disagreement: Tensor | Sequence[float] | float = 0.0,
    ) -> None:
        super().__init__(1.0, shares, disagreement)


class GeneralizedGini(LinearWelfare):
    """``sum_i c_i u_(i)`` over utilities in ascending order, with coefficients that do not rise.

    Concave, indifferent to names, and it counts the worse off more (Weymark, 1981). Equal coefficients
    are the mean, ``(1, 0, ...)`` the minimum; where each is far above the next, welfares compare as
    leximin does (:meth:`leximin`).

    Args:
        weights: the coefficients c ``[K]``, summing to 1, none above the one before.

    Raises:
        ValueError: if they are no such coefficients.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import GeneralizedGini
        >>> GeneralizedGini([0.75, 0.25])(torch.tensor([1.0, 0.0]))
        tensor(0.2500)
    """

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        self.coefficients = check_simplex(weights, "weights")
        if bool((self.coefficients.diff() > 1e-12).any()):
            raise ValueError(
                f"The coefficients of a generalized Gini welfare must not rise, got "
                f"{self.coefficients.tolist()}: the first counts the worst off."
            )

    @classmethod
    def leximin(cls, num_groups: int, ratio: float = 1e-3) -> GeneralizedGini:
        """Coefficients that fall by ``ratio``, normalised: leximin as the ratio goes to 0."""
        powers = torch.full((num_groups,), float(ratio), dtype=torch.float64) ** torch.arange(num_groups)
        return cls(powers / powers.sum())

    def weights(self, utilities: Tensor) -> Tensor:
        """Each group's coefficient ``[..., K]``; of equal groups the first gets the larger."""
        coefficients = weights_like(self.coefficients, utilities)
        order = utilities.detach().argsort(dim=-1, stable=True)
        return torch.zeros_like(utilities).scatter_(-1, order, coefficients)


class Regret(Welfare):
    """Any welfare of each group's utility against the best that it could have alone: ``W(u - best)``.

    With :class:`Egalitarian` it is the negative of the largest regret, so the group that gives up most
    counts, not the one that has least.

    Args:
        welfare: of the differences.
        best: each group's own best utility ``[K]``, for instance ``solve_dual`` of its reward alone.

    Raises:
        ValueError: if ``best`` is not ``[K]`` or not finite.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Egalitarian, Regret
        >>> Regret(Egalitarian(), best=[2.0, 0.5])(torch.tensor([1.0, 0.0]))
        tensor(-1.)
    """

    def __init__(self, welfare: Welfare, best: Tensor | Sequence[float]) -> None:
        self.welfare = welfare
        self.best = torch.as_tensor(best, dtype=torch.float64)
        if self.best.ndim != 1 or not bool(self.best.isfinite().all()):
            raise ValueError(f"best must be one finite number per group, got {self.best.tolist()}.")

    @property
    def everywhere(self) -> bool:
        """Whether the welfare of the differences is."""
        return self.welfare.everywhere

    def _differences(self, utilities: Tensor) -> Tensor:
        check_utilities(utilities, self.best.numel())
        return utilities - self.best.to(utilities)

    def value(self, utilities: Tensor) -> Tensor:
        """The welfare of the differences ``[...]``."""
        return self.welfare.value(self._differences(utilities))

    def weights(self, utilities: Tensor) -> Tensor:
        """Its gradient ``[..., K]``."""
        return self.welfare.weights(self._differences(utilities))

    def normalized_weights(self, utilities: Tensor) -> Tensor:
        """Its gradient divided by its sum ``[..., K]``."""
        return self.welfare.normalized_weights(self._differences(utilities))
