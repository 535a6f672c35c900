"""Adversaries: who moves the group weights against the policy.

In ``max_pi min_w sum_k w_k u_k(pi)`` the policy plays against a weight vector on the simplex. An
adversary sees the current group utilities once an iteration and answers with the weights under which
the policy trains next. It keeps its state in buffers, so ``state_dict`` resumes a run exactly. In a
distributed run, average the utilities over the ranks *before* calling :meth:`Adversary.update`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.welfare.adversary import OPTIONS, Adversary
from torchrl_maxmin.welfare.functions import Welfare, check_simplex
from torchrl_maxmin.welfare.names import make_welfare

__all__ = [
    "ADVERSARIES",
    "Adversary",
    "EntropyRegularized",
    "ExponentiatedGradient",
    "FixedWeights",
    "HardMin",
    "ProjectedGradient",
    "WelfareAdversary",
    "make_adversary",
    "project_to_simplex",
]


class HardMin(Adversary):
    """All weight on the group that is worst off: the paper's argmin (Algorithm 1, arXiv 2402.08925).

    Ties go to the lowest index. Before the first update the weights are equal. Near the optimum the
    chosen group alternates, and the utilities oscillate with an amplitude set by the policy's step.

    Args:
        num_groups: K.
        **options: see :class:`Adversary`.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import HardMin
        >>> HardMin(3).update(torch.tensor([0.4, 0.1, 0.1]))
        tensor([0., 1., 0.])
    """

    def __init__(self, num_groups: int, **options: Any) -> None:
        super().__init__(num_groups, **options)
        self.register_buffer("weights", torch.full((num_groups,), 1.0 / num_groups))

    def _step(self, utilities: Tensor) -> None:
        answer = torch.zeros_like(self.weights)
        answer[utilities.argmin()] = 1.0
        self.weights.lerp_(answer, self._decay())


class _LogSpaceAdversary(Adversary):
    """Multiplicative updates, held as normalised logarithms so that no weight is ever lost to underflow."""

    log_weights: Tensor

    def __init__(self, num_groups: int, scale: float, **options: Any) -> None:
        super().__init__(num_groups, **options)
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}.")
        self.scale = float(scale)
        self.register_buffer("log_weights", torch.zeros(num_groups).log_softmax(-1))

    @property
    def weights(self) -> Tensor:  # type: ignore[override]
        """The current weights ``[K]``."""
        return self.log_weights.exp()

    def _multiply(self, keep: float, step_size: float, utilities: Tensor) -> None:
        # Centred first: the shift cancels in the softmax, and large utilities keep their differences.
        utilities = utilities.to(self.log_weights.device, torch.float64)
        step = step_size * (utilities - utilities.min()) / self.scale
        log_weights = (keep * self.log_weights.to(torch.float64) - step).log_softmax(-1)
        self.log_weights.copy_(log_weights)


class ExponentiatedGradient(_LogSpaceAdversary):
    """Plain mirror descent on the simplex: ``w <- w * exp(-step_size * u / scale)``, normalised.

    Converges with a KL-regularised policy and exact gradients; without the KL term the last iterate
    cycles (use :class:`EntropyRegularized`, or average the iterates).

    Args:
        num_groups: K.
        step_size: the step on utilities divided by ``scale``; at least 0.
        scale: the utilities' scale, for instance their standard deviation under the reference policy.
        **options: see :class:`Adversary`.

    Raises:
        ValueError: if ``step_size`` is negative or ``scale`` not positive.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import ExponentiatedGradient
        >>> ExponentiatedGradient(2, step_size=1.0).update(torch.tensor([0.0, 0.0]))
        tensor([0.5000, 0.5000])
    """

    _shown = ("step_size", "scale")

    def __init__(self, num_groups: int, step_size: float, scale: float = 1.0, **options: Any) -> None:
        super().__init__(num_groups, scale, **options)
        if not step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {step_size}.")
        self.step_size = float(step_size)

    def _step(self, utilities: Tensor) -> None:
        self._multiply(1.0, self._decay() * self.step_size, utilities)


class ProjectedGradient(Adversary):
    """Gradient descent on the weights, projected onto the simplex: ``w <- proj(w - step_size * u / scale)``.

    Unlike the multiplicative adversaries it gives a group weight 0, and takes it back at once.

    Args:
        num_groups: K.
        step_size: the step on utilities divided by ``scale``; at least 0.
        scale: the utilities' scale.
        **options: see :class:`Adversary`.

    Raises:
        ValueError: if ``step_size`` is negative or ``scale`` not positive.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import ProjectedGradient
        >>> ProjectedGradient(2, step_size=1.0).update(torch.tensor([0.5, 0.0]))
        tensor([0.2500, 0.7500])
    """

    _shown = ("step_size", "scale")

    def __init__(self, num_groups: int, step_size: float, scale: float = 1.0, **options: Any) -> None:
        super().__init__(num_groups, **options)
        if not step_size >= 0:
            raise ValueError(f"step_size must not be negative, got {step_size}.")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}.")
        self.step_size, self.scale = float(step_size), float(scale)
        self.register_buffer("weights", torch.full((num_groups,), 1.0 / num_groups))

    def _step(self, utilities: Tensor) -> None:
        values = utilities.to(self.weights.device, torch.float64)
        moved = self.weights.double() - self._decay() * self.step_size * (values - values.mean()) / self.scale
        self.weights.copy_(project_to_simplex(moved))


def project_to_simplex(point: Tensor) -> Tensor:
    """The nearest point ``[K]`` of the probability simplex (Duchi et al., 2008).

    Example:
        >>> import torch
        >>> project_to_simplex(torch.tensor([1.5, 0.0]))
        tensor([1., 0.])
    """
    ordered = point.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1.0) / torch.arange(1, len(point) + 1, device=point.device)
    support = int((ordered > excess).sum())
    return (point - excess[support - 1]).clamp_min(0)


class WelfareAdversary(Adversary):
    """The gradient of any welfare, as group weights: every welfare trains a policy.

    The gradient is divided by its sum, so that it can stand beside a KL penalty of weight 1; the
    direction, ``sum_k w_k (r_k - beta KL)``, is that of the welfare of the F_k. Where the welfare has a
    kink at the optimum (:class:`CVaR`, :class:`GeneralizedGini`) the weights jump as those of
    :class:`HardMin` do: ``step_decay`` calms them.

    Args:
        num_groups: K.
        welfare: the welfare that the policy climbs.
        **options: see :class:`Adversary`.

    Raises:
        ValueError: if the welfare is defined for some utilities alone and ``optimistic`` would leave them.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import Nash, WelfareAdversary
        >>> WelfareAdversary(2, Nash()).update(torch.tensor([0.75, 0.25]))
        tensor([0.2500, 0.7500])
    """

    _shown = ("welfare",)

    def __init__(self, num_groups: int, welfare: Welfare, **options: Any) -> None:
        super().__init__(num_groups, **options)
        if self.optimistic and not welfare.everywhere:
            raise ValueError(
                f"optimistic extrapolates the utilities, which may leave where {type(welfare).__name__} is "
                "defined: leave it off, or use step_decay."
            )
        self.welfare = welfare
        self.register_buffer("weights", torch.full((num_groups,), 1.0 / num_groups))

    def _step(self, utilities: Tensor) -> None:
        values = utilities.to(self.weights.device, torch.float64)
        self.weights.lerp_(self.welfare.normalized_weights(values).to(self.weights), self._decay())


class EntropyRegularized(_LogSpaceAdversary):
    """Entropy-regularised mirror descent: ``w`` proportional to ``w^(1 - eta tau) exp(-eta u / scale)``.

    The adversary minimises ``sum_k w_k u_k / scale - tau * entropy(w)``. Its fixed point is
    ``softmin(u / (tau * scale))``, under which the policy is within ``tau * scale * log K`` of the
    max-min. State ``tau`` and ``scale`` beside every result.

    Args:
        num_groups: K.
        tau: the entropy weight, in units of ``scale``; .03 to .1 is usual.
        eta_tau: the step ``eta`` times ``tau``, in (0, 1]; 1 forgets the past and answers with the
            fixed point at once.
        scale: the utilities' scale, for instance their standard deviation under the reference policy.
        **options: see :class:`Adversary`.

    Raises:
        ValueError: if ``tau`` or ``scale`` is not positive or ``eta_tau`` not in (0, 1].

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import EntropyRegularized
        >>> adversary = EntropyRegularized(2, tau=0.1)
        >>> for _ in range(60):
        ...     weights = adversary.update(torch.tensor([0.0, 0.1]))
        >>> torch.testing.assert_close(weights, torch.tensor([0.0, -1.0]).softmax(-1))
    """

    _shown = ("tau", "eta_tau", "scale")

    def __init__(
        self,
        num_groups: int,
        tau: float = 0.05,
        eta_tau: float = 0.5,
        scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(num_groups, scale, **options)
        if not tau > 0:
            raise ValueError(f"tau must be positive, got {tau}; tau = 0 is ExponentiatedGradient.")
        if not 0 < eta_tau <= 1:
            raise ValueError(f"eta_tau must be in (0, 1], got {eta_tau}.")
        self.tau, self.eta_tau = float(tau), float(eta_tau)

    @property
    def bias(self) -> float:
        """How far the fixed point may be from the max-min: ``tau * scale * log K``."""
        return self.tau * self.scale * float(torch.tensor(float(self.num_groups)).log())

    def _step(self, utilities: Tensor) -> None:
        eta_tau = self._decay() * self.eta_tau
        self._multiply(1.0 - eta_tau, eta_tau / self.tau, utilities)


class FixedWeights(Adversary):
    """Weights that never move: one reward (``[1.0]``), or the utilitarian mean (population shares).

    Args:
        weights: the weights ``[K]``, summing to 1.

    Raises:
        ValueError: if ``weights`` is no point of the simplex.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import FixedWeights
        >>> FixedWeights([0.75, 0.25]).update(torch.tensor([5.0, -5.0]))
        tensor([0.7500, 0.2500])
    """

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        point = check_simplex(weights, "weights")
        super().__init__(point.numel())
        self.register_buffer("weights", point.to(torch.float32))

    def _step(self, utilities: Tensor) -> None:
        """Stay."""


def _fixed(num_groups: int, weights: Tensor | Sequence[float] | None = None) -> FixedWeights:
    point = torch.full((num_groups,), 1.0 / num_groups) if weights is None else torch.as_tensor(weights)
    if point.numel() != num_groups:
        raise ValueError(f"{point.numel()} fixed weights were given for {num_groups} groups.")
    return FixedWeights(point)


def _of_welfare(num_groups: int, welfare: Welfare | str, **settings: Any) -> WelfareAdversary:
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    return WelfareAdversary(num_groups, make_welfare(welfare, **settings), **options)


ADVERSARIES: dict[str, Callable[..., Adversary]] = {
    "entropy_regularized": EntropyRegularized,
    "exponentiated_gradient": ExponentiatedGradient,
    "hard_min": HardMin,
    "projected_gradient": ProjectedGradient,
    "welfare": _of_welfare,
    "fixed": _fixed,
}
"""The names that :func:`make_adversary` knows."""


def make_adversary(name: str, num_groups: int, **kwargs: Any) -> Adversary:
    """Build an adversary from its name.

    Args:
        name: one of ``entropy_regularized``, ``exponentiated_gradient``, ``projected_gradient``,
            ``hard_min``, ``welfare`` (``welfare=`` with the welfare, or with its name and beside it its
            settings) and ``fixed`` (``weights=`` with the shares; equal weights without).
        num_groups: K.
        **kwargs: the settings of that class.

    Raises:
        ValueError: if the name is unknown, or a setting is out of range.

    Example:
        >>> import torch
        >>> from torchrl_maxmin.welfare import make_adversary
        >>> make_adversary("entropy_regularized", 2, tau=0.1)
        EntropyRegularized(num_groups=2, tau=0.1, eta_tau=0.5, scale=1.0)
        >>> make_adversary("welfare", 2, welfare="cvar", level=0.5).update(torch.tensor([0.3, 0.1]))
        tensor([0., 1.])
    """
    if name not in ADVERSARIES:
        raise ValueError(f"Unknown adversary {name!r}. Known are: {', '.join(sorted(ADVERSARIES))}.")
    return ADVERSARIES[name](num_groups, **kwargs)
