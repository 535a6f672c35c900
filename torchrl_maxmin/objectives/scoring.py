"""Actors that PPO can score: a distribution, or the log-probability itself from a fused operator."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from torch import Tensor
from torchrl.objectives.utils import _maybe_add_or_extend_key

from torchrl_maxmin.masks import fill_masked, validity_mask


class ScoredActions(NamedTuple):
    """What one pass of the actor says about the actions in the data; stands where PPO has its ``dist``."""

    log_prob: Any  # Tensor [*B], or a tensordict of them for composite actions
    entropy: Tensor | None  # [*B], from an actor that scores actions itself
    dist: Any  # the distribution, from a probabilistic actor


class ScoringActorMixin:
    """Lets a PPO loss take an actor that writes log-probabilities, besides a probabilistic one.

    To be put before :class:`~torchrl.objectives.PPOLoss` among the bases. The loss's keys must hold
    ``log_prob`` and ``entropy``; the contract is described in
    :class:`~torchrl_maxmin.objectives.MaxMinPPOLoss`.
    """

    actor_network: Any
    actor_network_params: Any
    functional: bool
    tensor_keys: Any
    _loss_mask_key: Any
    _loss_mask_keys: Any

    @property
    def _is_probabilistic(self) -> bool:
        actor = self.actor_network
        if isinstance(actor, (ProbabilisticTensorDictSequential, ProbabilisticTensorDictModule)):
            return True
        return self.tensor_keys.log_prob not in getattr(actor, "out_keys", ()) and hasattr(actor, "get_dist")

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
