"""From one reward a response to one reward a token: score placement and the KL column."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_maxmin.objectives.kl import kl_estimate

__all__ = ["place_at_last_token", "token_steps"]


def place_at_last_token(reward: Tensor, mask: Tensor) -> Tensor:
    """Put response rewards [B, K] on the last real token; [B, R, K], zero elsewhere.

    Args:
        reward: one row a response.
        mask: real tokens [B, R], right-padded, at least one a row.

    Example:
        >>> place_at_last_token(torch.tensor([[5.0]]), torch.tensor([[True, True, False]])).squeeze().tolist()
        [0.0, 5.0, 0.0]
    """
    return _last_token(mask)[..., None] * reward[:, None, :]


def token_steps(tensordict: TensorDictBase, kl_coef: float, kl_estimator: str = "k1") -> TensorDict:
    """A batch of responses as trajectories of tokens, ready for :class:`VectorGAE`.

    Every group's reward sits on the last real token; the penalty
    ``-kl_coef * kl_estimate(log pi - log pi_ref)`` of every token is a column of its own, the last, so
    that it is paid once and outside the minimum over groups.

    Args:
        tensordict: batch size [B], with ``("next", "reward")`` [B, K], ``action_mask``,
            ``sample_log_prob``, ``ref_log_prob`` [B, R] and ``state_value`` [B, R, K + 1].
        kl_coef: beta.
        kl_estimator: of the penalty, see :func:`~torchrl_maxmin.objectives.kl_estimate`.

    Returns:
        Batch size [B, R]: ``state_value``, ``mask`` and, under ``next``, ``state_value``,
        ``reward`` [B, R, K + 1], ``done`` and ``terminated`` [B, R, 1].
    """
    mask = tensordict["action_mask"]
    log_ratio = tensordict["sample_log_prob"] - tensordict["ref_log_prob"]
    penalty = -kl_coef * kl_estimate(log_ratio, kl_estimator) * mask
    reward = torch.cat([place_at_last_token(tensordict["next", "reward"], mask), penalty[..., None]], -1)
    value = tensordict["state_value"]
    last = _last_token(mask)[..., None]
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return TensorDict(
        {
            "state_value": value,
            "mask": mask,
            "next": {"state_value": next_value, "reward": reward, "done": last, "terminated": last},
        },
        mask.shape,
    )


def _last_token(mask: Tensor) -> Tensor:
    """True [B, R] at the last real token of each row."""
    after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], -1)
    return mask & ~after
