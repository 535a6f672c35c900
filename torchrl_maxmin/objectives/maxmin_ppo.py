"""Clipped PPO for K groups: the surrogate of the weighted advantage, with a K-head critic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams, is_tensor_collection
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    dispatch,
)
from torch import Tensor
from torchrl.objectives.ppo import _broadcast_advantage_to_log_weight, _check_advantage_broadcast
from torchrl.objectives.utils import (
    _clip_value_loss,
    _maybe_add_or_extend_key,
    _sum_td_features,
    distance_loss,
)

from torchrl_maxmin.masks import (
    ROW_LENGTHS,
    expand_mask,
    fill_masked,
    masked_explained_variance,
    masked_mean,
    ratio_statistics,
    validity_mask,
)
from torchrl_maxmin.objectives.loss_contract import ScoredActions, VectorPPOLoss


class MaxMinPPOLoss(VectorPPOLoss):
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
    6. A minibatch can be dealt in micro-batches whose gradients add up to its own, see
       :meth:`micro_batches`.

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

    # -- micro-batches --------------------------------------------------------------------------------

    def micro_batches(self, minibatch: TensorDictBase, size: int) -> Sequence[TensorDictBase]:
        """Deal a minibatch in parts whose losses, and gradients, add up to those of the whole.

        Every part knows how many steps count in the whole, so that a step weighs the same in whichever part.
        Whiten the advantage before: a part does not know the statistics of the others.

        Args:
            minibatch: the data, of batch size ``[B, ...]``.
            size: most rows a part.

        Raises:
            ValueError: if the loss itself standardises the advantage or the value target.
        """
        if self.normalize_advantage or self.advantage_norm is not None or self.value_norm is not None:
            raise ValueError(
                "Statistics of a minibatch cannot be had from its parts: leave normalize_advantage, "
                "advantage_norm and value_norm out, and whiten the advantage of the whole rollout."
            )
        mask = validity_mask(minibatch, self._loss_mask_key)
        steps = minibatch.get(self.tensor_keys.advantage)[..., 0] if mask is None else mask
        count = steps.new_full((), steps.numel(), dtype=torch.int64) if mask is None else mask.sum()
        minibatch = minibatch.copy()
        return minibatch.set(self.tensor_keys.num_valid, count.expand(minibatch.batch_size)).split(size)

    def merge(self, outputs: Sequence[TensorDictBase], minibatch: TensorDictBase) -> TensorDictBase:
        """Put the outputs of all micro-batches together; returns those of the whole minibatch.

        Args:
            outputs: what :meth:`forward` returned for the parts, in their order.
            minibatch: the whole.
        """
        means = [output.exclude("log_ratio", "value", "composite_entropy") for output in outputs]
        log_ratio = torch.cat([output["log_ratio"] for output in outputs])
        mask = validity_mask(minibatch, self._loss_mask_key)
        whole = torch.stack(means).sum(0).update(ratio_statistics(log_ratio, mask))
        if outputs[0].get("value", None) is not None:
            target = minibatch.get(self.tensor_keys.value_target)
            value = torch.cat([output["value"] for output in outputs])
            whole.set("explained_variance", masked_explained_variance(target, value, mask))
        return whole

    # -- the loss -------------------------------------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses and metrics of one (mini)batch.

        Args:
            tensordict: the data; what it holds is described in the class. If there is no ``advantage``,
                advantage and value target are computed by the value estimator.

        Returns:
            A tensordict with the entries of :attr:`out_keys` (and ``composite_entropy`` for composite
            actions). For a micro-batch the statistics of the whole are left out, and ``log_ratio`` and
            ``value`` of every step put in, for :meth:`merge`.
        """
        actor, *critic = self.losses_by_network(tensordict)
        for part in critic:
            actor.update(part)
        return actor

    def losses_by_network(self, tensordict: TensorDictBase) -> Iterator[TensorDictBase]:
        """Yield the actor's outputs of :meth:`forward`, then the critic's where there is one.

        The critic runs when its outputs are asked for: a caller that takes the backward pass of the actor's
        before holds the activations of one network at a time. Gradients are those of the sum.

        Args:
            tensordict: as for :meth:`forward`.
        """
        keys = self.tensor_keys
        tensordict = tensordict.clone(False)
        fresh = tensordict.get(keys.advantage, None) is None
        if fresh:
            self._estimate_advantage(tensordict)
        mask = validity_mask(tensordict, self._loss_mask_key)
        read = list(getattr(self.actor_network, "in_keys", ()))
        _maybe_add_or_extend_key(read, keys.action)
        tensordict = fill_masked(tensordict, read, mask)
        count = tensordict.get(keys.num_valid, None)
        if count is not None:
            count = count.flatten()[0]
        advantage = tensordict.get(keys.advantage)
        if advantage.shape[-1:] != (1,):
            advantage = self._scalar_advantage(advantage, tensordict)
        log_weight, scored, kl_approx, log_is_weight = self._log_weight(
            tensordict, adv_shape=advantage.shape[:-1]
        )
        advantage = _broadcast_advantage_to_log_weight(advantage, log_weight)
        _check_advantage_broadcast(advantage, log_weight)
        if self.normalize_advantage or self.advantage_norm is not None:
            advantage = self._normalise(advantage, tensordict, mask, fresh=fresh)
        if mask is not None:
            # Select before the exponential: padding may hold anything.
            valid = expand_mask(mask, log_weight)
            advantage, log_weight, kl_approx = (
                torch.where(valid, x, 0.0) for x in (advantage, log_weight, kl_approx)
            )
            log_is_weight = None if log_is_weight is None else torch.where(valid, log_is_weight, 0.0)

        # The clip acts on pi / pi_prox, the surrogate is weighted by pi / pi_behaviour; the two are one
        # unless the proximal policy is delayed or the ratio capped.
        log_behaviour = log_weight if log_is_weight is None else log_weight + log_is_weight
        clipped = log_weight.clamp(*self._clip_bounds)
        log_clipped = clipped if log_is_weight is None else clipped + log_is_weight
        gains = torch.stack([log_behaviour.exp() * advantage, log_clipped.exp() * advantage], -1)
        out = TensorDict({"loss_objective": -gains.min(dim=-1).values})
        out.set("clip_fraction", masked_mean((clipped != log_weight).to(log_weight.dtype), mask, count))
        out.set("kl_approx", masked_mean(kl_approx.detach(), mask, count))

        if self.entropy_bonus:
            entropy = self._get_entropy(scored, adv_shape=advantage.shape[:-1])
            total = entropy
            if is_tensor_collection(entropy):
                out.set("composite_entropy", entropy.detach())
                total = _sum_td_features(entropy)
            out.set("entropy", masked_mean(total.detach(), mask, count))
            out.set("loss_entropy", self._weighted_loss_entropy(entropy))
        if self.kl_to_ref_coeff is not None:
            kl_to_ref = self._kl_to_ref(scored, tensordict, mask)
            out.set("kl_to_ref", masked_mean(kl_to_ref.detach(), mask, count))
            out.set("loss_kl_to_ref", self.kl_to_ref_coeff * kl_to_ref)
        log_ratio = log_behaviour.detach()
        out.update(ratio_statistics(log_ratio, mask) if count is None else {"log_ratio": log_ratio})
        for network in ("actor", "critic") if self._has_critic else ("actor",):
            if network == "critic":
                out = TensorDict()
                loss_critic, value_clip_fraction, explained_variance = self.loss_critic(tensordict, count)
                out.set("loss_critic", loss_critic)
                if value_clip_fraction is not None:
                    out.set("value_clip_fraction", value_clip_fraction)
                if explained_variance is not None:
                    out.set("explained_variance" if count is None else "value", explained_variance)
            for name in [name for name, _ in out.items() if name.startswith("loss_")]:
                if self.reduction == "mean":
                    out.set(name, masked_mean(out[name], mask, count))
                else:
                    out.set(name, self._reduce_loss(out[name], self._with_bool_masks(tensordict)).squeeze(-1))
            self._clear_weakrefs(
                tensordict,
                out,
                "actor_network_params",
                "critic_network_params",
                "target_actor_network_params",
                "target_critic_network_params",
            )
            yield out

    def loss_critic(
        self, tensordict: TensorDictBase, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The critic's loss, times ``critic_coeff``, and its masked metrics.

        Args:
            tensordict: the data, with ``value_target`` and what the critic reads.
            count: steps that count in the minibatch of which the data are a part; None where they are all.

        Returns:
            The loss of every step and column ``[*B, C]``, the fraction of clipped values or None, the
            explained variance of every column ``[C]`` (of a part the values ``[*B, C]``) or None.
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
        mask = validity_mask(tensordict, self._loss_mask_key)
        tensordict = fill_masked(tensordict, self.critic_network.in_keys, mask)
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
        if mask is not None:
            # Padding may hold NaN, which would survive a multiplication by 0 in the backward pass.
            valid = expand_mask(mask, value)
            target, value = torch.where(valid, target, 0.0), torch.where(valid, value, 0.0)
            old_value = None if old_value is None else torch.where(valid, old_value, 0.0)
        if self.value_norm is not None:
            rows = target if mask is None else target[valid.all(-1)]
            if rows.numel():  # statistics of nothing would be NaN for good
                self.value_norm.update(rows)
            target, value = self.value_norm.normalize(target), self.value_norm.normalize(value)
            old_value = None if old_value is None else self.value_norm.normalize(old_value)
        # torch 2.11 cannot differentiate a distance between two dtypes: of a float64 policy's return, say.
        wide = torch.promote_types(target.dtype, value.dtype)
        target, value = target.to(wide), value.to(wide)
        old_value = None if old_value is None else old_value.to(wide)
        loss = distance_loss(target, value, loss_function=self.loss_critic_type)
        clip_fraction = None
        if old_value is not None:
            loss, _ = _clip_value_loss(old_value, value, self.clip_value, target, loss, self.loss_critic_type)
            clipped = (value - old_value).detach().abs() > self.clip_value
            clip_fraction = masked_mean(clipped.to(value.dtype), mask, count)
        explained_variance = value.detach() if self.log_explained_variance else None
        if explained_variance is not None and count is None:
            explained_variance = masked_explained_variance(target.detach(), explained_variance, mask)
        return (self.critic_coeff * loss if self._has_critic else loss), clip_fraction, explained_variance

    # -- the actor ------------------------------------------------------------------------------------

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
            log_prob, dist, is_composite = super()._get_cur_log_prob(tensordict, params)
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
            scored = actor(tensordict.select(*actor.in_keys, ROW_LENGTHS, strict=False))
        log_prob = scored.get(keys.log_prob)
        expected = tensordict.get(keys.sample_log_prob).shape
        if log_prob.shape != expected:
            raise ValueError(
                f"The actor's {keys.log_prob!r} has shape {tuple(log_prob.shape)}, but "
                f"{keys.sample_log_prob!r} has {tuple(expected)}."
            )
        return log_prob, ScoredActions(log_prob, scored.get(keys.entropy, None), None), False
