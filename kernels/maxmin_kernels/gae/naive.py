"""Generalised advantage estimation with a vector reward, in plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._backend import accumulate_dtype

Recursion = Callable[[Tensor, Tensor, float], Tensor]

# Beyond this decay of the trace, rounding adds up over so many steps that the recursion runs in float64.
SLOW_DECAY = 0.98


@torch.no_grad()
def vector_gae_naive(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    gamma: float,
    lmbda: float,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    return_moments: bool = False,
    recursion: Recursion | None = None,
) -> tuple[Tensor, ...]:
    """Return advantage and value target, ``[B, T, K]`` each, by the backward recursion.

    With ``weights`` also their weighted sum ``[B, T, 1]``, with ``return_moments`` also its moments ``[3]``.
    Arguments as :func:`maxmin_kernels.vector_gae`, the batch being one dimension; ``recursion`` takes the
    place of :func:`discounted_sum`.
    """
    dtype = accumulate_dtype(reward, value, next_value)
    value = value.to(dtype)
    # where, not a product: what stands behind an end or under the padding may be NaN.
    bootstrap = torch.where(terminated.bool(), 0.0, gamma * next_value.to(dtype))
    delta = reward.to(dtype) + bootstrap - value
    carries = ~done.bool()
    if mask is not None:
        valid = mask.bool().unsqueeze(-1)
        delta, carries = torch.where(valid, delta, 0.0), carries & valid
    advantage = (recursion or discounted_sum)(delta, carries, gamma * lmbda)
    outputs = [advantage, advantage + value]
    weighted = advantage
    if weights is not None:
        weighted = (advantage * weights.to(dtype)).sum(-1, keepdim=True)
        outputs.append(weighted)
    if return_moments:
        outputs.append(_moments(weighted.squeeze(-1), mask))
    return tuple(outputs)


@torch.no_grad()
def token_gae_naive(
    terminal_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda: float,
    sample_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    kl_coef: float = 0.0,
    group_weights: Tensor | None = None,
    return_moments: bool = False,
    recursion: Recursion | None = None,
) -> tuple[Tensor, ...]:
    """Return what :func:`maxmin_kernels.token_gae` does: build every step's signals, and estimate."""
    dtype = accumulate_dtype(terminal_reward, value, sample_log_prob, ref_log_prob)
    mask = mask.bool()
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    last = (mask & ~followed).unsqueeze(-1)
    reward = torch.where(last, terminal_reward.to(dtype).unsqueeze(1), 0.0)
    if sample_log_prob is not None and ref_log_prob is not None:
        penalty = -kl_coef * (sample_log_prob.to(dtype) - ref_log_prob.to(dtype))
        reward = torch.cat([reward, penalty.unsqueeze(-1)], -1)
        if group_weights is not None:
            group_weights = torch.cat([group_weights, group_weights.new_ones(1)])
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    return vector_gae_naive(
        reward, value, next_value, last, last, gamma, lmbda, mask, group_weights, return_moments, recursion
    )


def discounted_sum(delta: Tensor, carries: Tensor, decay: float) -> Tensor:
    """Return ``A_t = delta_t + decay A_{t+1}``, the second term where ``carries``; ``[B, T, K]``."""
    dtype = torch.float64 if decay > SLOW_DECAY else delta.dtype
    steps, keep = delta.transpose(0, 1).to(dtype).unbind(0), carries.transpose(0, 1).unbind(0)
    following = zero = delta.new_zeros((), dtype=dtype)
    sums = []
    for step, keeps in zip(reversed(steps), reversed(keep), strict=True):
        following = torch.add(step, torch.where(keeps, following, zero), alpha=decay)
        sums.append(following)
    return torch.stack(sums[::-1], 1).to(delta.dtype) if sums else delta.clone()


def discounted_sum_in_place(delta: Tensor, carries: Tensor, decay: float) -> Tensor:
    """Return what :func:`discounted_sum` does, bit for bit; it cannot be batched by vmap."""
    dtype = torch.float64 if decay > SLOW_DECAY else delta.dtype
    # One contiguous block a time step and one buffer for what is carried, so that the loop makes no copies.
    sums = delta.transpose(0, 1).to(dtype, copy=True, memory_format=torch.contiguous_format)
    keep = carries.transpose(0, 1).contiguous().unbind(0)
    zero, carried = sums.new_zeros(()), torch.empty_like(sums[0]) if len(sums) else sums
    steps = sums.unbind(0)
    for t in range(len(steps) - 2, -1, -1):
        torch.where(keep[t], steps[t + 1], zero, out=carried)
        steps[t].add_(carried, alpha=decay)
    return sums.transpose(0, 1).contiguous().to(delta.dtype)


def _moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return count, mean and biased variance of the valid elements, ``[3]``, summed in float64."""
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    count = valid.sum(dtype=torch.float64)
    mean = torch.where(valid, x.double(), 0.0).sum() / count.clamp(min=1)
    deviation = torch.where(valid, x.double() - mean, 0.0)
    return torch.stack([count, mean, deviation.square().sum() / count.clamp(min=1)]).to(x.dtype)
