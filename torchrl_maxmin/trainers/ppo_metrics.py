"""What is logged of every PPO iteration, under the field's usual names."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["rollout_metrics", "update_metrics"]


def rollout_metrics(
    batch: TensorDictBase, losses: Mapping[str, Tensor], kl_coef: float, num_groups: int
) -> dict[str, float]:
    """Metrics of one rollout and the updates on it.

    Args:
        batch: the rollout, batch size [B], as the trainer prepared it.
        losses: outputs of the loss, averaged over optimizer steps.
        kl_coef: beta, as it was for this rollout.
        num_groups: K.

    Returns:
        ``objective/kl`` is the sampled KL of a whole response in nats; ``objective/welfare`` the
        worst group's reward less beta times it; ``rewards/{k}/mean`` calibrated rewards.
    """
    mask = batch["action_mask"]
    rewards = batch["next", "group_reward"]
    utilities, each = rewards.mean(0), batch["group_weights"]
    # one weighting for all rows, or one a prompt; a mean of equal numbers need not be their value
    weights = each[0] if bool((each == each[:1]).all()) else each.mean(0)
    kl = ((batch["sample_log_prob"] - batch["ref_log_prob"]) * mask).sum(-1).mean()
    length = mask.sum(-1).float()
    metrics = {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -(batch["sample_log_prob"] * mask).sum(-1).mean(),
        "objective/scores": (batch["next", "reward"] * each).sum(-1).mean(),
        "objective/welfare": utilities.min() - kl_coef * kl,
        "maxmin/worst_group": utilities.argmin(),
        "completions/mean_length": length.mean(),
    }
    for k in range(num_groups):
        metrics[f"rewards/{k}/mean"] = rewards[:, k].mean()
        metrics[f"rewards/{k}/std"] = rewards[:, k].std(correction=0)
    metrics |= update_metrics(losses, weights)
    return {name: float(value) for name, value in metrics.items()}


def update_metrics(losses: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Metrics of the updates on one rollout, of a language model or in an environment.

    Args:
        losses: outputs of the loss, averaged over optimizer steps.
        weights: the group weights [K] that they used.
    """
    metrics = {
        "policy/clipfrac_avg": losses["clip_fraction"],
        "policy/approxkl_avg": losses["kl_approx"],
        "val/ratio": losses["mean_ratio"],
        "loss/policy_avg": losses["loss_objective"],
        "loss/value_avg": losses["loss_critic"],
    }
    if "entropy" in losses:
        metrics["policy/entropy_avg"] = losses["entropy"]
    for k, weight in enumerate(weights):
        metrics[f"maxmin/weights/{k}"] = weight
    for k, explained in enumerate(losses["explained_variance"].reshape(-1)):
        name = "kl" if k == len(weights) else str(k)
        metrics[f"val/explained_var/{name}"] = explained
    return metrics
