"""Value estimators of a K-column reward: what GAE, TD and V-trace share."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value import GAE, ValueEstimatorBase
from torchrl.objectives.value.advantages import _self_set_grad_enabled, _self_set_skip_existing

from torchrl_maxmin.masks import SHIFTED_VALID, all_equal, expand_mask, fill_masked, mask_keys, validity_mask
from torchrl_maxmin.objectives.functional import scalarise_advantage

__all__ = ["Signals", "VectorEstimator"]


class Signals(NamedTuple):
    """What an estimator works on; masked steps hold zeros, and a trajectory ends where its padding begins."""

    data: TensorDictBase  # a shallow copy, [*B, T]
    reward: Tensor  # [*B, T, C]
    value: Tensor  # [*B, T, C]
    next_value: Tensor  # [*B, T, C]
    done: Tensor  # [*B, T, C], the columns are equal
    terminated: Tensor  # [*B, T, C], the columns are equal
    mask: Tensor | None  # [*B, T, 1], True at steps that count
    time_dim: int


class VectorEstimator(ValueEstimatorBase):
    """A value estimator for a K-column reward, K-column values and one ``done`` for all columns.

    To be put before a TorchRL estimator among the bases; :meth:`_estimate` is what a subclass adds. The
    entries are described in :class:`~torchrl_maxmin.objectives.VectorGAE`.

    Args:
        mask_key: entry ``[*B, T]`` (or ``[*B, T, 1]``), True at real steps; ``"auto"`` for the masks that
            TorchRL writes, ``("collector", "mask")`` among them; None for no mask. Padded steps get advantage
            and target 0 and pass nothing on, whatever they hold. Defaults to ``"auto"``.
        **kwargs: passed to the TorchRL estimator.
    """

    @dataclass
    class _AcceptedKeys(ValueEstimatorBase._AcceptedKeys):
        """The entries that :meth:`set_keys` can rename.

        The inherited fields are written again since :meth:`set_keys` looks for them in this class.

        Attributes:
            group_weights (NestedKey): The group weights. Defaults to ``"group_weights"``.
            advantage_per_group (NestedKey): Where the columns are kept when they are scalarised.
                Defaults to ``"advantage_per_group"``.
        """

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        sample_log_prob: NestedKey | None = None
        group_weights: NestedKey = "group_weights"
        advantage_per_group: NestedKey = "advantage_per_group"

    default_keys = _AcceptedKeys

    def __init__(self, *, mask_key: NestedKey | None = "auto", **kwargs: Any) -> None:
        super().__init__(**{"value_network": None, **kwargs})
        self.mask_key = mask_key

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that are read; group weights and masks may be absent."""
        keys = self.tensor_keys
        in_keys = list(super().in_keys)
        if self.value_network is None:
            in_keys += [keys.value, ("next", keys.value)]
            in_keys += [("next", key) for key in (keys.reward, keys.done, keys.terminated)]
        return [*in_keys, keys.group_weights, *mask_keys(self.mask_key)]

    @_self_set_skip_existing
    @_self_set_grad_enabled
    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Write ``advantage`` and ``value_target`` into ``tensordict``.

        Args:
            tensordict: the data, of batch size ``[*B, T]``.
            params: parameters of a functional value network.
            target_params: its target parameters.
            time_dim: the dimension of time in the batch size; by default the one named ``"time"``, else
                the last.

        Returns:
            The same tensordict.

        Raises:
            KeyError: if the data lack a mask that is named.
            ValueError: if values are missing, or reward, values, flags and mask do not fit together.
        """
        keys = self.tensor_keys
        signals = self._signals(tensordict, params, target_params, time_dim)
        if signals.reward.numel():
            advantage, value_target = self._estimate(signals)
        else:
            advantage, value_target = torch.zeros_like(signals.reward), torch.zeros_like(signals.reward)
        mask = signals.mask
        if mask is not None:
            advantage, value_target = (torch.where(mask, x, 0.0) for x in (advantage, value_target))
        weights = tensordict.get(keys.group_weights, None)
        if weights is not None:
            tensordict.set(keys.advantage_per_group, advantage)
            advantage = scalarise_advantage(advantage, weights)
            if mask is not None:
                advantage = torch.where(mask, advantage, 0.0)  # the weights of padding may be NaN
        if self._standardises:
            advantage = self._normalize_advantage(advantage, mask, groups=self._group_ids(tensordict))
        tensordict.set(keys.advantage, advantage)
        tensordict.set(keys.value_target, value_target)
        return tensordict

    def value_estimate(self, tensordict: TensorDictBase, **kwargs: Any) -> Tensor:
        """Return the value target that :meth:`forward`, with these arguments, would write."""
        return self(tensordict.clone(False), **kwargs).get(self.tensor_keys.value_target)

    @property
    def _standardises(self) -> bool:
        """Whether the advantage is standardised, after the weights."""
        return False

    def _estimate(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Advantage and value target ``[*B, T, C]``; what masked steps get does not matter."""
        raise NotImplementedError

    # -- what goes in ---------------------------------------------------------------------------------

    def _signals(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        time_dim: int | None,
    ) -> Signals:
        keys = self.tensor_keys
        if tensordict.batch_dims < 1:
            raise ValueError(
                f"{type(self).__name__} needs a time dimension; the batch size is "
                f"{tuple(tensordict.batch_size)}."
            )
        time_dim = self._get_time_dim(time_dim, tensordict)
        data = tensordict
        if self.shifted and self.value_network is not None:
            data = tensordict.exclude(SHIFTED_VALID)  # of an earlier call; this one writes its own
        data = self._end_at_padding(data, validity_mask(data, self.mask_key), time_dim)
        value, next_value = self._values(tensordict, data, params, target_params)
        valid = data.get(SHIFTED_VALID, None)
        data = self._prepare_shifted_tensordict(data, valid, time_dim)
        done = data.get(("next", keys.done))
        reward, done, terminated = self._prepare_signals(
            data.get(("next", keys.reward)), done, data.get(("next", keys.terminated), default=done), value
        )
        mask = validity_mask(data, self.mask_key)
        if valid is not None and mask is None:
            mask = valid
        if mask is not None:
            mask = expand_mask(mask, done[..., :1])
            # Select, not multiply: padding may hold NaN.
            reward, value, next_value = (torch.where(mask, x, 0.0) for x in (reward, value, next_value))
            steps = data.get(keys.steps_to_next_obs, None)
            if steps is not None:
                data.set(keys.steps_to_next_obs, torch.where(expand_mask(mask, steps), steps, 1))
        return Signals(data, reward, value, next_value, done, terminated, mask, time_dim)

    def _end_at_padding(
        self, tensordict: TensorDictBase, mask: Tensor | None, time_dim: int
    ) -> TensorDictBase:
        """Data whose trajectories end, without terminating, at the last step before padding."""
        if mask is None or not mask.numel():
            return tensordict
        keys, flags = self.tensor_keys, ("next", self.tensor_keys.done)
        done = tensordict.get(flags)
        valid = expand_mask(mask, done)
        last = torch.ones_like(valid.narrow(time_dim, 0, 1))
        followed = torch.cat([valid.narrow(time_dim, 1, valid.shape[time_dim] - 1), last], time_dim)
        data = tensordict.copy()
        # done alone: what the last real step bootstraps from is its own next observation, which is real.
        data.set(flags, done | (valid & ~followed))
        data.set(("next", keys.terminated), tensordict.get(("next", keys.terminated), default=done))
        if self.value_network is not None:
            # Networks may look across steps: an attention weight of 0 times NaN is NaN.
            read = [*self.value_network.in_keys, keys.value]
            data = fill_masked(data, [*read, *(("next", key) for key in read)], mask)
        return data

    def _values(
        self,
        tensordict: TensorDictBase,
        data: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
    ) -> tuple[Tensor, Tensor]:
        """The values of ``data``; a network's are written into ``tensordict`` too."""
        key = self.tensor_keys.value
        if self.value_network is None:
            value, next_value = data.get(key, None), data.get(("next", key), None)
            if value is None or next_value is None:
                raise ValueError(f"Without a value network the data must hold {key!r} and {('next', key)!r}.")
            return value, next_value
        if params is not None:
            params = params.detach()
            if target_params is None:
                target_params = params.clone(False)
        # The gradient may pass through the values, but not to the value network's parameters.
        hold = params is None and target_params is None
        with hold_out_net(self.value_network) if hold else nullcontext():
            value, next_value, valid = self._call_value_nets(
                data=data,
                params=params,
                next_params=target_params,
                single_call=self.shifted,
                value_key=key,
                detach_next=True,
                vmap_randomness=self.vmap_randomness,
            )
        if data is not tensordict:
            tensordict.set(key, value)
            tensordict.set(("next", key), next_value)
        if valid is not None:
            data.set(SHIFTED_VALID, valid)
            tensordict.set(SHIFTED_VALID, valid)
        return value, next_value

    # -- hooks of GAE ---------------------------------------------------------------------------------

    def _prepare_signals(
        self, reward: Tensor, done: Tensor, terminated: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if reward.shape != value.shape:
            raise ValueError(
                f"The reward (shape {tuple(reward.shape)}) and the values (shape {tuple(value.shape)}) "
                "must have the same columns: one per group, and one more in both if the KL penalty has "
                "a column of its own."
            )
        return reward, self._broadcast_optional(done, value), self._broadcast_optional(terminated, value)

    def _broadcast_optional(self, tensor: Tensor, value: Tensor) -> Tensor:
        if tensor.shape != (*value.shape[:-1], 1):
            raise ValueError(
                f"Done flags must have shape {(*value.shape[:-1], 1)}, one for all columns; got "
                f"{tuple(tensor.shape)}."
            )
        return tensor.expand_as(value)

    def _normalize_advantage(
        self, adv: Tensor, valid: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """GAE's standardisation of every column by itself; 0 at padding, and where there is no spread."""
        if adv.numel() <= adv.shape[-1]:
            return torch.zeros_like(adv)  # of one step at most
        columns = [
            GAE._normalize_advantage(self, column, valid, groups)  # type: ignore[arg-type]
            for column in adv.split(1, dim=-1)
        ]
        counts = torch.ones_like(adv, dtype=torch.bool) if valid is None else expand_mask(valid, adv)
        if groups is None:
            flat = all_equal(adv, counts, list(range(adv.ndim - 1)))
        else:
            _, index = groups.reshape(adv.shape[:-1]).unique(return_inverse=True)
            members = index.flatten() == torch.arange(int(index.max()) + 1, device=index.device)[:, None]
            by_group = members[:, :, None] & counts.flatten(0, -2)
            flat = all_equal(adv.flatten(0, -2), by_group, [1])[index, 0]
        return torch.where(flat | ~counts, 0.0, torch.cat(columns, dim=-1))
