"""TD(0), TD(1), TD(lambda) and V-trace for a vector reward: TorchRL's estimates, column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.value import (
    TD0Estimator,
    TD1Estimator,
    TDLambdaEstimator,
    ValueEstimatorBase,
    VTrace,
)
from torchrl.objectives.value.functional import vtrace_advantage_estimate

from torchrl_maxmin.masks import SHIFTED_VALID, expand_mask
from torchrl_maxmin.objectives.vector_estimator import Signals, VectorEstimator

__all__ = ["VectorTD0", "VectorTD1", "VectorTDLambda", "VectorVTrace"]


class _VectorTD(VectorEstimator):
    """Value targets by a TorchRL estimator of one reward."""

    average_rewards: bool
    _scalar: type[ValueEstimatorBase]

    def _estimate(self, signals: Signals) -> tuple[Tensor, Tensor]:
        if self.average_rewards and signals.mask is not None:
            raise ValueError(
                "average_rewards counts padding, and the data hold a mask: leave it out, and standardise the "
                "advantage instead (normalize_advantage=True of the loss)."
            )
        keys, targets = self.tensor_keys, []
        for k in range(signals.reward.shape[-1]):
            column = signals.data.copy()
            column.pop(SHIFTED_VALID, None)  # the signals know of it
            for name in ("reward", "done", "terminated"):
                column.set(("next", getattr(keys, name)), getattr(signals, name)[..., k : k + 1])
            target = self._scalar.value_estimate(
                self, column, next_value=signals.next_value[..., k : k + 1], time_dim=signals.time_dim
            )
            targets.append(target)
        value_target = torch.cat(targets, -1)
        return value_target - signals.value, value_target


class VectorTD0(_VectorTD, TD0Estimator):
    """One-step targets ``r + gamma V'`` of a K-column reward.

    Entries and ``mask_key`` as of :class:`~torchrl_maxmin.objectives.VectorGAE`, every column equal to
    TorchRL's estimate of it.

    Args:
        **kwargs: those of :class:`~torchrl.objectives.value.TD0Estimator`, and ``mask_key``.

    Raises:
        ValueError: as of :class:`~torchrl_maxmin.objectives.VectorGAE`; in the call, for ``average_rewards``
            of data with a mask.
    """

    _scalar = TD0Estimator


class VectorTD1(_VectorTD, TD1Estimator):
    """Monte-Carlo targets of a K-column reward; see :class:`VectorTD0`.

    Args:
        **kwargs: those of :class:`~torchrl.objectives.value.TD1Estimator`, and ``mask_key``.
    """

    _scalar = TD1Estimator


class VectorTDLambda(_VectorTD, TDLambdaEstimator):
    """Lambda returns of a K-column reward; see :class:`VectorTD0`.

    Args:
        **kwargs: those of :class:`~torchrl.objectives.value.TDLambdaEstimator`, and ``mask_key``.
    """

    _scalar = TDLambdaEstimator


class VectorVTrace(VectorEstimator, VTrace):
    """V-trace of a K-column reward (https://arxiv.org/abs/1802.01561), every column by the same ratios.

    The ratios are those of the actions in the data. TorchRL's own class takes the current policy's
    log-probability at an action that it draws anew (at the mode, inside a loss), so its module differs; the
    function under it, :func:`~torchrl.objectives.value.functional.vtrace_advantage_estimate`, is the same.

    Args:
        log_ratio: gives ``log pi - log mu`` of the actions ``[*B, T, 1]`` from data and the shape
            ``[*B, T]``; a loss gives its own.
        **kwargs: those of :class:`~torchrl.objectives.value.VTrace` but the actor, and ``mask_key``.
    """

    def __init__(self, *, log_ratio: Callable[[TensorDictBase, torch.Size], Tensor], **kwargs: Any) -> None:
        super().__init__(actor_network=None, **kwargs)
        self.log_ratio = log_ratio

    @property
    def _standardises(self) -> bool:
        return self.average_adv

    def _estimate(self, signals: Signals) -> tuple[Tensor, Tensor]:
        data, reward, value, next_value, done, terminated, mask, time_dim = signals
        gamma = self.gamma.to(reward.device)
        steps = data.get(self.tensor_keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma ** steps.reshape(*reward.shape[:-1], 1)
        with torch.no_grad():
            log_ratio = self.log_ratio(data, reward.shape[:-1])
        if mask is not None:
            log_ratio = torch.where(expand_mask(mask, log_ratio), log_ratio, 0.0)
        columns = [
            vtrace_advantage_estimate(
                gamma,
                log_ratio,
                torch.zeros_like(log_ratio),
                *(x[..., k : k + 1] for x in (value, next_value, reward, done, terminated)),
                rho_thresh=self.rho_thresh,
                c_thresh=self.c_thresh,
                time_dim=time_dim,
            )
            for k in range(reward.shape[-1])
        ]
        advantage, value_target = (torch.cat(parts, -1) for parts in zip(*columns, strict=True))
        return advantage, value_target
