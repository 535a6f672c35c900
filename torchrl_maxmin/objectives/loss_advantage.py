"""The advantage's side of a PPO loss for K groups: its estimator, its mask, its weights and its scale."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import _coerce_value_type, default_value_kwargs
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace

from torchrl_maxmin.masks import expand_mask, mask_keys, validity_mask
from torchrl_maxmin.objectives.masked import whiten
from torchrl_maxmin.objectives.scalarise import scalarise_advantage
from torchrl_maxmin.objectives.vector_estimator import VectorEstimator
from torchrl_maxmin.objectives.vector_gae import VectorGAE
from torchrl_maxmin.objectives.vector_td import VectorTD0, VectorTD1, VectorTDLambda, VectorVTrace

__all__ = ["VectorAdvantageMixin"]

_BY_NAME: dict[ValueEstimators, type[VectorEstimator]] = {
    ValueEstimators.GAE: VectorGAE,
    ValueEstimators.TD0: VectorTD0,
    ValueEstimators.TD1: VectorTD1,
    ValueEstimators.TDLambda: VectorTDLambda,
    ValueEstimators.VTrace: VectorVTrace,
}
_OF_ONE_REWARD = (GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace)


class VectorAdvantageMixin:
    """Estimates, weighs and scales a K-column advantage, and knows which steps count.

    To be put before :class:`~torchrl.objectives.PPOLoss` among the bases.
    """

    critic_network: Any
    tensor_keys: Any
    advantage_norm: Any
    normalize_advantage: bool
    normalize_advantage_exclude_dims: Any
    target_critic_network_params: Any
    _cached_critic_network_params_detached: Any
    _scale_advantage: Any
    _finite_actor_inputs: Any
    _default_device: Any
    _log_weight: Any
    _value_estimator: Any
    _loss_mask_key: Any
    _in_keys: list[NestedKey] | None
    value_estimator: Any
    value_type: Any

    # -- the mask -------------------------------------------------------------------------------------

    @property
    def loss_mask_key(self) -> NestedKey | None:
        """The entry that marks valid steps; see :attr:`torchrl.objectives.LossModule.loss_mask_key`.

        The value estimator follows, unless it was given a mask of its own. Steps that a shifted estimator
        displaced (``"shifted_valid"``) never count, beside a named mask either.
        """
        return self._loss_mask_key

    @loss_mask_key.setter
    def loss_mask_key(self, value: NestedKey | None) -> None:
        previous = self._loss_mask_key
        LossModule.loss_mask_key.fset(self, value)
        self._in_keys = None  # the mask is one of them
        estimator = getattr(self, "_value_estimator", None)
        if isinstance(estimator, VectorEstimator) and estimator.mask_key in ("auto", previous):
            estimator.mask_key = value

    def _loss_mask_keys(self) -> tuple[NestedKey, ...]:
        return mask_keys(self._loss_mask_key)

    def _mask(self, tensordict: TensorDictBase, values: Tensor) -> Tensor | None:
        """The validity mask, expanded to ``values`` ``[*B, C]``; None if the data hold none."""
        mask = validity_mask(tensordict, self._loss_mask_key)
        return None if mask is None else expand_mask(mask, values)

    # -- the estimator --------------------------------------------------------------------------------

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)  # type: ignore[misc]
        if isinstance(self._value_estimator, VectorEstimator):
            self._value_estimator.set_keys(group_weights=self.tensor_keys.group_weights)

    def make_value_estimator(
        self, value_type: ValueEstimators | str | type | Any | None = None, **hyperparams: Any
    ) -> None:
        """Choose the value estimator; :class:`VectorGAE` unless another is named.

        ``GAE``, ``TD0``, ``TD1``, ``TDLambda`` and ``VTrace`` take K columns by name: every column is
        estimated as TorchRL estimates one reward, then the columns are weighted. They use the mask of the
        loss, unless ``mask_key`` is among the hyperparameters.

        Args:
            value_type: as for the parent; None means ``ValueEstimators.GAE``.
            **hyperparams: the estimator's arguments; ``gamma=.99``, ``lmbda=.95`` and
                ``differentiable=False`` by default.
        """
        if value_type is None or isinstance(value_type, str):
            value_type = _coerce_value_type(value_type or "GAE")
        if isinstance(value_type, ValueEstimators) and value_type in _BY_NAME:
            self.value_type = value_type
            defaults = {
                **default_value_kwargs(value_type),
                "differentiable": False,
                "value_network": self.critic_network,
                "device": self._default_device,
            }
            if value_type == ValueEstimators.VTrace:
                defaults["log_ratio"] = self._behaviour_log_ratio
            self._value_estimator = _BY_NAME[value_type](**{**defaults, **hyperparams})
        else:
            super().make_value_estimator(value_type, **hyperparams)  # type: ignore[misc]
        estimator = self._value_estimator
        unnamed = isinstance(estimator, VectorEstimator) and estimator.mask_key == "auto"
        if unnamed and "mask_key" not in hyperparams:
            estimator.mask_key = self.loss_mask_key
        self._forward_value_estimator_keys()

    def _behaviour_log_ratio(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor:
        """``log pi - log mu`` of the actions, ``[*B, 1]``."""
        log_weight, _, _, log_is_weight = self._log_weight(
            self._finite_actor_inputs(tensordict), adv_shape=shape
        )
        return log_weight if log_is_weight is None else log_weight + log_is_weight

    def _estimate_advantage(self, tensordict: TensorDictBase) -> None:
        """Write advantage and value target into ``tensordict``."""
        keys = self.tensor_keys
        if self.critic_network is None:
            raise RuntimeError(
                f"There is neither an {keys.advantage!r} in the data nor a critic to compute it from."
            )
        estimator = self.value_estimator
        if type(estimator) in _OF_ONE_REWARD:
            reward = tensordict.get(("next", keys.reward))
            mask = validity_mask(tensordict, self._loss_mask_key)
            reason = None
            if reward.shape[-1] > 1:
                reason = f"estimates one reward, and the data hold {reward.shape[-1]}"
            elif mask is not None and not mask.all():
                reason = "does not know masks, and the data hold padding"
            if reason is not None:
                names = ", ".join(name.name for name in _BY_NAME)
                raise ValueError(
                    f"{type(estimator).__name__} {reason}: name the estimator, make_value_estimator("
                    f"ValueEstimators.<name>) with one of {names}, or pass a VectorGAE."
                )
        estimator(
            tensordict,
            params=self._cached_critic_network_params_detached,
            target_params=self.target_critic_network_params,
        )

    # -- weights and scale ----------------------------------------------------------------------------

    def _scalar_advantage(self, tensordict: TensorDictBase) -> Tensor:
        """The advantage ``[*B, 1]``; a K-column one is weighted."""
        keys = self.tensor_keys
        advantage = tensordict.get(keys.advantage)
        if advantage.shape == tensordict.batch_size and advantage.shape[-1:] != (1,):
            raise ValueError(
                f"The advantage has shape {tuple(advantage.shape)}, that of the batch: it misses its last "
                "dimension, one column per group or a single one (advantage.unsqueeze(-1))."
            )
        if advantage.shape[-1] == 1:
            return advantage
        weights = tensordict.get(keys.group_weights, None)
        if weights is None:
            raise ValueError(
                f"The advantage has {advantage.shape[-1]} columns (shape {tuple(advantage.shape)}) and the "
                f"data hold no {keys.group_weights!r} to weigh them. Set the group weights, or scalarise the "
                "advantage; if it has one value a step, it misses its last dimension (unsqueeze(-1))."
            )
        return scalarise_advantage(advantage, weights)

    def _normalise(
        self, advantage: Tensor, tensordict: TensorDictBase, mask: Tensor | None, fresh: bool
    ) -> Tensor:
        if self.advantage_norm is not None:
            shape = advantage.shape
            # Statistics of nothing would be NaN for good.
            known = advantage.numel() > 0 and (mask is None or bool(mask.any()))
            advantage = self._scale_advantage(advantage, tensordict, update=fresh and known)
            if advantage.shape != shape:
                raise ValueError(
                    "advantage_norm has a scale for every column of the value target, but the advantage is "
                    "scalarised before it is normalised. Use normalize_advantage=True, or a ValueNorm of "
                    "shape 1."
                )
        elif self.normalize_advantage:
            advantage = whiten(advantage, mask, exclude_dims=self.normalize_advantage_exclude_dims)
        return advantage
