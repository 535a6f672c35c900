"""Triton kernels of the mixture's E-step, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers. A tile is
``[BLOCK_S segments, BLOCK_P pairs, BLOCK_K groups]``.

``logsigmoid(m) = min(m, 0) - log(1 + exp(-|m|))``. The factors ``1 + exp(-|m|)`` lie in (1, 2], so each lane
multiplies at most 64 of them, the lanes' significands, at most 64 in [1, 2), are multiplied in turn, and a
segment takes one logarithm: one exponential per pair and group. The products round once a factor: at most
6e-8 per pair, which is also what float32 holds of ``log(1 + x)`` near x = 1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import next_power_of_2, on_device_of
from .plan import SEGMENT_PAIRS, build_plan, plan_of


@triton.jit
def exp_minus_abs(b_m):
    """Return ``exp(-|m|)``; one multiplication serves the sign and the base."""
    return tl.exp2(tl.abs(b_m) * -1.4426950408889634)


@triton.jit
def add_and_multiply(b_sum, b_product, b_other_sum, b_other_product):
    """Combine two parts of a sum and of a product."""
    return b_sum + b_other_sum, b_product * b_other_product


@triton.jit
def log_sum(b_linear, b_product):
    """Return ``sum(linear - log(product))`` over axis 1 of at most 64 lanes, with one logarithm.

    The powers of two go to the sum, so that the product of the rest is below 2^64. Products are at least 1.
    """
    b_bits = b_product.to(tl.int32, bitcast=True)
    b_linear -= ((b_bits >> 23) - 127).to(tl.float32) * 0.6931471805599453
    b_rest = ((b_bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    b_sum, b_product = tl.reduce((b_linear, b_rest), 1, add_and_multiply)
    return b_sum - tl.log(b_product)


@triton.jit
def posterior(b_total, b_prior, m_k):
    """Return responsibilities ``[S, K]`` and log-likelihood ``[S]`` from the log joint, padding excluded.

    An impossible user (-inf for every group) gets the prior; a NaN stays in its row.
    """
    m_nan = (b_total != b_total) & m_k
    b_nan = tl.sum(tl.where(m_nan, b_total, 0.0), axis=1)
    b_max = tl.max(tl.where(m_k & (m_nan == 0), b_total, float("-inf")), axis=1)
    m_none = b_max == float("-inf")
    b_prior = tl.broadcast_to(b_prior[None, :], b_total.shape)
    b_logit = tl.where(m_none[:, None], b_prior, b_total)
    b_top = tl.max(tl.where(m_k & (m_nan == 0), b_logit, float("-inf")), axis=1)
    b_below = tl.where(b_logit == b_top[:, None], 0.0, b_logit - b_top[:, None])
    b_exp = tl.where(m_k, tl.exp(b_below.to(tl.float32)), 0.0)
    b_sum = tl.sum(b_exp, axis=1)
    b_nan = b_nan.to(tl.float32)
    b_resp = b_exp / b_sum[:, None] + b_nan[:, None]
    b_like = tl.where(m_none, b_max, b_max + tl.log(b_sum))
    return b_resp, b_like.to(tl.float32) + b_nan


@triton.jit
def load_segments(p_segment_offsets, p_segment_user, o_s, m_s):
    """Return each segment's first pair, number of pairs (0 where it is unused) and user."""
    b_start = tl.load(p_segment_offsets + o_s, mask=m_s, other=0)
    b_count = (tl.load(p_segment_offsets + o_s + 1, mask=m_s, other=0) - b_start).to(tl.int32)
    b_user = tl.load(p_segment_user + o_s, mask=m_s, other=-1)
    return b_start, tl.where(b_user >= 0, b_count, 0), b_user


@triton.jit
def load_margins(
    p_chosen, p_rejected, b_start, b_count, o_pair, o_k, m_k, K: tl.constexpr, STRIDE_CHOSEN: tl.constexpr,
    STRIDE_REJECTED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the margins of a tile, where it holds pairs, and the rows of these."""
    m_p = o_pair[None, :] < b_count[:, None]
    o_row = b_start[:, None] + o_pair[None, :]
    m_load = m_p[:, :, None]
    if K != BLOCK_K:
        m_load = m_load & m_k[None, None, :]
    o_chosen = o_row[:, :, None] * STRIDE_CHOSEN + o_k[None, None, :]
    b_m = tl.load(p_chosen + o_chosen, mask=m_load, other=0.0).to(tl.float32)
    if p_rejected is not None:
        o_rejected = o_row[:, :, None] * STRIDE_REJECTED + o_k[None, None, :]
        b_m -= tl.load(p_rejected + o_rejected, mask=m_load, other=0.0).to(tl.float32)
    return b_m, m_load, o_row


@triton.jit
def em_forward_kernel(
    p_chosen,
    p_rejected,
    p_log_prior,
    p_segment_offsets,
    p_segment_user,
    p_segment_slot,
    p_partial,
    p_resp,
    p_like,
    S,
    K: tl.constexpr,
    STRIDE_CHOSEN: tl.constexpr,
    STRIDE_REJECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum each segment; finish users of one segment, leave a partial sum of the others."""
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_p = tl.arange(0, BLOCK_P)
    o_k = tl.arange(0, BLOCK_K)
    m_s = o_s < S
    m_k = o_k < K
    b_start, b_count, b_user = load_segments(p_segment_offsets, p_segment_user, o_s, m_s)
    count = tl.max(b_count, axis=0)

    b_linear = tl.zeros((BLOCK_S, BLOCK_P, BLOCK_K), dtype=tl.float32)
    b_product = tl.full((BLOCK_S, BLOCK_P, BLOCK_K), 1.0, dtype=tl.float32)
    i_p = 0
    while i_p < count:
        b_m, m_load, _ = load_margins(
            p_chosen, p_rejected, b_start, b_count, i_p + o_p, o_k, m_k, K, STRIDE_CHOSEN, STRIDE_REJECTED,
            BLOCK_K,
        )  # fmt: skip
        # P (1 + x) as P x + P in one instruction, rounded once.
        b_product = tl.fma(b_product, tl.where(m_load, exp_minus_abs(b_m), 0.0), b_product)
        b_linear += tl.minimum(b_m, 0.0, propagate_nan=tl.PropagateNan.ALL)
        i_p += BLOCK_P
    b_sum = log_sum(b_linear, b_product)

    b_slot = tl.load(p_segment_slot + o_s, mask=m_s, other=-1)
    m_split = (b_slot >= 0)[:, None] & m_k[None, :]
    tl.store(p_partial + b_slot[:, None] * K + o_k[None, :], b_sum, mask=m_split)

    b_prior = tl.load(p_log_prior + o_k, mask=m_k, other=float("-inf")).to(tl.float32)
    b_resp, b_like = posterior(b_sum + b_prior[None, :], b_prior, m_k[None, :])
    m_whole = (b_user >= 0) & (b_slot < 0)
    m_resp = m_whole[:, None] & m_k[None, :]
    tl.store(p_resp + b_user[:, None] * K + o_k[None, :], b_resp, mask=m_resp)
    tl.store(p_like + b_user, b_like, mask=m_whole)


@triton.jit
def em_finish_kernel(
    p_partial,
    p_log_prior,
    p_split_user,
    p_split_offsets,
    p_resp,
    p_like,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the partial sums of one split user in float64, in a fixed order, and finish it."""
    i_l = tl.program_id(0)
    user = tl.load(p_split_user + i_l)
    first = tl.load(p_split_offsets + i_l)
    last = tl.load(p_split_offsets + i_l + 1)
    o_s = tl.arange(0, BLOCK_S)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_acc = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float64)
    while first < last:
        o_row = first + o_s
        m_row = (o_row < last)[:, None] & m_k[None, :]
        b_acc += tl.load(p_partial + o_row[:, None] * K + o_k[None, :], mask=m_row, other=0.0).to(tl.float64)
        first += BLOCK_S
    b_prior = tl.load(p_log_prior + o_k, mask=m_k, other=float("-inf")).to(tl.float32).to(tl.float64)
    b_total = (tl.sum(b_acc, axis=0) + b_prior)[None, :]
    b_resp, b_like = posterior(b_total, b_prior, m_k[None, :])
    o_u = user + tl.zeros((1,), dtype=tl.int64)
    tl.store(p_resp + o_u[:, None] * K + o_k[None, :], b_resp, mask=(o_u >= 0)[:, None] & m_k[None, :])
    tl.store(p_like + o_u, b_like, mask=o_u >= 0)


@triton.jit
def em_backward_kernel(
    p_chosen,
    p_rejected,
    p_resp,
    p_grad,
    p_segment_offsets,
    p_segment_user,
    p_grad_chosen,
    p_grad_rejected,
    S,
    K: tl.constexpr,
    STRIDE_CHOSEN: tl.constexpr,
    STRIDE_REJECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ``grad_u resp_uk sigmoid(-m)`` and its negative for the pairs of each segment."""
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_p = tl.arange(0, BLOCK_P)
    o_k = tl.arange(0, BLOCK_K)
    m_s = o_s < S
    m_k = o_k < K
    b_start, b_count, b_user = load_segments(p_segment_offsets, p_segment_user, o_s, m_s)
    m_user = b_user >= 0
    count = tl.max(b_count, axis=0)
    m_resp = m_user[:, None] & m_k[None, :]
    b_weight = tl.load(p_resp + b_user[:, None] * K + o_k[None, :], mask=m_resp, other=0.0)
    b_weight *= tl.load(p_grad + b_user, mask=m_user, other=0.0).to(tl.float32)[:, None]
    i_p = 0
    while i_p < count:
        b_m, m_load, o_row = load_margins(
            p_chosen, p_rejected, b_start, b_count, i_p + o_p, o_k, m_k, K, STRIDE_CHOSEN, STRIDE_REJECTED,
            BLOCK_K,
        )  # fmt: skip
        b_small = exp_minus_abs(b_m)
        # sigmoid(-m) without overflow.
        b_slope = tl.where(b_m > 0.0, b_small, 1.0) / (1.0 + b_small)
        b_g = b_weight[:, None, :] * b_slope
        o_out = o_row[:, :, None] * K + o_k[None, None, :]
        tl.store(p_grad_chosen + o_out, b_g.to(p_grad_chosen.dtype.element_ty), mask=m_load)
        if p_rejected is not None:
            tl.store(p_grad_rejected + o_out, (-b_g).to(p_grad_rejected.dtype.element_ty), mask=m_load)
        i_p += BLOCK_P


def forward_config(groups: int) -> dict[str, int]:
    """Return the tile of the sums: 16 pairs across, the fewest for at most 64 factors a lane.

    One warp for about 512 elements, so that sums stay within it, and few segments, since all wait for the
    longest: measured on an H200, against tiles of 256 to 4096 elements and 1 to 4 warps.
    """
    block_k = next_power_of_2(groups)
    block_p = SEGMENT_PAIRS // 64
    block_s = max(16 // block_k, min(4, 32 // block_k), 1)
    num_warps = min(max(block_s * block_p * block_k // 512, 1), 16)
    return {"BLOCK_S": block_s, "BLOCK_P": block_p, "BLOCK_K": block_k, "num_warps": num_warps}


def backward_config(pairs: int, segments: int, groups: int) -> dict[str, int]:
    """Return the tile: as many pairs across as a user has on average, about 1024 elements in all."""
    block_k = next_power_of_2(groups)
    mean = next_power_of_2(pairs // max(segments, 1))
    block_p = min(max(mean, SEGMENT_PAIRS // 64), 64)
    block_s = min(max(1, 1024 // (block_k * block_p)), 8)
    return {"BLOCK_S": block_s, "BLOCK_P": block_p, "BLOCK_K": block_k, "num_warps": 4}


def finish_config(groups: int) -> dict[str, int]:
    """Return the tile of the sum of partial sums, wide so that a user of 10^7 pairs is no long loop."""
    block_k = next_power_of_2(groups)
    return {"BLOCK_S": max(16, 512 // block_k), "BLOCK_K": block_k, "num_warps": 4}


def _rows(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def em_forward(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    log_prior: Tensor,
    tensors: Sequence[Tensor],
    _: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`em_forward_kernel`, and :func:`em_finish_kernel` if some user may be split.

    Nothing is kept for the gradient: the third output is empty.
    """
    (pairs, groups), users = chosen.shape, user_offsets.shape[0] - 1
    plan = plan_of(tensors, user_offsets, pairs)
    segments = plan.segment_user.shape[0]
    resp = chosen.new_empty(users, groups, dtype=torch.float32)
    like, nothing = resp.new_empty(users), resp.new_empty(0, groups)
    if users == 0:
        return resp, like, nothing
    chosen, rejected, log_prior = _rows(chosen), _rows(rejected), log_prior.contiguous()
    # n > C pairs make ceil(n / C) <= 2 n / C segments.
    partial = resp.new_empty(2 * pairs // SEGMENT_PAIRS, groups)
    config = forward_config(groups)
    with on_device_of(chosen):
        em_forward_kernel[(triton.cdiv(segments, config["BLOCK_S"]),)](
            chosen,
            rejected,
            log_prior,
            plan.segment_offsets,
            plan.segment_user,
            plan.segment_slot,
            partial,
            resp,
            like,
            segments,
            K=groups,
            STRIDE_CHOSEN=chosen.stride(0),
            STRIDE_REJECTED=0 if rejected is None else rejected.stride(0),
            **config,
        )
        if plan.split_user.shape[0]:
            em_finish_kernel[(plan.split_user.shape[0],)](
                partial,
                log_prior,
                plan.split_user,
                plan.split_offsets,
                resp,
                like,
                K=groups,
                **finish_config(groups),
            )
    return resp, like, nothing


def em_backward(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    responsibilities: Tensor,
    grad: Tensor,
    _: Tensor,
    segment_offsets: Tensor | None,
    segment_user: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch :func:`em_backward_kernel`."""
    pairs, groups = chosen.shape
    if segment_offsets is None or segment_user is None:
        segment_offsets, segment_user, *_ = build_plan(user_offsets, pairs)
    segments = segment_user.shape[0]
    grad_chosen = torch.empty(chosen.shape, dtype=chosen.dtype, device=chosen.device)
    grad_rejected = chosen.new_empty(0)
    if rejected is not None:
        grad_rejected = torch.empty(chosen.shape, dtype=rejected.dtype, device=chosen.device)
    if pairs == 0:
        return grad_chosen, grad_rejected
    chosen, rejected = _rows(chosen), _rows(rejected)
    config = backward_config(pairs, segments, groups)
    with on_device_of(chosen):
        em_backward_kernel[(triton.cdiv(segments, config["BLOCK_S"]),)](
            chosen,
            rejected,
            responsibilities.contiguous(),
            grad.contiguous(),
            segment_offsets,
            segment_user,
            grad_chosen,
            grad_rejected,
            segments,
            K=groups,
            STRIDE_CHOSEN=chosen.stride(0),
            STRIDE_REJECTED=0 if rejected is None else rejected.stride(0),
            **config,
        )
    return grad_chosen, grad_rejected
