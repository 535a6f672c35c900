"""What a K-group PPO loss shares with TorchRL beside its formula: keys, masks, actors, value estimators."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, TensorDictParams, is_tensor_collection
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.modules import ValueNorm
from torchrl.objectives import ClipPPOLoss, LossModule, PPOLoss, ValueEstimators
from torchrl.objectives.utils import (
    _coerce_value_type,
    _maybe_add_or_extend_key,
    _sum_td_features,
    default_value_kwargs,
)
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace

from torchrl_maxmin.masks import expand_mask, fill_masked, mask_keys, validity_mask, whiten
from torchrl_maxmin.objectives.functional import KL_ESTIMATORS, kl_estimate, scalarise_advantage
from torchrl_maxmin.objectives.vector_estimator import VectorEstimator
from torchrl_maxmin.objectives.vector_gae import VectorGAE
from torchrl_maxmin.objectives.vector_td import VectorTD0, VectorTD1, VectorTDLambda, VectorVTrace

__all__ = ["ScoredActions", "VectorPPOLoss"]

_BY_NAME: dict[ValueEstimators, type[VectorEstimator]] = {
    ValueEstimators.GAE: VectorGAE,
    ValueEstimators.TD0: VectorTD0,
    ValueEstimators.TD1: VectorTD1,
    ValueEstimators.TDLambda: VectorTDLambda,
    ValueEstimators.VTrace: VectorVTrace,
}
_OF_ONE_REWARD = (GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace)


class ScoredActions(NamedTuple):
    """What one pass of the actor says about the actions in the data; stands where PPO has its ``dist``."""

    log_prob: Any  # Tensor [*B], or a tensordict of them for composite actions
    entropy: Tensor | None  # [*B], from an actor that scores actions itself
    dist: Any  # the distribution, from a probabilistic actor


class VectorPPOLoss(ClipPPOLoss):
    """The contract of :class:`~torchrl_maxmin.objectives.MaxMinPPOLoss`, where it is described."""

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        """The entries that :meth:`set_keys` can rename, besides those of PPO.

        Attributes:
            group_weights (NestedKey): The group weights ``[*B, K]``. Defaults to ``"group_weights"``.
            ref_log_prob (NestedKey): The reference policy's log-probability of the action.
                Defaults to ``"ref_log_prob"``.
            log_prob (NestedKey): Where an actor that scores actions itself writes the log-probability.
                Defaults to ``"log_prob"``.
            entropy (NestedKey): Where such an actor writes the entropy. Defaults to ``"entropy"``.
            num_valid (NestedKey): The number of steps that count in the minibatch of which the data are a
                part, as :meth:`micro_batches` writes it. Defaults to ``"num_valid"``.
        """

        group_weights: NestedKey = "group_weights"
        ref_log_prob: NestedKey = "ref_log_prob"
        log_prob: NestedKey = "log_prob"
        entropy: NestedKey = "entropy"
        num_valid: NestedKey = "num_valid"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _in_keys: list[NestedKey] | None
    _out_keys: list[NestedKey] | None
    _schedulable_buffers = frozenset({"kl_to_ref_coeff"})

    actor_network: TensorDictModule
    critic_network: TensorDictModule
    actor_network_params: TensorDictParams
    critic_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | TensorDictModule | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        kl_to_ref_coeff: float = 0.0,
        kl_estimator: str = "k3",
        value_norm: ValueNorm | None = None,
        loss_mask_key: NestedKey | None = "auto",
        **kwargs: Any,
    ) -> None:
        # The parent swallows unknown arguments, and with them typing errors.
        known = {*inspect.signature(ClipPPOLoss).parameters, *inspect.signature(PPOLoss).parameters}
        unknown = sorted(set(kwargs) - known - {"critic_coef", "entropy_coef"})
        if unknown:
            raise TypeError(f"MaxMinPPOLoss got unknown arguments: {', '.join(unknown)}.")
        # The parent looks at pairs only; above 1 its lower bound, log(1 - clip_epsilon), is NaN.
        clip = kwargs.get("clip_epsilon", 0.2)
        if isinstance(clip, int | float) and not 0 <= clip <= 1:
            raise ValueError(f"clip_epsilon must be between 0 and 1, or a pair, got {clip}.")
        kwargs["clip_value"] = kwargs.get("clip_value") or None  # False and 0 mean no clipping
        super().__init__(actor_network, critic_network, **kwargs)
        if kl_to_ref_coeff < 0:
            raise ValueError(f"kl_to_ref_coeff must not be negative, got {kl_to_ref_coeff}.")
        if kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator is one of {', '.join(KL_ESTIMATORS)}, not {kl_estimator!r}.")
        self.kl_estimator = kl_estimator
        self.value_norm = value_norm
        self.register_coeff_buffer(
            "kl_to_ref_coeff", float(kl_to_ref_coeff) or None, device=self.entropy_coeff.device
        )
        self.loss_mask_key = loss_mask_key
        if not self._is_probabilistic:
            self.set_keys(sample_log_prob="sample_log_prob")

    # -- keys and masks -------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        keys: list[NestedKey] = sorted(self._in_keys or (), key=str)
        optional = ("advantage", "value_target", "value", "group_weights", "ref_log_prob", "num_valid")
        for name in optional:
            _maybe_add_or_extend_key(keys, getattr(self.tensor_keys, name))
        _maybe_add_or_extend_key(keys, list(self._loss_mask_keys()))
        self._in_keys = list(dict.fromkeys(keys))

    @property
    def out_keys(self) -> list[NestedKey]:
        """What ``forward`` returns, in the order of a keyword call."""
        if self._out_keys is None:
            keys: list[NestedKey] = ["loss_objective", "clip_fraction"]
            if self.entropy_bonus:
                keys += ["entropy", "loss_entropy"]
            if self.kl_to_ref_coeff is not None:
                keys += ["kl_to_ref", "loss_kl_to_ref"]
            if self._has_critic:
                keys.append("loss_critic")
                if self.clip_value is not None:
                    keys.append("value_clip_fraction")
                if self.log_explained_variance:
                    keys.append("explained_variance")
            self._out_keys = [*keys, "ESS", "kl_approx", "max_ratio", "mean_ratio"]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

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

    def _with_bool_masks(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The data as the parent's reductions take them."""
        data = tensordict.copy()
        for key in self._loss_mask_keys():
            if data.get(key, None) is not None:
                data.set(key, data.get(key).to(torch.bool))
        return data

    # -- the estimator --------------------------------------------------------------------------------

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        super()._forward_value_estimator_keys(**kwargs)
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
            super().make_value_estimator(value_type, **hyperparams)
        estimator = self._value_estimator
        unnamed = isinstance(estimator, VectorEstimator) and estimator.mask_key == "auto"
        if unnamed and "mask_key" not in hyperparams:
            estimator.mask_key = self.loss_mask_key
        self._forward_value_estimator_keys()

    def _behaviour_log_ratio(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor:
        """``log pi - log mu`` of the actions, ``[*B, 1]``."""
        mask = validity_mask(tensordict, self._loss_mask_key)
        read = list(self.actor_network.in_keys)
        _maybe_add_or_extend_key(read, self.tensor_keys.action)
        data = fill_masked(tensordict, read, mask)
        log_weight, _, _, log_is_weight = self._log_weight(data, adv_shape=shape)
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

    # -- actors ---------------------------------------------------------------------------------------

    def _get_entropy(self, dist: ScoredActions, adv_shape: torch.Size) -> Tensor | TensorDictBase:
        if dist.dist is not None:
            return super()._get_entropy(dist.dist, adv_shape)
        if dist.entropy is None:
            raise ValueError(
                f"The actor writes no {self.tensor_keys.entropy!r}: let it, or pass entropy_bonus=False."
            )
        return dist.entropy.unsqueeze(-1)

    # -- the reference --------------------------------------------------------------------------------

    def _kl_to_ref(self, scored: ScoredActions, tensordict: TensorDictBase, mask: Tensor | None) -> Tensor:
        """The estimate of every step, ``[*B, 1]``."""
        ref_log_prob = tensordict.get(self.tensor_keys.ref_log_prob, None)
        log_prob = scored.log_prob
        if ref_log_prob is None:
            raise KeyError(
                "kl_to_ref_coeff needs the reference's log-probabilities of the actions in "
                f"{self.tensor_keys.ref_log_prob!r}."
            )
        if is_tensor_collection(log_prob):
            log_prob = _sum_td_features(log_prob)
        if ref_log_prob.shape != log_prob.shape:
            raise ValueError(
                f"{self.tensor_keys.ref_log_prob!r} has shape {tuple(ref_log_prob.shape)}, the policy's "
                f"log-probability {tuple(log_prob.shape)}."
            )
        log_ratio = (log_prob - ref_log_prob).unsqueeze(-1)
        if mask is not None:
            log_ratio = torch.where(expand_mask(mask, log_ratio), log_ratio, 0.0)
        return kl_estimate(log_ratio, self.kl_estimator)

    # -- weights and scale ----------------------------------------------------------------------------

    def _scalar_advantage(self, advantage: Tensor, tensordict: TensorDictBase) -> Tensor:
        """An advantage of K columns, weighted: ``[*B, 1]``."""
        keys = self.tensor_keys
        if advantage.shape == tensordict.batch_size:
            raise ValueError(
                f"The advantage has shape {tuple(advantage.shape)}, that of the batch: it misses its last "
                "dimension, one column per group or a single one (advantage.unsqueeze(-1))."
            )
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
        """The advantage on the scale that the loss was asked for."""
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
            return advantage
        return whiten(advantage, mask, exclude_dims=self.normalize_advantage_exclude_dims)
