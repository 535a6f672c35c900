"""Triton row kernels over one chunk of logits, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import next_power_of_2, on_device_of


@triton.jit
def log_probs_forward_kernel(
    p_logits,
    p_targets,
    p_log_probs,
    p_logsumexp,
    p_entropy,
    temperature,
    stride,
    V: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row a program, one read of it; every lane keeps its own running maximum and sums."""
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_n * stride
    o_v = tl.arange(0, BLOCK_V)
    b_max = tl.full((BLOCK_V,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    b_mean = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for i_v in range(0, V, BLOCK_V):
        b_x = tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=float("-inf")).to(tl.float32)
        b_x = b_x / temperature
        b_new = tl.where(b_x > b_max, b_x, b_max)
        # A lane that has seen only -inf stays empty: -inf - -inf would be NaN.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old = tl.exp(b_max - b_ref)
        b_e = tl.exp(b_x - b_ref)
        b_sum = b_sum * b_old + b_e
        if ENTROPY:
            b_mean = b_mean * b_old + tl.where(b_x == float("-inf"), 0.0, b_x) * b_e
        b_max = b_new
    row_max = tl.max(b_max, axis=0)
    row_ref = tl.where(row_max == float("-inf"), 0.0, row_max)
    b_scale = tl.exp(b_max - row_ref)
    row_sum = tl.sum(b_sum * b_scale, axis=0)
    row_lse = row_ref + tl.log(row_sum)
    target = tl.load(p_targets + i_n)
    # An id outside the vocabulary gives NaN.
    x_target = tl.load(p_row + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    tl.store(p_log_probs + i_n, x_target / temperature - row_lse)
    tl.store(p_logsumexp + i_n, row_lse)
    if ENTROPY:
        tl.store(p_entropy + i_n, row_lse - tl.sum(b_mean * b_scale, axis=0) / row_sum)


@triton.jit
def log_probs_backward_kernel(
    p_logits,
    p_targets,
    p_entropy,
    p_logsumexp,
    p_grad_log_probs,
    p_grad_entropy,
    p_grad,
    temperature,
    stride,
    V: tl.constexpr,
    HAS_LOG_PROBS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write ``g (onehot - p) - g_H p (log p + H)``, over T, for one row and BLOCK_V tokens."""
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    b_x = tl.load(p_logits + i_n * stride + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_log_p = b_x / temperature - tl.load(p_logsumexp + i_n)
    b_p = tl.exp(b_log_p)
    b_slope = tl.zeros((BLOCK_V,), dtype=tl.float32)
    b_grad = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if HAS_LOG_PROBS:
        g = tl.load(p_grad_log_probs + i_n)
        b_slope += g
        b_grad += tl.where(o_v == tl.load(p_targets + i_n), g, 0.0)
    if HAS_ENTROPY:
        b_log_p = tl.where(b_log_p == float("-inf"), 0.0, b_log_p)
        b_slope += tl.load(p_grad_entropy + i_n) * (b_log_p + tl.load(p_entropy + i_n))
    b_grad = (b_grad - b_p * b_slope) / temperature
    tl.store(p_grad + i_n * V + o_v, b_grad.to(p_grad.dtype.element_ty), mask=m_v)


def row_config(vocabulary: int) -> dict[str, int]:
    """Return the tile: 2048 tokens with 8 warps, fewer for a small vocabulary."""
    block_v = min(max(next_power_of_2(vocabulary), 128), 2048)
    return {"BLOCK_V": block_v, "num_warps": 8 if block_v >= 2048 else 4}


def log_probs_forward(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> list[Tensor]:
    """Launch :func:`log_probs_forward_kernel`; return log-probability, logsumexp and (if asked) entropy."""
    rows, vocabulary = logits.shape
    outputs = [logits.new_empty(rows, dtype=torch.float32) for _ in range(3 if entropy else 2)]
    with on_device_of(logits):
        log_probs_forward_kernel[(rows,)](
            logits,
            targets.contiguous(),
            outputs[0],
            outputs[1],
            outputs[2] if entropy else None,
            temperature,
            logits.stride(0),
            V=vocabulary,
            ENTROPY=entropy,
            **row_config(vocabulary),
        )
    return outputs


def log_probs_backward(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor | None,
    logsumexp: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch :func:`log_probs_backward_kernel`; return the gradient of the chunk in ``out_dtype``."""
    rows, vocabulary = logits.shape
    grad = logits.new_empty(rows, vocabulary, dtype=out_dtype)
    config = row_config(vocabulary)
    given = [
        None if x is None else x.contiguous() for x in (entropy, logsumexp, grad_log_probs, grad_entropy)
    ]
    with on_device_of(logits):
        log_probs_backward_kernel[(rows, triton.cdiv(vocabulary, config["BLOCK_V"]))](
            logits,
            targets.contiguous(),
            *given,
            grad,
            temperature,
            logits.stride(0),
            V=vocabulary,
            HAS_LOG_PROBS=grad_log_probs is not None,
            HAS_ENTROPY=grad_entropy is not None and entropy is not None,
            **config,
        )
    return grad
