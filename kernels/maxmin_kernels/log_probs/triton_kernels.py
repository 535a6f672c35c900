"""Triton row kernels over one chunk of logits, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import contiguous, next_power_of_2, on_device_of
from .transform import PLAIN, LogitTransform


@triton.jit
def uncapped(b_x, p_bias, o_v, m_v, logit_scale):
    """Scale the product of hidden states and embedding and add the bias."""
    if logit_scale is not None:
        b_x = b_x * logit_scale
    if p_bias is not None:
        b_x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def capped(b_x, softcap):
    """Return ``softcap * tanh(x / softcap)``; near 0 by tanh's series, where ``1 - exp`` loses digits."""
    if softcap is not None:
        b_y = b_x / softcap
        b_e = tl.exp(-2.0 * tl.abs(b_y))
        b_far = tl.where(b_y < 0, b_e - 1.0, 1.0 - b_e) / (1.0 + b_e)
        b_2 = b_y * b_y
        b_near = b_y + b_y * b_2 * (-1 / 3 + b_2 * (2 / 15 + b_2 * (-17 / 315 + b_2 * (62 / 2835))))
        b_x = softcap * tl.where(tl.abs(b_y) < 0.25, b_near, b_far)
    return b_x


@triton.jit
def cap_slope(b_x, softcap):
    """Return ``1 / cosh(x / softcap)^2``, the derivative of the cap."""
    b_e = tl.exp(-2.0 * tl.abs(b_x / softcap))
    return 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))


@triton.jit
def log_probs_forward_kernel(
    p_logits,
    p_targets,
    p_log_probs,
    p_logsumexp,
    p_entropy,
    p_bias,
    temperature,
    logit_scale,
    softcap,
    stride,
    V: tl.constexpr,
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
        m_v = i_v + o_v < V
        b_x = tl.load(p_row + i_v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_x = uncapped(b_x, p_bias, i_v + o_v, m_v, logit_scale)
        b_x = capped(b_x, softcap)
        if logit_scale is not None or softcap is not None:
            # Neither keeps the -inf that stands for no token.
            b_x = tl.where(m_v, b_x, float("-inf"))
        b_x = b_x / temperature
        b_new = tl.where(b_x > b_max, b_x, b_max)
        # A lane that has seen only -inf stays empty: -inf - -inf would be NaN.
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_old = tl.exp(b_max - b_ref)
        b_e = tl.exp(b_x - b_ref)
        b_sum = b_sum * b_old + b_e
        if p_entropy is not None:
            b_mean = b_mean * b_old + tl.where(b_x == float("-inf"), 0.0, b_x) * b_e
        b_max = b_new
    row_max = tl.max(b_max, axis=0)
    row_ref = tl.where(row_max == float("-inf"), 0.0, row_max)
    b_scale = tl.exp(b_max - row_ref)
    row_sum = tl.sum(b_sum * b_scale, axis=0)
    row_lse = row_ref + tl.log(row_sum)
    target = tl.load(p_targets + i_n)
    # An id outside the vocabulary gives NaN.
    known = (target >= 0) & (target < V)
    x_target = tl.load(p_row + target, mask=known, other=float("nan")).to(tl.float32)
    x_target = uncapped(x_target, p_bias, target, known, logit_scale)
    x_target = capped(x_target, softcap)
    tl.store(p_log_probs + i_n, x_target / temperature - row_lse)
    tl.store(p_logsumexp + i_n, row_lse)
    if p_entropy is not None:
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
    p_bias,
    temperature,
    logit_scale,
    softcap,
    stride,
    grad_stride,
    V,
    BLOCK_V: tl.constexpr,
):
    """Write ``g (onehot - p) - g_H p (log p + H)``, over T, for one row and BLOCK_V tokens.

    With a cap times its derivative: the gradient of ``logit_scale h W^T + bias``. The gradient may lie where
    the logits do.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    b_x = tl.load(p_logits + i_n * stride + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_x = uncapped(b_x, p_bias, o_v, m_v, logit_scale)
    b_log_p = capped(b_x, softcap) / temperature - tl.load(p_logsumexp + i_n)
    b_p = tl.exp(b_log_p)
    b_slope = tl.zeros((BLOCK_V,), dtype=tl.float32)
    b_grad = tl.zeros((BLOCK_V,), dtype=tl.float32)
    if p_grad_log_probs is not None:
        g = tl.load(p_grad_log_probs + i_n)
        b_slope += g
        b_grad += tl.where(o_v == tl.load(p_targets + i_n), g, 0.0)
    if p_grad_entropy is not None:
        b_log_p = tl.where(b_log_p == float("-inf"), 0.0, b_log_p)
        b_slope += tl.load(p_grad_entropy + i_n) * (b_log_p + tl.load(p_entropy + i_n))
    b_grad = (b_grad - b_p * b_slope) / temperature
    if softcap is not None:
        b_grad *= cap_slope(b_x, softcap)
    tl.store(p_grad + i_n * grad_stride + o_v, b_grad.to(p_grad.dtype.element_ty), mask=m_v)


def row_config(vocabulary: int) -> dict[str, int]:
    """Return the tile: 2048 tokens with 8 warps, fewer for a small vocabulary."""
    block_v = min(max(next_power_of_2(vocabulary), 128), 2048)
    return {"BLOCK_V": block_v, "num_warps": 8 if block_v >= 2048 else 4}


def transform_arguments(transform: LogitTransform) -> dict[str, Any]:
    """Return the kernels' arguments for this transform; None leaves a step out."""
    bias, logit_scale, softcap = transform
    return {"p_bias": bias, "logit_scale": None if logit_scale == 1.0 else logit_scale, "softcap": softcap}


def log_probs_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    transform: LogitTransform = PLAIN,
) -> list[Tensor]:
    """Launch :func:`log_probs_forward_kernel`; return log-probability, logsumexp and (if asked) entropy."""
    rows, vocabulary = logits.shape
    outputs = [logits.new_empty(rows, dtype=torch.float32) for _ in range(3 if entropy else 2)]
    with on_device_of(logits):
        log_probs_forward_kernel[(rows,)](
            logits,
            targets.contiguous(),
            *outputs,
            **({} if entropy else {"p_entropy": None}),
            temperature=temperature,
            stride=logits.stride(0),
            V=vocabulary,
            **transform_arguments(transform),
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
    transform: LogitTransform = PLAIN,
    *,
    out: Tensor,
) -> None:
    """Launch :func:`log_probs_backward_kernel`; the gradient goes to ``out``, which may be the logits."""
    rows, vocabulary = logits.shape
    config = row_config(vocabulary)
    grad_entropy = None if entropy is None else grad_entropy
    with on_device_of(logits):
        log_probs_backward_kernel[(rows, triton.cdiv(vocabulary, config["BLOCK_V"]))](
            logits,
            *contiguous(targets, entropy, logsumexp, grad_log_probs, grad_entropy),
            out,
            temperature=temperature,
            stride=logits.stride(0),
            grad_stride=out.stride(0),
            V=vocabulary,
            **transform_arguments(transform),
            **config,
        )
