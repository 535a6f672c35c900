"""The critic's side of a PPO loss whose values have one column per group."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ValueNorm
from torchrl.objectives.utils import _clip_value_loss, distance_loss

from torchrl_maxmin.masks import fill_masked, validity_mask
from torchrl_maxmin.objectives.masked import masked_explained_variance, masked_mean

__all__ = ["VectorCriticMixin"]


class VectorCriticMixin:
    """A masked critic loss with a column, and if wanted a scale, for every group.

    To be put before :class:`~torchrl.objectives.PPOLoss` among the bases; the class offers ``_mask``.
    """

    critic_network: Any
    critic_network_params: Any
    functional: bool
    tensor_keys: Any
    separate_losses: bool
    clip_value: Any
    loss_critic_type: str
    log_explained_variance: bool
    critic_coeff: Any
    value_norm: ValueNorm | None
    _has_critic: bool
    _mask: Any
    _loss_mask_key: Any

    def loss_critic(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The critic's loss, times ``critic_coeff``, and its masked metrics.

        Args:
            tensordict: the data, with ``value_target`` and what the critic reads.

        Returns:
            The loss of every step and column ``[*B, C]``, the fraction of clipped values or None, the
            explained variance of every column ``[C]`` or None.
        """
        keys = self.tensor_keys
        if self.separate_losses:
            tensordict = tensordict.detach()
        target = tensordict.get(keys.value_target, None)
        if target is None:
            raise KeyError(
                f"The value target {keys.value_target!r} is not in the data: compute it with VectorGAE, "
                "or leave the advantage out for the loss to compute both."
            )
        old_value = tensordict.get(keys.value, None) if self.clip_value is not None else None
        if self.clip_value is not None and old_value is None:
            raise KeyError(f"clip_value needs the values {keys.value!r} of the rollout in the data.")
        tensordict = fill_masked(
            tensordict, self.critic_network.in_keys, validity_mask(tensordict, self._loss_mask_key)
        )
        with (
            self.critic_network_params.to_module(self.critic_network, preserve_module_state=False)
            if self.functional
            else contextlib.nullcontext()
        ):
            value = self.critic_network(tensordict).get(keys.value)
        if value is None or value.shape != target.shape:
            raise ValueError(
                f"The critic's {keys.value!r} has shape {None if value is None else tuple(value.shape)}, "
                f"but {keys.value_target!r} has {tuple(target.shape)}: they need one column per group each, "
                "and one more each if the KL penalty has its own."
            )
        mask = self._mask(tensordict, value)
        if mask is not None:
            # Padding may hold NaN, which would survive a multiplication by 0 in the backward pass.
            target = torch.where(mask, target, 0.0)
            value = torch.where(mask, value, 0.0)
            old_value = None if old_value is None else torch.where(mask, old_value, 0.0)
        if self.value_norm is not None:
            rows = target if mask is None else target[mask.all(-1)]
            if rows.numel():  # statistics of nothing would be NaN for good
                self.value_norm.update(rows)
            target, value = self.value_norm.normalize(target), self.value_norm.normalize(value)
            old_value = None if old_value is None else self.value_norm.normalize(old_value)
        loss = distance_loss(target, value, loss_function=self.loss_critic_type)
        clip_fraction = None
        if old_value is not None:
            loss, _ = _clip_value_loss(old_value, value, self.clip_value, target, loss, self.loss_critic_type)
            clipped = (value - old_value).detach().abs() > self.clip_value
            clip_fraction = masked_mean(clipped.to(value.dtype), mask)
        explained_variance = None
        if self.log_explained_variance:
            explained_variance = masked_explained_variance(target.detach(), value.detach(), mask)
        return (self.critic_coeff * loss if self._has_critic else loss), clip_fraction, explained_variance
