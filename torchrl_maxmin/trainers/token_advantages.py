"""Advantages of the tokens of responses, with a critic or without, and the metrics of a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from maxmin_kernels import token_gae
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_maxmin.masks import ROW_LENGTHS, RowLengths, whiten
from torchrl_maxmin.models.full import LanguageNetworks
from torchrl_maxmin.objectives import grpo_advantage, kl_estimate, rloo_advantage, scalarise_advantage
from torchrl_maxmin.trainers.ppo import Metrics
from torchrl_maxmin.trainers.ppo_config import PPOConfig

__all__ = [
    "LanguageAdvantages",
    "ResponseAdvantages",
    "TokenAdvantages",
    "make_advantages",
    "mismatch",
    "rollout_metrics",
]


def make_advantages(
    config: PPOConfig, models: LanguageNetworks, kl: Any, *, fresh: bool
) -> LanguageAdvantages:
    """The advantages that ``--advantage`` asks for; arguments as :class:`LanguageAdvantages` takes them."""
    common: dict[str, Any] = {"models": models, "kl": kl, "kl_estimator": config.kl_estimator, "fresh": fresh}
    common["importance_sampling_cap"] = config.largest_importance_weight
    common["fixed_shapes"] = config.fixed_shapes
    common["compare_sampler"] = config.samples_in_vllm and not config.truncated
    if config.advantage == "gae":
        return TokenAdvantages(**common, gamma=config.gamma, lmbda=config.lam)
    return ResponseAdvantages(
        **common,
        estimator=config.advantage,
        num_generations=config.num_generations,
        scale_rewards=config.scale_rewards or "group",
    )


class LanguageAdvantages(ABC):
    """What all advantages of tokens share: the reference, the KL penalty and what is logged.

    Where top-k or top-p shape the rollouts, let m be the distribution that is sampled: the policy p on the
    tokens kept, divided by their probability Z. A batch has log m in ``sample_log_prob`` and log p, which is
    log m + log Z, in ``whole_log_prob``.

    - Utilities of groups are those of m, whose responses are scored: unbiased for m, and no estimate for p,
      some of whose tokens are never seen.
    - The KL is that of m to the whole reference, sampled as log m - log p_ref: unbiased (k1), and above 0
      while p is the reference still. The penalty is beta times it, and so the objective is F_u(m). k3 is low
      by the probability that the reference gives to the tokens left out.
    - PPO's ratio is p's, 1 at the first update: ``sample_log_prob`` of the rows is that of p. Where the
      advantages of a state's tokens have the mean 0 under m, as with an exact critic, samples of m give
      log p the gradient that they give log m, the tokens kept held fixed: the update climbs F_u(m). What
      the mean is off by (the critic's error; rloo and grpo have no value of the state) adds the gradient
      of log Z times it.
    - With ``importance_sampling_cap`` a token counts p/m = Z, which takes back that the tokens kept are
      sampled too often, and makes up neither for those left out nor for the tokens before.

    Args:
        models: give the reference's log-probabilities, and the values where there is a critic.
        kl: controls the weight of the penalty, beta, from one rollout to the next.
        kl_estimator: of the penalty of a token, see :func:`~torchrl_maxmin.objectives.kl_estimate`.
        fresh: whether the policy is the reference still, which the first rollout is checked for.
        importance_sampling_cap: most that a token counts for being likelier to the trainer than to the
            sampler; 0 takes the two to be the same.
        compare_sampler: measure how far the two are apart in every rollout, with a cap of 0 too.
        fixed_shapes: take all columns of the rows for real, so that an update's shapes are those of the rows.
    """

    def __init__(
        self,
        models: LanguageNetworks,
        kl: Any,
        kl_estimator: str,
        *,
        fresh: bool,
        importance_sampling_cap: float = 0.0,
        compare_sampler: bool = False,
        fixed_shapes: bool = False,
    ):
        self.fixed_shapes = fixed_shapes
        self.models, self.kl, self.kl_estimator, self.fresh = models, kl, kl_estimator, fresh
        self.importance_sampling_cap, self.compare_sampler = importance_sampling_cap, compare_sampler

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> tuple[TensorDictBase, Metrics]:
        """Return the rows that the loss reads, and the rollout's metrics; beta moves on the KL.

        Args:
            batch: batch size [B], as :class:`~torchrl_maxmin.rollouts.language.LanguageRollouts` yields it,
                with ``group_weights`` [B, K].
        """
        rows = batch.select(
            "prompt_tokens", "prompt_mask", "action", "action_mask", "sample_log_prob", "group_weights"
        )
        rows["ref_log_prob"] = self.models.ref_log_prob(rows)
        metrics: Metrics = {}
        # the ratio is of the whole distribution, which is trained
        sampled = rows["sample_log_prob"]
        rows["sample_log_prob"] = whole = batch.get("whole_log_prob", sampled)
        if self.fresh:
            scored = self.models.check_first_rollout(rows)
            metrics = mismatch(scored, rows[: len(scored)])
            self.fresh = False
        weight = None
        if self.importance_sampling_cap or self.compare_sampler:
            scored = self.models.log_prob(rows)
            metrics = mismatch(scored, rows)
        if self.importance_sampling_cap:
            ratio = (scored - sampled).exp()
            weight = ratio.clamp(max=self.importance_sampling_cap).unsqueeze(-1)
            rows["sample_log_prob"] = scored
        coef = self.kl.coef
        log_mass = whole - sampled  # 0 but for top-k and top-p
        penalty = kl_estimate(rows["sample_log_prob"] - log_mass - rows["ref_log_prob"], self.kl_estimator)
        self.estimate(rows, batch["next", "reward"], penalty, coef)
        if weight is not None:
            rows["advantage"] = rows["advantage"] * weight
        metrics |= rollout_metrics(batch, rows["ref_log_prob"], coef)
        # the controller takes the penalty that each response paid
        self.kl.update([-coef * metrics["objective/kl"]] * len(rows))
        self.kl.coef = float(self.kl.coef)
        rows.set_non_tensor(ROW_LENGTHS, (RowLengths.full if self.fixed_shapes else RowLengths.of)(rows))
        return rows, metrics

    @abstractmethod
    def estimate(self, rows: TensorDictBase, reward: Tensor, penalty: Tensor, coef: float) -> None:
        """Write ``advantage`` [B, R, 1], and what a critic learns from, into the rows.

        Args:
            rows: batch size [B], with ``action_mask`` [B, R] and ``group_weights`` [B, K].
            reward: of the responses [B, K].
            penalty: estimates of the KL of each token [B, R]; anything where the mask is False.
            coef: beta.
        """

    def state_dict(self) -> dict[str, Any]:
        """The weight of the penalty."""
        return {"kl_coef": self.kl.coef}


class TokenAdvantages(LanguageAdvantages):
    """Advantages by a critic: one column a group, one for the KL penalty, and their sum, whitened.

    Args:
        models, kl, kl_estimator: see :class:`LanguageAdvantages`.
        gamma: discount.
        lmbda: trace decay.
        **options: those of :class:`LanguageAdvantages`.
    """

    def __init__(
        self,
        models: LanguageNetworks,
        kl: Any,
        kl_estimator: str,
        *,
        gamma: float,
        lmbda: float,
        **options: Any,
    ):
        super().__init__(models, kl, kl_estimator, **options)
        self.gamma, self.lmbda = gamma, lmbda

    def estimate(self, rows: TensorDictBase, reward: Tensor, penalty: Tensor, coef: float) -> None:
        """Write ``advantage``, ``state_value`` and ``value_target``, the latter two [B, R, K + 1]."""
        mask = rows["action_mask"]
        rows["state_value"] = self.models.values(rows)
        columns, rows["value_target"] = token_gae(
            reward,
            rows["state_value"],
            mask,
            gamma=self.gamma,
            lmbda=self.lmbda,
            sample_log_prob=penalty,  # less nothing: any estimate, not the difference of two alone
            ref_log_prob=torch.zeros_like(penalty),
            kl_coef=coef,
        )
        rows["advantage"] = whiten(scalarise_advantage(columns, rows["group_weights"]), mask)


class ResponseAdvantages(LanguageAdvantages):
    """Advantages without a critic: of a whole response, from the others to its prompt, for all its tokens.

    Each group's reward has a baseline of its own, then the columns are weighed. The KL penalty of a response,
    -beta times the sum over its tokens, is the last column, with a baseline of its own and never divided by a
    deviation. The sum is not whitened: a deviation of the rollout would couple its prompts, and a mean over
    tokens would count long responses more, so that ``rloo`` were no longer unbiased (TRL's
    ``normalize_advantages`` is off by default, too). The estimators are those of
    :mod:`~torchrl_maxmin.objectives.response_advantage`; the loss around them is that of PPO, clipped by
    token and averaged over the tokens of a minibatch.

    Args:
        models, kl, kl_estimator: see :class:`LanguageAdvantages`.
        estimator: ``rloo`` or ``grpo``.
        num_generations: responses to every prompt, n; those to one prompt are side by side in a batch.
        scale_rewards: of grpo, see :func:`~torchrl_maxmin.objectives.grpo_advantage`.
        **options: those of :class:`LanguageAdvantages`.
    """

    def __init__(
        self,
        models: LanguageNetworks,
        kl: Any,
        kl_estimator: str,
        *,
        estimator: str,
        num_generations: int,
        scale_rewards: str = "group",
        **options: Any,
    ):
        super().__init__(models, kl, kl_estimator, **options)
        self.estimator, self.num_generations = estimator, num_generations
        self.scale_rewards = scale_rewards

    def estimate(self, rows: TensorDictBase, reward: Tensor, penalty: Tensor, coef: float) -> None:
        """Write ``advantage``, the same at all tokens of a response."""
        mask = rows["action_mask"]
        paid = -coef * torch.where(mask, penalty, 0.0).sum(-1, keepdim=True)
        reward, paid = (column.unflatten(0, (-1, self.num_generations)) for column in (reward, paid))
        if self.estimator == "rloo":
            columns = [rloo_advantage(reward), rloo_advantage(paid)]
        else:
            columns = [grpo_advantage(reward, self.scale_rewards), grpo_advantage(paid, "none")]
        of_response = scalarise_advantage(torch.cat(columns, -1).flatten(0, 1), rows["group_weights"])
        rows["advantage"] = torch.where(mask, of_response, 0.0).unsqueeze(-1)


def mismatch(scored: Tensor, rows: TensorDictBase) -> Metrics:
    """How far the trainer's log-probabilities of sampled tokens are from the sampler's, in nats a token.

    ``_kl`` estimates the divergence of the sampler from the trainer, by k3.

    Args:
        scored: the trainer's [B, R].
        rows: with ``sample_log_prob`` and ``action_mask`` [B, R].
    """
    log_ratio = (scored - rows["sample_log_prob"])[rows["action_mask"]]
    apart = log_ratio.abs()
    return {
        "rollout/log_prob_mismatch_max": float(apart.max()),
        "rollout/log_prob_mismatch_mean": float(apart.mean()),
        "rollout/log_prob_mismatch_kl": float(kl_estimate(-log_ratio, "k3").mean()),
    }


def rollout_metrics(batch: TensorDictBase, ref_log_prob: torch.Tensor, kl_coef: float) -> Metrics:
    """Metrics of one rollout.

    Args:
        batch: the rollout, batch size [B], with ``group_weights``.
        ref_log_prob: the reference's log-probabilities [B, R].
        kl_coef: beta, as it was for this rollout.

    Returns:
        ``objective/kl`` is the sampled KL of a whole response in nats; ``objective/welfare`` the
        worst group's reward less beta times it; ``rewards/{k}/mean`` calibrated rewards.
    """
    mask, log_prob = batch["action_mask"], batch["sample_log_prob"]
    rewards = batch["next", "group_reward"]
    utilities = rewards.mean(0)
    kl = ((log_prob - ref_log_prob) * mask).sum(-1).mean()
    metrics: dict[str, Any] = {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(log_prob * mask).sum(-1).mean(),
        "objective/scores": (batch["next", "reward"] * batch["group_weights"]).sum(-1).mean(),
        "objective/welfare": utilities.min() - kl_coef * kl,
        "maxmin/worst_group": utilities.argmin(),
        "completions/mean_length": mask.sum(-1).float().mean(),
    }
    for k, reward in enumerate(rewards.T):
        metrics |= {f"rewards/{k}/mean": reward.mean(), f"rewards/{k}/std": reward.std(correction=0)}
    return {name: float(value) for name, value in metrics.items()}
