"""Triton kernel of vector-reward GAE, and its launcher.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers. One
program scans one row of the batch for BLOCK_K columns, from the last chunk of time steps to the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import next_power_of_2, on_device_of


@triton.jit
def then_earlier(a_late, b_late, a_early, b_early):
    """Compose ``x -> a x + b`` of the later steps with the earlier one; a = 0 forgets even a NaN."""
    return a_early * a_late, b_early + tl.where(a_early == 0.0, 0.0, a_early * b_late)


@triton.jit
def gae_kernel(
    p_reward,
    p_value,
    p_next_value,
    p_done,
    p_terminated,
    p_mask,
    p_advantage,
    p_target,
    gamma,
    decay,
    T,
    K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scan one row of the batch, carrying the advantage of the chunk that follows."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_carry = tl.zeros((BLOCK_K,), dtype=tl.float32)
    t_start = (tl.cdiv(T, BLOCK_T) - 1) * BLOCK_T
    while t_start >= 0:
        o_t = t_start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        o_row = i_b * T + o_t
        m_tk = m_t[:, None]
        if K % BLOCK_K != 0:
            m_tk = m_tk & m_k[None, :]
        o_tk = o_row[:, None] * K + o_k[None, :]
        b_value = tl.load(p_value + o_tk, mask=m_tk, other=0.0).to(tl.float32)
        b_next = tl.load(p_next_value + o_tk, mask=m_tk, other=0.0).to(tl.float32)
        b_reward = tl.load(p_reward + o_tk, mask=m_tk, other=0.0).to(tl.float32)
        m_end = tl.load(p_done + o_row, mask=m_t, other=1) != 0
        m_term = tl.load(p_terminated + o_row, mask=m_t, other=1) != 0
        m_valid = m_t
        if HAS_MASK:
            m_valid = tl.load(p_mask + o_row, mask=m_t, other=0) != 0
        # where, not a product: what stands behind an end or under the padding may be NaN.
        b_delta = b_reward + tl.where(m_term[:, None], 0.0, gamma * b_next) - b_value
        b_delta = tl.where(m_valid[:, None], b_delta, 0.0)
        b_a = tl.where((m_valid & (m_end == 0))[:, None], decay, 0.0)
        b_a = tl.broadcast_to(b_a, (BLOCK_T, BLOCK_K))
        b_a, b_adv = tl.associative_scan((b_a, b_delta), 0, then_earlier, reverse=True)
        b_adv += tl.where(b_a == 0.0, 0.0, b_a * b_carry[None, :])
        b_carry = tl.sum(tl.where((o_t == t_start)[:, None], b_adv, 0.0), axis=0)
        tl.store(p_advantage + o_tk, b_adv, mask=m_tk)
        tl.store(p_target + o_tk, b_adv + b_value, mask=m_tk)
        t_start -= BLOCK_T


def gae_config(steps: int, columns: int) -> dict[str, int]:
    """Return the tile: at most 32 columns, and time steps to about 1024 elements."""
    block_k = min(next_power_of_2(columns), 32)
    block_t = min(max(next_power_of_2(steps), 16), max(16, 1024 // block_k))
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": 4}


def gae_forward(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    gamma: float,
    lmbda: float,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`gae_kernel`."""
    batch, steps, columns = reward.shape
    advantage = torch.empty(reward.shape, dtype=torch.float32, device=reward.device)
    target = torch.empty_like(advantage)
    if reward.numel() == 0:
        return advantage, target
    flags = [None if x is None else x.contiguous().view(torch.uint8) for x in (done, terminated, mask)]
    config = gae_config(steps, columns)
    with on_device_of(reward):
        gae_kernel[(batch, triton.cdiv(columns, config["BLOCK_K"]))](
            reward.contiguous(),
            value.contiguous(),
            next_value.contiguous(),
            *flags,
            advantage,
            target,
            gamma,
            gamma * lmbda,
            steps,
            K=columns,
            HAS_MASK=mask is not None,
            **config,
        )
    return advantage, target
