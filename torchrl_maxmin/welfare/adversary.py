"""Share what every adversary has: its state, its options, and how they change what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.welfare.functions import check_utilities

__all__ = ["OPTIONS", "Adversary"]

OPTIONS = ("step_decay", "optimistic", "ema")
"""The keyword arguments that every adversary takes."""


class Adversary(nn.Module, ABC):
    """The base class: ``weights`` ``[K]`` now, ``update(utilities [K]) -> weights [K]``.

    Subclasses write ``_step``, register what they remember as buffers, and offer ``weights``.
    ``average_weights`` ``[K]`` is the mean of the weights after every update: in a game without
    curvature the average converges where the last iterate cycles.

    Args:
        num_groups: K, the number of groups.

    Keyword Args:
        step_decay: the t-th step is divided by ``sqrt(1 + step_decay * t)``; an adversary that answers
            with new weights at once (:class:`HardMin`, :class:`WelfareAdversary`) goes that share of the
            way to them. Defaults to 0, no decay.
        optimistic: move on ``2 u_t - u_(t-1)``, a guess of the utilities to come, which turns the
            cycles of a bilinear game into a spiral to its solution (Rakhlin & Sridharan, 2013).
        ema: share of the past in an exponential average of the utilities. Defaults to 0, none: on the
            learned policies that were tried the delay hurts more than the noise.

    Raises:
        ValueError: if ``num_groups`` is not positive or an option out of range.
    """

    _version = 2  # 2: counts its updates and averages its weights
    _shown: tuple[str, ...] = ()  # settings that are worth showing

    weights: Tensor
    average_weights: Tensor
    num_updates: Tensor
    last_utilities: Tensor
    smoothed_utilities: Tensor

    def __init__(
        self, num_groups: int, *, step_decay: float = 0.0, optimistic: bool = False, ema: float = 0.0
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}.")
        if not step_decay >= 0:
            raise ValueError(f"step_decay must not be negative, got {step_decay}.")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {ema}.")
        self.num_groups = int(num_groups)
        self.step_decay, self.optimistic, self.ema = float(step_decay), bool(optimistic), float(ema)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average_weights", torch.full((num_groups,), 1.0 / num_groups))
        self.register_buffer("last_utilities", torch.zeros(num_groups, dtype=torch.float64))
        self.register_buffer("smoothed_utilities", torch.zeros(num_groups, dtype=torch.float64))

    @torch.no_grad()
    def update(self, utilities: Tensor) -> Tensor:
        """Move against the utilities and return the new weights.

        Args:
            utilities: float tensor ``[K]``, the policy's current utility for each group.

        Returns:
            The weights ``[K]``, a copy that later updates leave alone.

        Raises:
            ValueError: if ``utilities`` is not ``[K]`` or holds NaN or infinite values.
        """
        if utilities.ndim != 1:
            raise ValueError(
                f"An adversary takes population utilities of shape [{self.num_groups}], got "
                f"{tuple(utilities.shape)}: average over samples first."
            )
        self._step(self._seen(check_utilities(utilities, self.num_groups)))
        self.num_updates += 1
        self.average_weights += (self.weights - self.average_weights) / self.num_updates
        return self.weights.clone()

    def _seen(self, utilities: Tensor) -> Tensor:
        """The utilities that the step moves on: smoothed and extrapolated as the options say."""
        first = int(self.num_updates) == 0
        if self.ema:
            new = utilities.to(self.smoothed_utilities)
            self.smoothed_utilities.lerp_(new, 1.0 if first else 1.0 - self.ema)
            utilities = self.smoothed_utilities.clone()
        if self.optimistic:
            now = utilities.to(self.last_utilities)
            utilities = now if first else 2 * now - self.last_utilities
            self.last_utilities.copy_(now)
        return utilities

    def _decay(self) -> float:
        """Factor of the next step."""
        return (1.0 + self.step_decay * int(self.num_updates)) ** -0.5

    forward = update

    @abstractmethod
    def _step(self, utilities: Tensor) -> None:
        """Move the state, given checked utilities ``[K]``."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Load; a state from before there were counts and averages starts them anew."""
        if (local_metadata.get("version") or 1) < 2:
            for name in ("num_updates", "average_weights", "last_utilities", "smoothed_utilities"):
                state_dict.setdefault(prefix + name, getattr(self, name).clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        """The settings, for ``print``; options only where they are on."""
        names = ["num_groups", *self._shown, *(name for name in OPTIONS if getattr(self, name))]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
