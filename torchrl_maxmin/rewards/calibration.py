"""Reward heads on one scale, before any minimum is taken over them.

A Bradley-Terry likelihood fixes a reward only up to an offset for every prompt, and its
scale by the label noise. A minimum over heads compares what the likelihood leaves open, so
a convention has to be chosen, named and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError

__all__ = ["CALIBRATIONS", "Calibration", "mean_of_present"]

CALIBRATIONS = ("sft_std", "sft_mean", "win_rate", "none")


def mean_of_present(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the mean of what is there: NaN stands for no value."""
    return values.nanmean(dim) if bool(values.isnan().any()) else values.mean(dim)


def _within_prompt_variance(rewards: Tensor) -> Tensor:
    """Variance [X, K] over the samples that have a reward; NaN with fewer than two."""
    absent = rewards.isnan()
    if not bool(absent.any()):
        return rewards.var(1)
    squares = (rewards - rewards.nanmean(1, keepdim=True)).square().nansum(1)
    freedom = (~absent).sum(1) - 1
    return torch.where(freedom > 0, squares / freedom, torch.nan)


def _places(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


@dataclass(frozen=True)
class Calibration:
    """Shift and scale of every head: calibrated = (raw - shift) / scale.

    ``sft_std``
        zero mean over samples of the reference policy, unit *within-prompt* standard
        deviation. A constant added to a head changes nothing; an offset of its own for
        every prompt leaves the scale as it is (the pooled deviation would not).
    ``sft_mean``
        zero mean, the head's own scale.
    ``win_rate``
        the Bradley-Terry probability of beating a reference sample (:meth:`apply`), in
        [0, 1]: what Nash and alpha-fair welfare need.
    ``none``
        raw rewards.

    Attributes:
        method: one of the names above.
        shift: [K] fp32.
        scale: [K] fp32, positive.
        reference: raw rewards [M, K] of reference samples, for ``win_rate`` only.

    Example:
        >>> rewards = torch.tensor([[[1.0, 10.0], [3.0, 30.0]], [[2.0, 20.0], [4.0, 40.0]]])
        >>> Calibration.fit(rewards).apply(rewards).mean((0, 1))
        tensor([0., 0.])
    """

    method: str
    shift: Tensor
    scale: Tensor
    reference: Tensor | None = None

    @classmethod
    def identity(cls, num_groups: int) -> Calibration:
        """Raw rewards, unchanged."""
        return cls("none", torch.zeros(num_groups), torch.ones(num_groups))

    @classmethod
    def fit(cls, rewards: Tensor, method: str = "sft_std") -> Calibration:
        """Fit a convention on rewards of reference samples.

        Args:
            rewards: raw rewards [X, n, K] of n samples of the reference policy for each of X prompts; NaN
                where a sample has none, which then counts nowhere.
            method: see the class.

        Raises:
            UserError: for an unknown method, a group without any reward, fewer than two samples a
                prompt where the within-prompt deviation is needed, or a head that is constant.
        """
        if method not in CALIBRATIONS:
            raise UserError(f"unknown calibration {method!r}; choose one of {', '.join(CALIBRATIONS)}")
        wide = rewards.double()
        groups = rewards.shape[-1]
        shift, scale = mean_of_present(wide, (0, 1)), torch.ones(groups, dtype=torch.float64)
        if bool(shift.isnan().any()):
            raise UserError(
                f"no reference sample has a reward for group(s) {_places(shift.isnan())}; mend its reward "
                "function, or raise --calibration_prompts"
            )
        if method == "none":
            return cls.identity(groups)
        if method == "sft_std":
            if rewards.shape[1] < 2:
                raise UserError("calibration sft_std needs two or more reference samples a prompt")
            scale = mean_of_present(_within_prompt_variance(wide), 0).sqrt()
            if bool(scale.isnan().any()):
                raise UserError(
                    f"no prompt has two reference samples with a reward for group(s) {_places(scale.isnan())}"
                )
            flat = scale <= 1e-8 * (1 + shift.abs())
            if bool(flat.any()):
                raise UserError(
                    f"reward head(s) {_places(flat)} give every reference sample of a prompt the same "
                    "reward, so they have no scale; train them longer, or use --calibration sft_mean"
                )
        reference = rewards.reshape(-1, groups).float() if method == "win_rate" else None
        return cls(method, shift.float(), scale.float(), reference)

    def apply(self, rewards: Tensor) -> Tensor:
        """Calibrate raw rewards [..., K]; same shape, fp32."""
        if self.reference is not None:
            gaps = rewards.float().unsqueeze(-2) - self.reference.to(rewards.device)
            return torch.where(rewards.isnan(), torch.nan, mean_of_present(torch.sigmoid(gaps), -2))
        return (rewards.float() - self.shift.to(rewards.device)) / self.scale.to(rewards.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return {
            "method": self.method,
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "reference": None if self.reference is None else self.reference.tolist(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Calibration:
        """Rebuild what :meth:`to_dict` gave."""
        reference = state["reference"]
        return cls(
            state["method"],
            torch.tensor(state["shift"]),
            torch.tensor(state["scale"]),
            None if reference is None else torch.tensor(reference),
        )
