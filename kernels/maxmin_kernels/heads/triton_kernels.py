"""Triton kernels of the reward heads, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import INTERPRET, aligned_rows, contiguous, next_power_of_2, on_device_of
from .naive import linear_rewards

# Beyond this many heads the rewards come from the library's matrix product.
MAX_FUSED_HEADS = 64


@triton.jit
def unmasked(p_mask, o_x, m_x):
    """Return which of the positions ``m_x`` the mask leaves, all of them without a mask."""
    if p_mask is not None:
        m_x = m_x & (tl.load(p_mask + o_x, mask=m_x, other=0) != 0)
    return m_x


@triton.jit
def exp_above(b_r, b_min, m_k, temperature):
    """Return ``exp(-(r - min) / T)``, 0 in padding; a head at an infinite minimum counts as 1."""
    b_above = tl.where(b_r == b_min[:, None], 0.0, b_r - b_min[:, None])
    return tl.where(m_k, tl.exp(-b_above / temperature), 0.0)


@triton.jit
def store_lowest(
    b_r, p_head_mask, p_min, p_arg, p_soft, p_sums, temperature, i_n, o_n, m_n, m_real, o_k, m_k,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store minimum, argmin, soft minimum of each row of a block ``[N, BLOCK_K]`` of rewards, and the sum.

    Only real heads count; a row outside ``m_real`` gives 0.
    """
    if p_sums is not None:
        tl.store(p_sums + i_n * K + o_k, tl.sum(b_r, axis=0), mask=m_k)
    m_head, heads = unmasked(p_head_mask, o_k, m_k), K
    if p_head_mask is not None:
        heads = tl.maximum(tl.sum(m_head.to(tl.float32), axis=0), 1.0)
    m_head = m_head[None, :]
    m_nan = (b_r != b_r) & m_head
    b_min = tl.min(tl.where(m_nan | (m_head == 0), float("inf"), b_r), axis=1)
    b_nan = tl.sum(tl.where(m_nan, b_r, 0.0), axis=1)
    m_any = tl.max(m_nan.to(tl.int32), axis=1) > 0
    m_hit = tl.where(m_any[:, None], m_nan, (b_r == b_min[:, None]) & m_head)
    b_arg = tl.min(tl.where(m_hit, o_k[None, :], BLOCK_K), axis=1)
    b_exp = exp_above(b_r, b_min, m_head, temperature)
    b_soft = b_min - temperature * tl.log(tl.sum(b_exp, axis=1) / heads)
    b_min = tl.where(m_real, tl.where(m_any, b_nan, b_min), 0.0)
    b_soft = tl.where(m_real, tl.where(m_any, b_nan, b_soft), 0.0)
    # No head is hit where all are masked.
    b_arg = tl.where(m_real & (b_arg < BLOCK_K), b_arg, 0).to(tl.int64)
    tl.store(p_min + o_n, b_min, mask=m_n)
    tl.store(p_arg + o_n, b_arg, mask=m_n)
    tl.store(p_soft + o_n, b_soft, mask=m_n)


@triton.jit
def heads_forward_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_shift,
    p_scale,
    p_head_mask,
    p_row_mask,
    p_rewards,
    p_min,
    p_arg,
    p_soft,
    p_sums,
    temperature,
    N,
    stride_hidden,
    stride_weight,
    H: tl.constexpr,
    K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rewards of BLOCK_N rows, the lowest of each, and their sum, in one pass over the hidden states."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    m_real = unmasked(p_row_mask, o_n, m_n)
    p_h = p_hidden + o_n[:, None] * stride_hidden + o_h[None, :]
    p_w = p_weight + o_k[None, :] * stride_weight + o_h[:, None]
    b_r = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for i_h in range(0, H, BLOCK_H):
        if H % BLOCK_H == 0:
            b_h = tl.load(p_h + i_h, mask=m_real[:, None], other=0.0)
            b_w = tl.load(p_w + i_h, mask=m_k[None, :], other=0.0)
        else:
            m_h = i_h + o_h < H
            b_h = tl.load(p_h + i_h, mask=m_real[:, None] & m_h[None, :], other=0.0)
            b_w = tl.load(p_w + i_h, mask=m_k[None, :] & m_h[:, None], other=0.0)
        if UPCAST:
            b_h = b_h.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_r = tl.dot(b_h, b_w, acc=b_r, input_precision="ieee")
    if p_bias is not None:
        b_r += tl.load(p_bias + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if p_shift is not None:
        b_r -= tl.load(p_shift + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if p_scale is not None:
        b_r /= tl.load(p_scale + o_k, mask=m_k, other=1.0).to(tl.float32)[None, :]
    b_r = tl.where(m_real[:, None], b_r, 0.0)
    tl.store(p_rewards + o_n[:, None] * K + o_k[None, :], b_r, mask=m_n[:, None] & m_k[None, :])
    store_lowest(
        b_r, p_head_mask, p_min, p_arg, p_soft, p_sums, temperature, i_n, o_n, m_n, m_real, o_k, m_k,
        K, BLOCK_K,
    )  # fmt: skip


@triton.jit
def min_forward_kernel(
    p_rewards,
    p_head_mask,
    p_row_mask,
    p_min,
    p_arg,
    p_soft,
    p_sums,
    temperature,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The lowest of each row of given rewards, and the sum of BLOCK_N rows."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    m_real = unmasked(p_row_mask, o_n, m_n)
    m_nk = m_real[:, None] & m_k[None, :]
    b_r = tl.load(p_rewards + o_n[:, None] * K + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)
    store_lowest(
        b_r, p_head_mask, p_min, p_arg, p_soft, p_sums, temperature, i_n, o_n, m_n, m_real, o_k, m_k,
        K, BLOCK_K,
    )  # fmt: skip


@triton.jit
def min_backward_kernel(
    p_rewards,
    p_arg,
    p_grad_rewards,
    p_grad_min,
    p_grad_soft,
    p_grad_sums,
    p_head_mask,
    p_row_mask,
    p_grad,
    temperature,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up what reaches each reward directly, as the minimum, in the soft minimum and in the sum."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    m_real, m_head = unmasked(p_row_mask, o_n, m_n), unmasked(p_head_mask, o_k, m_k)[None, :]
    m_nk = m_real[:, None] & m_k[None, :]
    o_nk = o_n[:, None] * K + o_k[None, :]
    b_grad = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if p_grad_rewards is not None:
        b_grad = tl.load(p_grad_rewards + o_nk, mask=m_nk, other=0.0).to(tl.float32)
    if p_grad_sums is not None:
        b_grad_sums = tl.load(p_grad_sums + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_grad += tl.where(m_nk, b_grad_sums[None, :], 0.0)
    if p_grad_min is not None:
        b_arg = tl.load(p_arg + o_n, mask=m_real, other=0).to(tl.int32)
        b_grad_min = tl.load(p_grad_min + o_n, mask=m_real, other=0.0).to(tl.float32)
        b_grad += tl.where((b_arg[:, None] == o_k[None, :]) & m_head, b_grad_min[:, None], 0.0)
    if p_grad_soft is not None:
        b_r = tl.load(p_rewards + o_nk, mask=m_nk, other=0.0).to(tl.float32)
        m_nan = (b_r != b_r) & m_head
        b_nan = tl.sum(tl.where(m_nan, b_r, 0.0), axis=1)
        b_min = tl.min(tl.where(m_nan | (m_head == 0), float("inf"), b_r), axis=1)
        b_exp = exp_above(b_r, b_min, m_head, temperature)
        b_sum = tl.sum(b_exp, axis=1)
        b_grad_soft = tl.load(p_grad_soft + o_n, mask=m_real, other=0.0).to(tl.float32)
        # The sum is 0 where all heads are masked.
        b_grad += b_exp * ((b_grad_soft + b_nan) / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    tl.store(p_grad + o_nk, b_grad, mask=m_n[:, None] & m_k[None, :])


def heads_config(rows: int, heads: int, itemsize: int) -> dict[str, int]:
    """Return tile sizes: few rows a program while there are too few programs to fill the GPU."""
    block_k = max(16, next_power_of_2(heads))
    # With more, the accumulators of a wide float32 tile leave no registers for the rest.
    most = 32 if itemsize > 2 and block_k >= 64 else 64
    return {
        "BLOCK_N": 16 if rows <= 2048 else 32 if rows <= 8192 else most,
        "BLOCK_H": 64 if itemsize == 2 else 32,
        "BLOCK_K": block_k,
        "num_warps": 4,
        "num_stages": 4,
    }


def row_config(heads: int) -> dict[str, int]:
    """Return tile sizes of the row kernels: about 1024 rewards a program."""
    block_k = next_power_of_2(heads)
    return {"BLOCK_N": max(1, 1024 // block_k), "BLOCK_K": block_k, "num_warps": 4}


def _lowest(like: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make minimum, argmin and soft minimum."""
    minimum = like.new_empty(rows, dtype=torch.float32)
    return minimum, like.new_empty(rows, dtype=torch.int64), torch.empty_like(minimum)


def _total(partial: Tensor | None, like: Tensor) -> Tensor:
    """Add the programs' partial sums ``[programs, K]`` in float64; empty without any."""
    return like.new_empty(0) if partial is None else partial.sum(0, dtype=torch.float64).float()


def heads_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`heads_forward_kernel`."""
    (rows, width), heads = hidden.shape, weight.shape[0]
    if heads > MAX_FUSED_HEADS:
        rewards = linear_rewards(hidden, weight, bias, shift, scale, row_mask)
        return (rewards, *min_forward(rewards, temperature, head_mask, row_mask, sums))
    config = heads_config(rows, heads, max(hidden.element_size(), weight.element_size()))
    programs = triton.cdiv(rows, config["BLOCK_N"])
    rewards = hidden.new_empty(rows, heads, dtype=torch.float32)
    lowest, partial = _lowest(hidden, rows), rewards.new_empty(programs, heads) if sums else None
    if rows:
        hidden, weight = aligned_rows(hidden), aligned_rows(weight)
        with on_device_of(hidden):
            heads_forward_kernel[(programs,)](
                hidden,
                weight,
                *contiguous(bias, shift, scale, head_mask, row_mask),
                rewards,
                *lowest,
                partial,
                temperature,
                rows,
                hidden.stride(0),
                weight.stride(0),
                H=width,
                K=heads,
                # The interpreter is wrong on bf16 products, and a product has factors of one dtype.
                UPCAST=INTERPRET or hidden.dtype != weight.dtype,
                **config,
            )
    return rewards, *lowest, _total(partial, rewards)


def min_forward(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`min_forward_kernel`."""
    rows, heads = rewards.shape
    config = row_config(heads)
    programs = triton.cdiv(rows, config["BLOCK_N"])
    lowest = _lowest(rewards, rows)
    partial = lowest[0].new_empty(programs, heads) if sums else None
    if rows:
        inputs = contiguous(rewards, head_mask, row_mask)
        with on_device_of(rewards):
            min_forward_kernel[(programs,)](*inputs, *lowest, partial, temperature, rows, K=heads, **config)
    return *lowest, _total(partial, lowest[0])


def min_backward(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    grad_sums: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
) -> Tensor:
    """Launch :func:`min_backward_kernel`."""
    rows, heads = rewards.shape
    grad = rewards.new_empty(rows, heads, dtype=torch.float32)
    if rows == 0:
        return grad
    grads = (grad_rewards, grad_minimum, grad_softmin, grad_sums)
    inputs = contiguous(rewards, argmin, *grads, head_mask, row_mask)
    config = row_config(heads)
    with on_device_of(rewards):
        min_backward_kernel[(triton.cdiv(rows, config["BLOCK_N"]),)](
            *inputs, grad, temperature, rows, K=heads, **config
        )
    return grad
