"""Clipped PPO for K groups: the surrogate of the weighted advantage, with a K-head critic."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams, is_tensor_collection
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    dispatch,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.modules import ValueNorm
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.ppo import _broadcast_advantage_to_log_weight, _check_advantage_broadcast
from torchrl.objectives.utils import _maybe_add_or_extend_key, _sum_td_features

from torchrl_maxmin.objectives.critic import VectorCriticMixin
from torchrl_maxmin.objectives.kl import KL_ESTIMATORS, kl_estimate
from torchrl_maxmin.objectives.loss_advantage import VectorAdvantageMixin
from torchrl_maxmin.objectives.masked import masked_mean, ratio_statistics
from torchrl_maxmin.objectives.scoring import ScoredActions, ScoringActorMixin


class MaxMinPPOLoss(ScoringActorMixin, VectorAdvantageMixin, VectorCriticMixin, ClipPPOLoss):
    """Clipped PPO whose advantage, value target and critic have one column per group.

    In MaxMin-RLHF (https://arxiv.org/abs/2402.08925) the policy climbs ``sum_k w_k F_k`` for group
    weights ``w`` that an adversary moves. The policy gradient is linear in the advantage, so it is the
    *advantages* that are weighted, while the critic keeps a value for every group. The class covers
    language models (``[B, R]`` response tokens) and any other environment (``[*B, T]`` steps). Against
    :class:`~torchrl.objectives.ClipPPOLoss`:

    1. An advantage of K columns is scalarised with the group weights in the data; if it has K + 1, the
       last belongs to the KL penalty and has weight 1. Without weights it raises, where the parent
       averages in silence.
    2. The validity mask (:attr:`~torchrl.objectives.LossModule.loss_mask_key`) is respected by every
       output: the losses, the whitening of ``normalize_advantage=True`` (after scalarising, with the
       biased variance; 0 where all steps are equal), the metrics, and the advantage where the loss computes
       it. Masked steps may hold anything, NaN included. An empty minibatch has losses of 0.
    3. The actor may be any module that writes the log-probability of the given action from a fused
       operator, see below.
    4. A KL penalty to a reference policy can be added to the loss, by any estimator of
       :func:`~torchrl_maxmin.objectives.kl_estimate`.
    5. The critic's loss can be taken in units of every column's own spread (``value_norm``), so that a
       group with large returns does not take the critic for itself.

    With one group, no mask and the same advantage, losses and gradients equal the parent's to the bit.

    Args:
        actor_network (ProbabilisticTensorDictSequential or TensorDictModule): the policy. Either a
            probabilistic module as for the parent, or one that scores actions by itself: a
            :class:`~tensordict.nn.TensorDictModule` whose ``in_keys`` hold the action and whose
            ``out_keys`` hold ``tensor_keys.log_prob`` (default ``"log_prob"``), the log-probability of
            that action in the shape of ``sample_log_prob``, and, for an entropy bonus,
            ``tensor_keys.entropy`` (default ``"entropy"``) in the same shape. Use ``functional=False``
            for language models and sharded modules.
        critic_network (TensorDictModule, optional): writes ``state_value`` ``[*B, K]`` or
            ``[*B, K + 1]``; the loss is the mean over columns and valid steps.

    Keyword Args:
        kl_to_ref_coeff (float): weight of the KL penalty to the reference, whose log-probabilities of
            the actions are read from ``ref_log_prob``. 0 leaves the term out; a positive value can be
            rescheduled later. Defaults to ``0.0``.
        kl_estimator (str): ``"k1"``, ``"k2"`` or ``"k3"``, for that penalty. Defaults to ``"k3"``.
        value_norm (ValueNorm, optional): statistics of the value target, of shape C: the critic's loss
            and ``clip_value`` are then in their units, column by column; updated by every call, from
            valid steps alone. Defaults to ``None``.
        loss_mask_key (NestedKey, "auto" or None): the entry that marks valid steps, as the attribute of
            that name. Defaults to ``"auto"``.
        **kwargs: those of :class:`~torchrl.objectives.ClipPPOLoss`.

    Outputs: ``loss_objective``, ``loss_entropy``, ``loss_critic`` and ``loss_kl_to_ref`` where they
    apply (add them up for the loss); for logging ``clip_fraction``, ``kl_approx``, ``ESS`` (a scalar
    share of the valid steps), ``max_ratio``, ``mean_ratio``, ``entropy``, ``kl_to_ref``,
    ``value_clip_fraction`` and ``explained_variance`` (one entry a column of the critic).

    Raises:
        TypeError: on an unknown argument, or an actor of neither kind.
        ValueError: on a ``clip_epsilon`` outside 0 to 1, or a negative ``kl_to_ref_coeff``; in
            ``forward``, if a K-column advantage has no weights, or shapes do not fit.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import ProbabilisticActor
        >>> from torchrl_maxmin.objectives import MaxMinPPOLoss
        >>> module = TensorDictModule(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["logits"])
        >>> actor = ProbabilisticActor(
        ...     module, in_keys=["logits"], distribution_class=torch.distributions.Categorical
        ... )
        >>> critic = TensorDictModule(
        ...     torch.nn.Linear(3, 2), in_keys=["observation"], out_keys=["state_value"]
        ... )
        >>> loss = MaxMinPPOLoss(actor, critic)
        >>> loss.set_keys(sample_log_prob="sample_log_prob")
        >>> data = TensorDict(
        ...     {
        ...         "observation": torch.randn(5, 3),
        ...         "action": torch.randint(4, (5,)),
        ...         "sample_log_prob": torch.full((5,), -1.4),
        ...         "advantage": torch.randn(5, 2),
        ...         "group_weights": torch.tensor([0.3, 0.7]).expand(5, 2),
        ...         "value_target": torch.randn(5, 2),
        ...     },
        ...     batch_size=[5],
        ... )
        >>> sorted(key for key in loss(data).keys() if key.startswith("loss_"))
        ['loss_critic', 'loss_entropy', 'loss_objective']

        By keyword, with the outputs in the order of ``out_keys``:

        >>> _ = loss.select_out_keys("loss_objective", "loss_critic")
        >>> loss_objective, loss_critic = loss(
        ...     observation=torch.randn(5, 3),
        ...     action=torch.randint(4, (5,)),
        ...     sample_log_prob=torch.full((5,), -1.4),
        ...     advantage=torch.randn(5, 2),
        ...     group_weights=torch.tensor([0.3, 0.7]).expand(5, 2),
        ...     value_target=torch.randn(5, 2),
        ... )
    """

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
        """

        group_weights: NestedKey = "group_weights"
        ref_log_prob: NestedKey = "ref_log_prob"
        log_prob: NestedKey = "log_prob"
        entropy: NestedKey = "entropy"

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

    # -- keys -----------------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        keys: list[NestedKey] = sorted(self._in_keys or (), key=str)
        optional = ("advantage", "value_target", "value", "group_weights", "ref_log_prob")
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
            log_ratio = torch.where(mask, log_ratio, 0.0)
        return kl_estimate(log_ratio, self.kl_estimator)

    # -- the loss -------------------------------------------------------------------------------------

    def _reduce_loss(self, loss: Tensor, tensordict: TensorDictBase | None = None, **kwargs: Any) -> Tensor:
        if not loss.numel() and self.reduction == "mean":
            return loss.sum()  # of an empty minibatch: 0, with a gradient of zeros
        return super()._reduce_loss(loss, tensordict, **kwargs)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics of one (mini)batch.

        Args:
            tensordict: the data; what it holds is described in the class. If there is no ``advantage``,
                advantage and value target are computed by the value estimator.

        Returns:
            A tensordict with the entries of :attr:`out_keys` (and ``composite_entropy`` for composite
            actions).
        """
        tensordict = tensordict.clone(False)
        fresh = tensordict.get(self.tensor_keys.advantage, None) is None
        if fresh:
            self._estimate_advantage(tensordict)
        tensordict = self._finite_actor_inputs(tensordict)
        advantage = self._scalar_advantage(tensordict)
        log_weight, scored, kl_approx, log_is_weight = self._log_weight(
            tensordict, adv_shape=advantage.shape[:-1]
        )
        advantage = _broadcast_advantage_to_log_weight(advantage, log_weight)
        _check_advantage_broadcast(advantage, log_weight)
        mask = self._mask(tensordict, log_weight)
        advantage = self._normalise(advantage, tensordict, mask, fresh=fresh)
        if mask is not None:
            # Select before the exponential: padding may hold anything.
            advantage = torch.where(mask, advantage, 0.0)
            log_weight = torch.where(mask, log_weight, 0.0)
            kl_approx = torch.where(mask, kl_approx, 0.0)
            log_is_weight = None if log_is_weight is None else torch.where(mask, log_is_weight, 0.0)

        # The clip acts on pi / pi_prox, the surrogate is weighted by pi / pi_behaviour; the two are one
        # unless the proximal policy is delayed or the ratio capped.
        log_behaviour = log_weight if log_is_weight is None else log_weight + log_is_weight
        clipped = log_weight.clamp(*self._clip_bounds)
        clip_fraction = masked_mean((clipped != log_weight).to(log_weight.dtype), mask)
        log_clipped = clipped if log_is_weight is None else clipped + log_is_weight
        gains = torch.stack([log_behaviour.exp() * advantage, log_clipped.exp() * advantage], -1)
        out = TensorDict({"loss_objective": -gains.min(dim=-1).values})
        out.set("clip_fraction", clip_fraction)
        out.set("kl_approx", masked_mean(kl_approx.detach(), mask))

        if self.entropy_bonus:
            entropy = self._get_entropy(scored, adv_shape=advantage.shape[:-1])
            total = entropy
            if is_tensor_collection(entropy):
                out.set("composite_entropy", entropy.detach())
                total = _sum_td_features(entropy)
            out.set("entropy", masked_mean(total.detach(), mask))
            out.set("loss_entropy", self._weighted_loss_entropy(entropy))
        if self.kl_to_ref_coeff is not None:
            kl_to_ref = self._kl_to_ref(scored, tensordict, mask)
            out.set("kl_to_ref", masked_mean(kl_to_ref.detach(), mask))
            out.set("loss_kl_to_ref", self.kl_to_ref_coeff * kl_to_ref)
        if self._has_critic:
            loss_critic, value_clip_fraction, explained_variance = self.loss_critic(tensordict)
            out.set("loss_critic", loss_critic)
            if value_clip_fraction is not None:
                out.set("value_clip_fraction", value_clip_fraction)
            if explained_variance is not None:
                out.set("explained_variance", explained_variance)
        out.update(ratio_statistics(log_behaviour.detach(), mask))
        out = out.named_apply(
            lambda name, value: (
                self._reduce_loss(value, tensordict).squeeze(-1) if name.startswith("loss_") else value
            )
        )
        self._clear_weakrefs(
            tensordict,
            out,
            "actor_network_params",
            "critic_network_params",
            "target_actor_network_params",
            "target_critic_network_params",
        )
        return out
