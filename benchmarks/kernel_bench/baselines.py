"""What one would write without the kernels: eager PyTorch, and the libraries' functions.

The eager functions compute in ``compute``, by default float32 (float64 for float64 inputs), as a careful user
would; in float64 they are the reference of the equivalence gate, and in the inputs' own low precision the
yardstick of its errors.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: What is compared with if it can be imported; otherwise the report says that it was left out.
_NAMES = ("torchrl", "liger_kernel", "cut_cross_entropy")
LIBRARIES = {name: importlib.util.find_spec(name) is not None for name in _NAMES}


def wide(tensor: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """Return the tensor in the dtype of the computation."""
    return tensor.to(compute or torch.promote_types(tensor.dtype, torch.float32))


def em_eager(
    chosen: Tensor,
    rejected: Tensor,
    users: Tensor,
    user_offsets: Tensor,
    log_prior: Tensor,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Cast, logsigmoid, ``index_add_`` by the user of each pair ``[P]``, softmax and logsumexp."""
    log_choice = F.logsigmoid(wide(chosen, compute) - wide(rejected, compute))
    sums = log_choice.new_zeros(user_offsets.shape[0] - 1, chosen.shape[1])
    joint = sums.index_add_(0, users, log_choice) + log_prior.to(log_choice.dtype)
    return torch.softmax(joint, dim=-1).detach(), torch.logsumexp(joint, dim=-1)


def min_eager(rewards: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimum, argmin and soft minimum of rewards ``[N, K]``, after the rewards themselves."""
    minimum, argmin = rewards.min(dim=-1)
    total = torch.logsumexp(-rewards / temperature, dim=-1) - math.log(rewards.shape[-1])
    return rewards, minimum, argmin, -temperature * total


def heads_eager(
    hidden: Tensor, weight: Tensor, bias: Tensor, compute: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One linear layer of K outputs in the inputs' dtype, then minimum and logsumexp."""
    return min_eager(wide(F.linear(hidden, weight, bias), compute))


def heads_separate(
    hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K reward models' heads, each an ``nn.Linear(H, 1)`` of its own."""
    rewards = [F.linear(hidden, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return min_eager(wide(torch.cat(rewards, dim=-1)))


def gae_eager(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: float,
    lmbda: float,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantage and value target by a Python loop over time, all rows and columns at once."""
    reward, value, next_value = (wide(x, compute) for x in (reward, value, next_value))
    delta = reward + gamma * next_value * ~terminated - value
    decay = (~done).to(delta.dtype) * (gamma * lmbda)
    advantage = torch.empty_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + decay[:, t] * following
        advantage[:, t] = following
    return advantage, advantage + value


def token_gae_eager(
    terminal_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    sample_log_prob: Tensor,
    ref_log_prob: Tensor,
    group_weights: Tensor,
    kl_coef: float,
    gamma: float,
    lmbda: float,
    estimate: Callable[..., tuple[Tensor, Tensor]] = gae_eager,
    compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Build every token's rewards, next values and ends, estimate, weight, and take the masked moments."""
    terminal_reward, value = wide(terminal_reward, compute), wide(value, compute)
    penalty = -kl_coef * (wide(sample_log_prob, compute) - wide(ref_log_prob, compute))
    last = (torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1).unsqueeze(-1)
    reward = torch.cat([last * terminal_reward.unsqueeze(1), penalty.unsqueeze(-1)], -1)
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    ends = last.expand(value.shape).contiguous()
    advantage = estimate(reward, value, next_value, ends, ends, gamma, lmbda)[0] * mask.unsqueeze(-1)
    weights = torch.cat([group_weights, group_weights.new_ones(1)]).to(advantage.dtype)
    weighted = (advantage * weights).sum(-1, keepdim=True)
    count = mask.sum()
    mean = weighted.sum() / count
    variance = ((weighted - mean).square() * mask.unsqueeze(-1)).sum() / count
    return advantage, advantage + value, weighted, torch.stack([count.to(mean.dtype), mean, variance])


def gae_torchrl(kind: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Call a function of TorchRL: its vectorised estimate (the default of its modules) or its loop."""
    from torchrl.objectives.value import functional

    reward, value, next_value, done, terminated, gamma, lmbda = inputs
    return getattr(functional, kind)(gamma, lmbda, value, next_value, reward, done, terminated)


def log_probs_eager(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, compute: torch.dtype | None = None
) -> tuple[Tensor]:
    """All logits in the inputs' dtype, ``log_softmax``, and the target's entry."""
    log_p = torch.log_softmax(wide(hidden @ lm_head.mT, compute), dim=-1)
    return (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),)


def log_probs_liger(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> tuple[Tensor]:
    """Liger's fused linear cross-entropy without reduction, negated."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return (-LigerFusedLinearCrossEntropyLoss(reduction="none")(lm_head, hidden, targets),)


def log_probs_cut(hidden: Tensor, lm_head: Tensor, targets: Tensor) -> tuple[Tensor]:
    """Apple's cut cross-entropy without reduction, negated; small gradients are kept, as ours are."""
    from cut_cross_entropy import linear_cross_entropy

    exact = {"filter_eps": None, "reduction": "none"}
    return (-linear_cross_entropy(hidden, lm_head, targets, **exact),)
