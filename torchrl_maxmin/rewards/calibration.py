"""Calibrations: conventions that put the rewards of all groups on one scale before a minimum compares them.

A Bradley-Terry likelihood fixes a reward only up to an offset of its own for every prompt, and its scale by
the label noise. A minimum over heads compares what the likelihood leaves open, so a convention has to be
chosen, named and kept; and a mean over prompts holds the mean of their offsets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrl_maxmin.core.errors import UserError

CALIBRATIONS = ("sft_std", "sft_mean", "win_rate", "none")

#: Offsets that add more than this share to the variance of two groups' difference are taken off by prompt.
LARGEST_OFFSET_VARIANCE = 0.25
#: A head whose rewards differ by less than so many roundings within a prompt is constant.
ROUNDINGS = 16


def mean_of_present(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the mean of what is there: NaN stands for no value."""
    return values.nanmean(dim) if bool(values.isnan().any()) else values.mean(dim)


def _within_prompt_variance(rewards: Tensor) -> Tensor:
    """Variance [X, K] over the samples that have a reward; NaN with fewer than two."""
    if not bool(rewards.isnan().any()):
        return rewards.var(1)
    squares = (rewards - rewards.nanmean(1, keepdim=True)).square().nansum(1)
    freedom = (~rewards.isnan()).sum(1) - 1
    return torch.where(freedom > 0, squares / freedom, torch.nan)


def _offset_variance(rewards: Tensor, within: Tensor) -> Tensor:
    """Variance [K] of the prompts' offsets: that of their means, less what few samples add; at least 0."""
    means, counts = rewards.nanmean(1), (~rewards.isnan()).sum(1)
    present = counts > 0
    spread = (means - means.nanmean(0)).square().nansum(0) / (present.sum(0) - 1)
    noise = within * torch.where(present, 1 / counts, torch.nan).nanmean(0)
    return (spread - noise).clamp_min(0).nan_to_num(0.0)  # one prompt shows no spread


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
        the Bradley-Terry probability of beating a reference sample of the same prompt (:meth:`apply`), in
        [0, 1]: what Nash and alpha-fair welfare need.
    ``none``
        raw rewards.

    Offsets by prompt stay in what ``sft_std`` and ``sft_mean`` give, and a mean over few prompts holds their
    mean. :attr:`by_prompt` says whether they are large enough to take each prompt's own :meth:`baseline` off.

    Attributes:
        method: one of the names above.
        shift: [K] fp32.
        scale: [K] fp32, positive.
        reference: raw rewards [M, K] of reference samples, for ``win_rate`` only.
        within_deviation: standard deviation [K] of raw rewards within a prompt; None with one sample each.
        offset_deviation: standard deviation [K] of the prompts' offsets, raw; None likewise.

    Example:
        >>> rewards = torch.tensor([[[1.0, 10.0], [3.0, 30.0]], [[2.0, 20.0], [4.0, 40.0]]])
        >>> Calibration.fit(rewards).apply(rewards).mean((0, 1))
        tensor([0., 0.])
    """

    method: str
    shift: Tensor
    scale: Tensor
    reference: Tensor | None = None
    within_deviation: Tensor | None = None
    offset_deviation: Tensor | None = None

    @classmethod
    def identity(cls, num_groups: int) -> Calibration:
        """Raw rewards, unchanged."""
        return cls("none", torch.zeros(num_groups), torch.ones(num_groups))

    @classmethod
    def fit(
        cls, rewards: Tensor, method: str = "sft_std", *, dtype: torch.dtype | None = None
    ) -> Calibration:
        """Fit a convention on rewards of reference samples.

        Args:
            rewards: raw rewards [X, n, K] of n samples of the reference policy for each of X prompts; NaN
                where a sample has none, which then counts nowhere.
            method: see the class.
            dtype: what the rewards were computed in, whose rounding is no spread; their own when None.

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
            shift = torch.zeros(groups)
        spread: dict[str, Tensor] = {}
        if rewards.shape[1] > 1:
            variance = mean_of_present(_within_prompt_variance(wide), 0)
            offsets = _offset_variance(wide, variance)
            spread = {"within_deviation": variance.sqrt(), "offset_deviation": offsets.sqrt()}
        if method == "sft_std":
            if not spread:
                raise UserError("calibration sft_std needs two or more reference samples a prompt")
            scale = spread["within_deviation"]
            if bool(scale.isnan().any()):
                raise UserError(
                    f"no prompt has two reference samples with a reward for group(s) {_places(scale.isnan())}"
                )
            largest = wide.abs().nan_to_num(0.0).amax((0, 1))
            flat = scale <= ROUNDINGS * torch.finfo(dtype or rewards.dtype).eps * (1 + largest)
            if bool(flat.any()):
                raise UserError(
                    f"reward head(s) {_places(flat)} give every reference sample of a prompt the same "
                    "reward, so they have no scale; train them longer, or use --calibration sft_mean"
                )
        reference = rewards.reshape(-1, groups).float() if method == "win_rate" else None
        spread = {name: value.nan_to_num(0.0).float() for name, value in spread.items()}
        return cls(method, shift.float(), scale.float(), reference, **spread)

    @property
    def by_prompt(self) -> bool:
        """Whether rewards are to be compared with reference samples of their own prompt.

        ``win_rate`` always is. The others are where the offsets of some two groups would add over a quarter
        to the variance of the difference of their mean rewards; below that, a mean over a batch of prompts
        hardly holds them, and samples for every prompt would cost more than they mend.
        """
        if self.method == "win_rate":
            return True
        if self.method == "none" or self.offset_deviation is None or self.within_deviation is None:
            return False
        ratios = (self.offset_deviation / self.within_deviation).square().nan_to_num(0.0, posinf=torch.inf)
        return len(ratios) > 1 and bool(ratios.topk(2).values.mean() > LARGEST_OFFSET_VARIANCE)

    def apply(self, rewards: Tensor, samples: Tensor | None = None) -> Tensor:
        """Calibrate raw rewards.

        Args:
            rewards: [..., K].
            samples: raw rewards [..., n, K] of reference samples of each reward's prompt. Without them
                ``win_rate`` compares with reference samples of all prompts, which offsets by prompt move.

        Returns:
            [..., K] fp32; less the prompt's :meth:`baseline` where samples are given.
        """
        if self.method == "win_rate":
            against = self.reference if samples is None else samples
            assert against is not None
            gaps = rewards.float().unsqueeze(-2) - against.to(rewards.device)
            return torch.where(rewards.isnan(), torch.nan, mean_of_present(torch.sigmoid(gaps), -2))
        calibrated = (rewards.float() - self.shift.to(rewards.device)) / self.scale.to(rewards.device)
        return calibrated if samples is None else calibrated - self.baseline(samples)

    def baseline(self, samples: Tensor, *, shrink: bool = True) -> Tensor:
        """Estimate each prompt's offset from its own reference samples, in calibrated units.

        The mean of n samples holds noise of its own, a variance of ``within^2 / n``. It counts by its
        reliability ``offset^2 / (offset^2 + within^2 / n)``, the empirical Bayes shrinkage (James and Stein)
        towards the mean of all prompts, so that where there are no offsets nothing is added.

        Args:
            samples: raw rewards [..., n, K]; NaN where there is none.
            shrink: False takes the mean as it is.

        Returns:
            [..., K] fp32; zeros where nothing is known of the offsets, and for ``none``.

        Raises:
            ValueError: for ``win_rate``, which has no shift.
        """
        if self.method == "win_rate":
            raise ValueError("a win rate is a comparison with the samples themselves, and has no baseline")
        means = mean_of_present(self.apply(samples), -2)
        if not shrink:
            return means
        if self.method == "none" or self.offset_deviation is None or self.within_deviation is None:
            return torch.zeros_like(means)
        counts = (~samples.isnan()).sum(-2)
        offset, within = (
            deviation.to(samples.device).square()
            for deviation in (self.offset_deviation, self.within_deviation)
        )
        # Without samples nothing is known of an offset: the mean of all prompts, 0.
        reliability = torch.where(counts * offset > 0, counts * offset / (counts * offset + within), 0.0)
        return means.nan_to_num(0.0) * reliability

    def wrong_worst_group(
        self, utilities: Tensor, num_prompts: int, num_samples: int | None = None, draws: int = 100_000
    ) -> float | None:
        """Estimate how often offsets alone make a mean over prompts name another worst group.

        Offsets are taken as normal, and independent between groups.

        Args:
            utilities: calibrated mean rewards [K], taken for the truth.
            num_prompts: prompts of the mean.
            num_samples: reference samples a prompt whose :meth:`baseline` is taken off; None for none.
            draws: of the offsets, by a generator of their own.

        Returns:
            A probability, 0 for ``win_rate`` and for one group; None with one sample a prompt.
        """
        if self.method == "win_rate" or len(utilities) == 1:
            return 0.0
        if self.offset_deviation is None or self.within_deviation is None:
            return None
        variance, within = self.offset_deviation.double().square(), self.within_deviation.double().square()
        if num_samples is not None:  # what the shrunk mean leaves
            noise = within / num_samples
            variance = torch.where(variance > 0, variance * noise / (variance + noise), 0.0)
        deviation = (variance / num_prompts).sqrt() / self.scale
        noise = torch.randn(draws, len(utilities), generator=torch.Generator().manual_seed(0))
        named = (utilities.double() + deviation * noise).argmin(-1)
        return float((named != utilities.argmin()).double().mean())

    def permute(self, order: Tensor) -> Calibration:
        """Put group ``order[k]`` at k."""
        moved = {k: v[..., order] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for json."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Calibration:
        """Rebuild what :meth:`to_dict` gave."""
        return cls(**{k: torch.tensor(v) if isinstance(v, list) else v for k, v in state.items()})
