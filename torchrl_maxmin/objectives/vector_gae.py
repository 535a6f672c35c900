"""Generalised advantage estimation for a vector reward: K columns, one set of done flags."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from maxmin_kernels import vector_gae
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value import GAE
from torchrl.objectives.value.advantages import _self_set_grad_enabled, _self_set_skip_existing
from torchrl.objectives.value.functional import generalized_advantage_estimate

from torchrl_maxmin.objectives.scalarise import scalarise_advantage


class VectorGAE(GAE):
    """GAE with a K-column reward, K-column values and one ``done`` for all columns.

    Equal to K scalar :class:`~torchrl.objectives.value.GAE`, one a column, in one pass. If the data
    hold group weights, the advantage is scalarised afterwards: group weights change every iteration,
    the groups' values do not, so the critic stays valid where a critic of the weighted reward would not.

    Entries: ``("next", "reward")`` ``[*B, T, K]``, ``state_value`` and ``("next", "state_value")``
    ``[*B, T, K]`` (written by the value network, if there is one), ``("next", "done")`` and
    ``("next", "terminated")`` ``[*B, T, 1]``. Written: ``advantage`` and ``value_target``
    ``[*B, T, K]``. With ``group_weights`` ``[*B, T, K]`` (or ``[*B, K]`` in a tensordict of batch size
    ``B``) in the data, ``advantage`` is their weighted sum ``[*B, T, 1]`` and the columns are kept under
    ``advantage_per_group``. A reward with one column more than there are weights has a KL penalty in its
    last, which enters the sum with weight 1.

    Args:
        gamma: the discount.
        lmbda: the trace decay.
        value_network: a module that writes ``state_value`` ``[*B, T, K]``; None to read the values from
            the data.
        average_gae: standardise the advantage: the scalarised one if there are group weights, else every
            column by itself (over valid steps). Defaults to ``False``.
        mask_key: entry ``[*B, T]`` (or ``[*B, T, 1]``), True at real steps; padded steps get advantage 0
            and pass nothing on. Defaults to ``None``.
        **kwargs: passed to :class:`~torchrl.objectives.value.GAE`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_maxmin.objectives import VectorGAE
        >>> data = TensorDict(
        ...     {
        ...         "state_value": torch.zeros(4, 5, 3),
        ...         "group_weights": torch.full((4, 5, 3), 1 / 3),
        ...         "next": {
        ...             "state_value": torch.zeros(4, 5, 3),
        ...             "reward": torch.randn(4, 5, 3),
        ...             "done": torch.zeros(4, 5, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(4, 5, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     batch_size=[4, 5],
        ... )
        >>> data = VectorGAE(gamma=0.99, lmbda=0.95, value_network=None)(data)
        >>> data["advantage"].shape, data["advantage_per_group"].shape
        (torch.Size([4, 5, 1]), torch.Size([4, 5, 3]))

    Reference: Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage
    Estimation, eq. 16, https://arxiv.org/abs/1506.02438.
    """

    @dataclass
    class _AcceptedKeys(GAE._AcceptedKeys):
        """The entries that :meth:`set_keys` can rename.

        The inherited fields are written again since :meth:`set_keys` looks for them in this class.

        Attributes:
            advantage (NestedKey): Where the advantage is written. Defaults to ``"advantage"``.
            value_target (NestedKey): Where the target value is written. Defaults to ``"value_target"``.
            value (NestedKey): Where the value is read. Defaults to ``"state_value"``.
            reward (NestedKey): The reward, in ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): The done flag, in ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): The terminated flag, in ``"next"``. Defaults to ``"terminated"``.
            steps_to_next_obs (NestedKey): Steps to the next observation, if they are not 1.
                Defaults to ``"steps_to_next_obs"``.
            sample_log_prob (NestedKey): Not used by GAE; kept so that losses can set it.
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

    def __init__(
        self,
        *,
        gamma: float | Tensor,
        lmbda: float | Tensor,
        value_network: Any = None,
        average_gae: bool = False,
        mask_key: NestedKey | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            gamma=gamma, lmbda=lmbda, value_network=value_network, average_gae=average_gae, **kwargs
        )
        self.mask_key = mask_key

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that are read; group weights and mask may be absent."""
        keys = self.tensor_keys
        in_keys = list(super().in_keys)
        if self.value_network is None:
            in_keys += [keys.value, ("next", keys.value)]
            in_keys += [("next", key) for key in (keys.reward, keys.done, keys.terminated)]
        in_keys.append(keys.group_weights)
        return in_keys if self.mask_key is None else [*in_keys, self.mask_key]

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
            ValueError: if values are missing, or reward, values and flags do not fit together.
        """
        keys = self.tensor_keys
        if tensordict.batch_dims < 1:
            raise ValueError(f"GAE needs a time dimension, got batch size {tuple(tensordict.batch_size)}.")
        value, next_value = self._values(tensordict, params, target_params)
        time_dim = self._get_time_dim(time_dim, tensordict)
        valid = tensordict.get("shifted_valid", default=None)
        data = self._prepare_shifted_tensordict(tensordict, valid, time_dim)
        done = data.get(("next", keys.done))
        reward, done, terminated = self._prepare_signals(
            data.get(("next", keys.reward)),
            done,
            data.get(("next", keys.terminated), default=done),
            value,
        )
        gamma, lmbda = self.gamma.to(reward.device), self.lmbda.to(reward.device)
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma ** steps.reshape(*reward.shape[:-1], 1).expand_as(reward)
        if self.auto_reset_env:
            truncated = self._broadcast_optional(tensordict.get(("next", "truncated")), value)
            reward = reward + gamma * value * truncated
            terminated = done

        mask = self._mask(tensordict, valid, reward)
        advantage, value_target = self._recursion(
            gamma, lmbda, value, next_value, reward, done, terminated, mask, time_dim
        )
        weights = tensordict.get(keys.group_weights, None)
        if weights is not None:
            tensordict.set(keys.advantage_per_group, advantage)
            advantage = scalarise_advantage(advantage, weights)
        if self.average_gae:
            advantage = self._normalize_advantage(advantage, mask, groups=self._group_ids(tensordict))
        tensordict.set(keys.advantage, advantage)
        tensordict.set(keys.value_target, value_target)
        self._mask_shifted_output(tensordict, valid)
        return tensordict

    def _values(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
    ) -> tuple[Tensor, Tensor]:
        key = self.tensor_keys.value
        if self.value_network is None:
            value, next_value = tensordict.get(key, None), tensordict.get(("next", key), None)
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
                data=tensordict,
                params=params,
                next_params=target_params,
                single_call=self.shifted,
                value_key=key,
                detach_next=True,
                vmap_randomness=self.vmap_randomness,
            )
        if valid is not None:
            tensordict.set("shifted_valid", valid)
        return value, next_value

    def _mask(self, tensordict: TensorDictBase, valid: Tensor | None, reward: Tensor) -> Tensor | None:
        """The steps that count ``[*B, T, 1]``: those of ``mask_key`` that shifting did not displace."""
        masks = [valid]
        if self.mask_key is not None:
            masks.append(tensordict.get(self.mask_key))
        result = None
        for mask in masks:
            if mask is not None:
                mask = mask.to(torch.bool).reshape(*reward.shape[:-1], 1)
                result = mask if result is None else result & mask
        return result

    def _recursion(
        self,
        gamma: Tensor,
        lmbda: Tensor,
        value: Tensor,
        next_value: Tensor,
        reward: Tensor,
        done: Tensor,
        terminated: Tensor,
        mask: Tensor | None,
        time_dim: int,
    ) -> tuple[Tensor, Tensor]:
        if self.differentiable or gamma.numel() > 1 or lmbda.numel() > 1:
            # TorchRL's own loop has a gradient and takes a discount of its own for every step.
            if mask is not None:
                raise ValueError("mask_key needs differentiable=False and one gamma and lmbda for all steps.")
            return generalized_advantage_estimate(
                gamma, lmbda, value, next_value, reward, done, terminated=terminated, time_dim=time_dim
            )

        def time_last(x: Tensor) -> Tensor:
            return x.movedim(time_dim, -2)

        advantage, value_target = vector_gae(
            time_last(reward),
            time_last(value),
            time_last(next_value),
            time_last(done[..., :1]),
            time_last(terminated[..., :1]),
            gamma=float(gamma),
            lmbda=float(lmbda),
            mask=None if mask is None else time_last(mask).squeeze(-1),
        )
        return advantage.movedim(-2, time_dim), value_target.movedim(-2, time_dim)

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
        columns = [
            super(VectorGAE, self)._normalize_advantage(column, valid, groups)
            for column in adv.split(1, dim=-1)
        ]
        return torch.cat(columns, dim=-1)
