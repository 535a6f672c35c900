"""Advantages without a critic: other responses to the same prompt are the baseline, column by column."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["REWARD_SCALES", "grpo_advantage", "rloo_advantage"]

REWARD_SCALES = ("group", "none")


def rloo_advantage(rewards: Tensor) -> Tensor:
    """The reward less the mean of the *other* responses to its prompt: REINFORCE leave-one-out.

    The baseline of a response does not depend on it, so that ``mean_i A_i grad log pi(y_i)`` is an unbiased
    estimate of the gradient of the expected reward, for any n (Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740; ``RLOOTrainer`` of TRL with its default ``normalize_advantages=False``).
    Linear in the reward: the weighted sum of K columns is the advantage of the weighted reward.

    Args:
        rewards: ``[*N, n, K]``, n responses to each prompt; a column a group, or that of a KL penalty.

    Returns:
        The advantages, of the same shape and dtype; those of a prompt sum to 0.

    Raises:
        ValueError: for a single response a prompt.

    Example:
        >>> import torch
        >>> rloo_advantage(torch.tensor([[[1.0], [2.0], [6.0]]])).flatten().tolist()
        [-3.0, -1.5, 4.5]
    """
    n = _num_responses(rewards)
    return (rewards - rewards.mean(-2, keepdim=True)) * (n / (n - 1))


def grpo_advantage(rewards: Tensor, scale_rewards: str = "group", *, eps: float = 1e-4) -> Tensor:
    """The reward less the mean of *all* responses to its prompt, over their deviation: that of GRPO.

    With ``none`` (Dr. GRPO, https://arxiv.org/abs/2503.20783) a response's own reward in its baseline shrinks
    the expected gradient to (n - 1) / n of the exact one, in every column alike; its direction is unbiased.

    With ``group`` (DeepSeekMath, https://arxiv.org/abs/2402.03300; the default of TRL's ``GRPOTrainer``) each
    column is divided by its own deviation within the prompt. This is biased in direction: a prompt counts the
    more the less its responses differ, and each column is in a unit of its own that moves with the policy, so
    that max-min weights, which undivided utilities gave, weigh something else. Rewards that are calibrated to
    one deviation over all prompts make the second effect smaller; nothing removes it.

    Args:
        rewards: ``[*N, n, K]``, n responses to each prompt; a column a group.
        scale_rewards: ``group`` or ``none``.
        eps: added to the deviation (``torch.std``, over n - 1), as TRL does.

    Returns:
        The advantages, of the same shape and dtype; those of a prompt sum to 0.

    Raises:
        ValueError: for a single response a prompt, or another scale.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[1.0], [2.0], [6.0]]])
        >>> grpo_advantage(rewards, "none").flatten().tolist()
        [-2.0, -1.0, 3.0]
        >>> [round(x, 3) for x in grpo_advantage(rewards).flatten().tolist()]
        [-0.756, -0.378, 1.134]
    """
    _num_responses(rewards)
    centred = rewards - rewards.mean(-2, keepdim=True)
    if scale_rewards == "none":
        return centred
    if scale_rewards == "group":
        return centred / (torch.std(rewards, -2, keepdim=True) + eps)
    raise ValueError(f"scale_rewards is one of {', '.join(REWARD_SCALES)}, not {scale_rewards!r}")


def _num_responses(rewards: Tensor) -> int:
    n = rewards.shape[-2]
    if n < 2:
        raise ValueError(f"other responses are the baseline: a prompt needs 2 or more, not {n}")
    return n
