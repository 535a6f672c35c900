"""Triton kernels of the reward heads, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import INTERPRET, aligned_rows, next_power_of_2, on_device_of
from .naive import linear_rewards

# Beyond this many heads the rewards come from the library's matrix product.
MAX_FUSED_HEADS = 64


@triton.jit
def lowest_head(b_r, m_n, m_k, heads, o_k, temperature, BLOCK_K: tl.constexpr):
    """Return minimum, argmin, soft minimum of each row of a block ``[N, BLOCK_K]`` of rewards.

    Only the ``heads`` real heads, those in ``m_k``, count; a row outside ``m_n`` gives 0.
    """
    m_k = m_k[None, :]
    m_nan = (b_r != b_r) & m_k
    b_min = tl.min(tl.where(m_nan | (m_k == 0), float("inf"), b_r), axis=1)
    b_nan = tl.sum(tl.where(m_nan, b_r, 0.0), axis=1)
    m_any = tl.max(m_nan.to(tl.int32), axis=1) > 0
    m_hit = tl.where(m_any[:, None], m_nan, (b_r == b_min[:, None]) & m_k)
    b_arg = tl.min(tl.where(m_hit, o_k[None, :], BLOCK_K), axis=1)
    b_exp = exp_above(b_r, b_min, m_k, temperature)
    b_soft = b_min - temperature * tl.log(tl.sum(b_exp, axis=1) / heads)
    b_min = tl.where(m_n, tl.where(m_any, b_nan, b_min), 0.0)
    b_soft = tl.where(m_n, tl.where(m_any, b_nan, b_soft), 0.0)
    # No head is hit where all are masked.
    b_arg = tl.where(m_n & (b_arg < BLOCK_K), b_arg, 0)
    return b_min, b_arg.to(tl.int64), b_soft


@triton.jit
def exp_above(b_r, b_min, m_k, temperature):
    """Return ``exp(-(r - min) / T)``, 0 in padding; a head at an infinite minimum counts as 1."""
    b_above = tl.where(b_r == b_min[:, None], 0.0, b_r - b_min[:, None])
    return tl.where(m_k, tl.exp(-b_above / temperature), 0.0)


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
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
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
    m_real = m_n
    if HAS_ROW_MASK:
        m_real = m_n & (tl.load(p_row_mask + o_n, mask=m_n, other=0) != 0)
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
    if HAS_BIAS:
        b_r += tl.load(p_bias + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        b_r -= tl.load(p_shift + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        b_r /= tl.load(p_scale + o_k, mask=m_k, other=1.0).to(tl.float32)[None, :]
    b_r = tl.where(m_real[:, None], b_r, 0.0)
    tl.store(p_rewards + o_n[:, None] * K + o_k[None, :], b_r, mask=m_n[:, None] & m_k[None, :])
    if HAS_SUMS:
        tl.store(p_sums + i_n * K + o_k, tl.sum(b_r, axis=0), mask=m_k)
    m_head, heads = m_k, K
    if HAS_HEAD_MASK:
        m_head = m_k & (tl.load(p_head_mask + o_k, mask=m_k, other=0) != 0)
        heads = tl.maximum(tl.sum(m_head.to(tl.float32), axis=0), 1.0)
    b_min, b_arg, b_soft = lowest_head(b_r, m_real, m_head, heads, o_k, temperature, BLOCK_K)
    tl.store(p_min + o_n, b_min, mask=m_n)
    tl.store(p_arg + o_n, b_arg, mask=m_n)
    tl.store(p_soft + o_n, b_soft, mask=m_n)


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
    HAS_HEAD_MASK: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The lowest of each row of given rewards, and the sum of BLOCK_N rows."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    m_real = m_n
    if HAS_ROW_MASK:
        m_real = m_n & (tl.load(p_row_mask + o_n, mask=m_n, other=0) != 0)
    m_nk = m_real[:, None] & m_k[None, :]
    b_r = tl.load(p_rewards + o_n[:, None] * K + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)
    if HAS_SUMS:
        tl.store(p_sums + i_n * K + o_k, tl.sum(b_r, axis=0), mask=m_k)
    m_head, heads = m_k, K
    if HAS_HEAD_MASK:
        m_head = m_k & (tl.load(p_head_mask + o_k, mask=m_k, other=0) != 0)
        heads = tl.maximum(tl.sum(m_head.to(tl.float32), axis=0), 1.0)
    b_min, b_arg, b_soft = lowest_head(b_r, m_real, m_head, heads, o_k, temperature, BLOCK_K)
    tl.store(p_min + o_n, b_min, mask=m_n)
    tl.store(p_arg + o_n, b_arg, mask=m_n)
    tl.store(p_soft + o_n, b_soft, mask=m_n)


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
    HAS_REWARDS: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_HEAD_MASK: tl.constexpr,
    HAS_ROW_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up what reaches each reward directly, as the minimum, in the soft minimum and in the sum."""
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    m_real, m_head = m_n, m_k
    if HAS_ROW_MASK:
        m_real = m_n & (tl.load(p_row_mask + o_n, mask=m_n, other=0) != 0)
    if HAS_HEAD_MASK:
        m_head = m_k & (tl.load(p_head_mask + o_k, mask=m_k, other=0) != 0)
    m_head = m_head[None, :]
    m_nk = m_real[:, None] & m_k[None, :]
    o_nk = o_n[:, None] * K + o_k[None, :]
    b_grad = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if HAS_REWARDS:
        b_grad = tl.load(p_grad_rewards + o_nk, mask=m_nk, other=0.0).to(tl.float32)
    if HAS_SUMS:
        b_grad_sums = tl.load(p_grad_sums + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_grad += tl.where(m_nk, b_grad_sums[None, :], 0.0)
    if HAS_MIN:
        b_arg = tl.load(p_arg + o_n, mask=m_real, other=0).to(tl.int32)
        b_grad_min = tl.load(p_grad_min + o_n, mask=m_real, other=0.0).to(tl.float32)
        b_grad += tl.where((b_arg[:, None] == o_k[None, :]) & m_head, b_grad_min[:, None], 0.0)
    if HAS_SOFT:
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


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _total(partial: Tensor) -> Tensor:
    """Add the programs' partial sums ``[programs, K]`` in float64."""
    return partial.sum(0, dtype=torch.float64).float()


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
    minimum, softmin = rewards.new_empty(rows), rewards.new_empty(rows)
    argmin = hidden.new_empty(rows, dtype=torch.int64)
    partial = rewards.new_empty((programs, heads) if sums else 0)
    if rows == 0:
        return rewards, minimum, argmin, softmin, _total(partial) if sums else partial
    hidden, weight = aligned_rows(hidden), aligned_rows(weight)
    vectors = [None if v is None else v.contiguous() for v in (bias, shift, scale)]
    with on_device_of(hidden):
        heads_forward_kernel[(programs,)](
            hidden,
            weight,
            *vectors,
            _bytes(head_mask),
            _bytes(row_mask),
            rewards,
            minimum,
            argmin,
            softmin,
            partial,
            temperature,
            rows,
            hidden.stride(0),
            weight.stride(0),
            H=width,
            K=heads,
            HAS_BIAS=bias is not None,
            HAS_SHIFT=shift is not None,
            HAS_SCALE=scale is not None,
            HAS_HEAD_MASK=head_mask is not None,
            HAS_ROW_MASK=row_mask is not None,
            HAS_SUMS=sums,
            # The interpreter is wrong on bf16 products, and a product has factors of one dtype.
            UPCAST=INTERPRET or hidden.dtype != weight.dtype,
            **config,
        )
    return rewards, minimum, argmin, softmin, _total(partial) if sums else partial


def min_forward(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`min_forward_kernel`."""
    rows, heads = rewards.shape
    config = row_config(heads)
    programs = triton.cdiv(rows, config["BLOCK_N"])
    minimum = rewards.new_empty(rows, dtype=torch.float32)
    softmin, argmin = torch.empty_like(minimum), rewards.new_empty(rows, dtype=torch.int64)
    partial = minimum.new_empty((programs, heads) if sums else 0)
    if rows == 0:
        return minimum, argmin, softmin, _total(partial) if sums else partial
    with on_device_of(rewards):
        min_forward_kernel[(programs,)](
            rewards.contiguous(),
            _bytes(head_mask),
            _bytes(row_mask),
            minimum,
            argmin,
            softmin,
            partial,
            temperature,
            rows,
            K=heads,
            HAS_HEAD_MASK=head_mask is not None,
            HAS_ROW_MASK=row_mask is not None,
            HAS_SUMS=sums,
            **config,
        )
    return minimum, argmin, softmin, _total(partial) if sums else partial


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
    given = [
        None if g is None else g.contiguous() for g in (grad_rewards, grad_minimum, grad_softmin, grad_sums)
    ]
    config = row_config(heads)
    with on_device_of(rewards):
        min_backward_kernel[(triton.cdiv(rows, config["BLOCK_N"]),)](
            rewards.contiguous(),
            argmin.contiguous(),
            *given,
            _bytes(head_mask),
            _bytes(row_mask),
            grad,
            temperature,
            rows,
            K=heads,
            HAS_REWARDS=grad_rewards is not None,
            HAS_MIN=grad_minimum is not None,
            HAS_SOFT=grad_softmin is not None,
            HAS_SUMS=grad_sums is not None,
            HAS_HEAD_MASK=head_mask is not None,
            HAS_ROW_MASK=row_mask is not None,
            **config,
        )
    return grad
