"""What a K-group PPO loss shares with TorchRL beside its formula: keys, masks, actors, value estimators."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, TensorDictParams, is_tensor_collection
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import (
    _coerce_value_type,
    _maybe_add_or_extend_key,
    _sum_td_features,
    default_value_kwargs,
)
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator, VTrace

from torchrl_maxmin.masks import (
    expand_mask,
    fill_masked,
    mask_keys,
    masked_explained_variance,
    ratio_statistics,
    validity_mask,
)
from torchrl_maxmin.objectives.kl import kl_estimate
from torchrl_maxmin.objectives.vector_estimator import VectorEstimator
from torchrl_maxmin.objectives.vector_gae import VectorGAE
from torchrl_maxmin.objectives.vector_td import VectorTD0, VectorTD1, VectorTDLambda, VectorVTrace

__all__ = ["ScoredActions", "VectorLossMixin"]

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


class VectorLossMixin:
    """Keys, masks and value estimators of a PPO loss with a column for every group.

    To be put before :class:`~torchrl.objectives.PPOLoss` among the bases. The actor may be one that writes
    log-probabilities, besides a probabilistic one; the contract is described in
    :class:`~torchrl_maxmin.objectives.MaxMinPPOLoss`.
    """

    actor_network: Any
    actor_network_params: Any
    advantage_norm: Any
    functional: bool
    kl_estimator: str
    normalize_advantage: bool
    value_norm: Any
    critic_network: Any
    tensor_keys: Any
    target_critic_network_params: Any
    _cached_critic_network_params_detached: Any
    _default_device: Any
    _log_weight: Any
    _value_estimator: Any
    _loss_mask_key: Any
    _in_keys: list[NestedKey] | None
    _out_keys: list[NestedKey] | None
    entropy_bonus: bool
    kl_to_ref_coeff: Any
    clip_value: Any
    log_explained_variance: bool
    _has_critic: bool
    value_estimator: Any
    value_type: Any

    # -- keys and masks -------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        super()._set_in_keys()  # type: ignore[misc]
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

    def _finite_actor_inputs(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The data with boolean masks, and without NaN in what the actor reads of masked steps."""
        mask = validity_mask(tensordict, self._loss_mask_key)
        if mask is None:
            return tensordict
        keys = list(getattr(self.actor_network, "in_keys", ()))
        _maybe_add_or_extend_key(keys, self.tensor_keys.action)
        tensordict = fill_masked(tensordict, keys, mask)
        for key in self._loss_mask_keys():
            if tensordict.get(key, None) is not None:
                tensordict.set(key, tensordict.get(key).to(torch.bool))
        return tensordict

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

    # -- actors ---------------------------------------------------------------------------------------

    @property
    def _is_probabilistic(self) -> bool:
        actor = self.actor_network
        if isinstance(actor, (ProbabilisticTensorDictSequential, ProbabilisticTensorDictModule)):
            return True
        return self.tensor_keys.log_prob not in getattr(actor, "out_keys", ()) and hasattr(actor, "get_dist")

    def _get_cur_log_prob(
        self, tensordict: TensorDictBase, params: TensorDictParams | None = None
    ) -> tuple[Any, ScoredActions, bool]:
        if self._is_probabilistic:
            log_prob, dist, is_composite = super()._get_cur_log_prob(tensordict, params)  # type: ignore[misc]
            return log_prob, ScoredActions(log_prob, None, dist), is_composite
        actor, keys = self.actor_network, self.tensor_keys
        if keys.log_prob not in getattr(actor, "out_keys", ()):
            raise TypeError(
                "The actor must be a probabilistic TensorDict module, or a TensorDict module that writes "
                f"the log-probability of the given action under {keys.log_prob!r} (set_keys(log_prob=...)); "
                f"got {type(actor).__name__} with out_keys {getattr(actor, 'out_keys', None)}."
            )
        params = self.actor_network_params if params is None else params
        with (
            params.to_module(actor, preserve_module_state=False)
            if self.functional
            else contextlib.nullcontext()
        ):
            # A selection, so that the actor's entries do not end up in the caller's data.
            scored = actor(tensordict.select(*actor.in_keys, strict=False))
        log_prob = scored.get(keys.log_prob)
        expected = tensordict.get(keys.sample_log_prob).shape
        if log_prob.shape != expected:
            raise ValueError(
                f"The actor's {keys.log_prob!r} has shape {tuple(log_prob.shape)}, but "
                f"{keys.sample_log_prob!r} has {tuple(expected)}."
            )
        return log_prob, ScoredActions(log_prob, scored.get(keys.entropy, None), None), False

    def _get_entropy(self, dist: ScoredActions, adv_shape: torch.Size) -> Tensor | TensorDictBase:
        if dist.dist is not None:
            return super()._get_entropy(dist.dist, adv_shape)  # type: ignore[misc]
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

    # -- micro-batches --------------------------------------------------------------------------------

    def micro_batches(self, minibatch: TensorDictBase, size: int) -> Sequence[TensorDictBase]:
        """Deal a minibatch in parts whose losses, and gradients, add up to those of the whole.

        Every part knows how many steps count in the whole, so that a step weighs the same in whichever part.
        Whiten the advantage before: a part does not know the statistics of the others.

        Args:
            minibatch: the data, of batch size ``[B, ...]``.
            size: most rows a part.

        Returns:
            The parts; the minibatch itself, as it is, where it has no more rows than that.

        Raises:
            ValueError: if the loss itself standardises the advantage or the value target.
        """
        if len(minibatch) <= size:
            return [minibatch]
        if self.normalize_advantage or self.advantage_norm is not None or self.value_norm is not None:
            raise ValueError(
                "Statistics of a minibatch cannot be had from its parts: leave normalize_advantage, "
                "advantage_norm and value_norm out, and whiten the advantage of the whole rollout."
            )
        mask = validity_mask(minibatch, self.loss_mask_key)
        steps = minibatch.get(self.tensor_keys.advantage)[..., 0] if mask is None else mask
        count = steps.new_tensor(steps.numel() if mask is None else int(mask.sum()), dtype=torch.int64)
        minibatch = minibatch.copy()
        return minibatch.set(self.tensor_keys.num_valid, count.expand(minibatch.batch_size)).split(size)

    def merge(self, outputs: Sequence[TensorDictBase], minibatch: TensorDictBase) -> TensorDictBase:
        """Put the outputs of all micro-batches together; returns those of the whole minibatch.

        Args:
            outputs: what :meth:`forward` returned for the parts, in their order.
            minibatch: the whole.
        """
        if len(outputs) == 1:
            return outputs[0]
        means = [output.exclude("log_ratio", "value", "composite_entropy") for output in outputs]
        log_ratio = torch.cat([output["log_ratio"] for output in outputs])
        mask = validity_mask(minibatch, self.loss_mask_key)
        whole = torch.stack(means).sum(0).update(ratio_statistics(log_ratio, mask))
        if outputs[0].get("value", None) is not None:
            target = minibatch.get(self.tensor_keys.value_target)
            value = torch.cat([output["value"] for output in outputs])
            whole.set("explained_variance", masked_explained_variance(target, value, mask))
        return whole
