"""Triton kernels of vector-reward GAE, and their launchers.

Names: ``i_`` program index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``b_`` block in registers. One
program scans one row of the batch, all its columns, from the last chunk of time steps to the first. It scans
in float64: over a long trace the rounding of the decay and of its powers would add up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import contiguous, next_power_of_2, on_device_of


@triton.jit
def then_earlier(a_late, b_late, a_early, b_early):
    """Compose ``x -> a x + b`` of the later steps with the earlier one."""
    return a_early * a_late, b_early + decayed(a_early, b_late)


@triton.jit
def decayed(a, b):
    """Return ``a b``; a = 0 forgets even a NaN."""
    return tl.where(a == 0.0, 0.0, a * b)


@triton.jit
def scan_back(b_delta, m_carries, b_following, forget):
    """Return the advantages ``[T, K]`` of a chunk, given that of the step after it, ``[K]``."""
    b_a = tl.where(m_carries[:, None], 1.0 - tl.cast(forget, tl.float64), 0.0)
    b_a = tl.broadcast_to(b_a, b_delta.shape)
    b_a, b_adv = tl.associative_scan((b_a, b_delta.to(tl.float64)), 0, then_earlier, reverse=True)
    return b_adv + decayed(b_a, b_following[None, :])


@triton.jit
def merge_moments(n, mean, m2, n_b, mean_b, m2_b):
    """Merge counts, means and sums of squared deviations (Chan, Golub and LeVeque, 1979)."""
    total = n + n_b
    # float32 will do, for it is exact where one side is empty; a float64 division takes many registers.
    share = (n_b.to(tl.float32) / tl.maximum(total.to(tl.float32), 1.0)).to(tl.float64)
    shift = mean_b - mean
    return total, mean + shift * share, m2 + m2_b + shift * shift * n * share


@triton.jit
def chunk_moments(b_x, m_valid):
    """Return count, mean and sum of squared deviations of the valid elements of a block."""
    n = tl.sum(m_valid.to(tl.float32), axis=0)
    safe = tl.maximum(n, 1.0)
    mean = tl.sum(tl.where(m_valid, b_x, 0.0), axis=0) / safe
    b_deviation = tl.where(m_valid, b_x - mean, 0.0)
    # The mean is rounded: by how much, the deviations' own mean says.
    rest = tl.sum(b_deviation, axis=0) / safe
    m2 = tl.sum(b_deviation * b_deviation, axis=0) - n * rest * rest
    return n.to(tl.float64), mean.to(tl.float64) + rest, m2.to(tl.float64)


@triton.jit
def step_errors(
    p_reward, p_next_value, p_done, p_terminated, p_mask, b_value, gamma, m_t, m_tk, i_row, o_t,
    o_tk, K: tl.constexpr,
):  # fmt: skip
    """Return a chunk's TD errors ``[T, K]``, which steps carry to the one before, and which are valid."""
    b_next = tl.load(p_next_value + i_row * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    b_reward = tl.load(p_reward + i_row * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    m_end = tl.load(p_done + i_row + o_t, mask=m_t, other=1) != 0
    m_term = tl.load(p_terminated + i_row + o_t, mask=m_t, other=1) != 0
    m_valid = m_t
    if p_mask is not None:
        m_valid = tl.load(p_mask + i_row + o_t, mask=m_t, other=0) != 0
    # where, not a product: what stands behind an end may be NaN.
    b_delta = b_reward + tl.where(m_term[:, None], 0.0, gamma * b_next) - b_value
    return b_delta, m_valid & (m_end == 0), m_valid


@triton.jit
def token_errors(
    p_mask, p_value, p_log_prob, p_ref_log_prob, b_terminal, b_value, gamma, kl_coef, m_t, m_tk, m_next,
    m_kl, i_row, o_t, o_tk, K: tl.constexpr,
):  # fmt: skip
    """Return as :func:`step_errors`, for a response whose reward ``[K]`` is paid at its last valid token."""
    m_valid = tl.load(p_mask + i_row + o_t, mask=m_t, other=0) != 0
    m_carries = m_valid & (tl.load(p_mask + i_row + o_t + 1, mask=m_next, other=0) != 0)
    # Nothing is bootstrapped behind the last token.
    b_next = tl.load(p_value + i_row * K + o_tk + K, mask=m_tk & m_carries[:, None], other=0.0).to(tl.float32)
    b_reward = tl.where((m_valid & (m_carries == 0))[:, None], b_terminal[None, :], 0.0)
    if p_log_prob is not None:
        b_log_prob = tl.load(p_log_prob + i_row + o_t, mask=m_valid, other=0.0).to(tl.float32)
        b_ref = tl.load(p_ref_log_prob + i_row + o_t, mask=m_valid, other=0.0).to(tl.float32)
        b_penalty = -kl_coef * (b_log_prob - b_ref)
        b_reward = tl.where(m_kl[None, :], b_penalty[:, None], b_reward)
    return b_reward + gamma * b_next - b_value, m_carries, m_valid


@triton.jit
def gae_kernel(
    p_reward,
    p_value,
    p_next_value,
    p_done,
    p_terminated,
    p_mask,
    p_log_prob,
    p_ref_log_prob,
    p_weights,
    p_advantage,
    p_target,
    p_weighted,
    p_partial,
    gamma,
    forget,
    kl_coef,
    T,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scan one row of the batch; ``forget`` is ``1 - gamma lmbda``.

    With TOKENS the row is a response, and ``p_reward`` holds one reward of it for every group. With
    log-probabilities the last of the K columns is the penalty's: no group has it, and its weight is 1.
    """
    G: tl.constexpr = K if p_log_prob is None else K - 1
    # A row begins at an int64 offset; within it int32 will do, and takes fewer registers.
    i_b = tl.program_id(0).to(tl.int64)
    i_row = i_b * T
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    m_g = o_k < G
    if TOKENS:
        b_terminal = tl.load(p_reward + i_b * G + o_k, mask=m_g, other=0.0).to(tl.float32)
    b_w = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
    if p_weights is not None:
        b_w = tl.load(p_weights + o_k, mask=m_g, other=1.0).to(tl.float32)
    b_following = tl.zeros((BLOCK_K,), dtype=tl.float64)
    n = tl.zeros((), dtype=tl.float64)
    mean = tl.zeros((), dtype=tl.float64)
    m2 = tl.zeros((), dtype=tl.float64)
    t_start = (tl.cdiv(T, BLOCK_T) - 1) * BLOCK_T
    while t_start >= 0:
        o_t = t_start + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        m_tk = m_t[:, None]
        if K != BLOCK_K:
            m_tk = m_tk & m_k[None, :]
        o_tk = o_t[:, None] * K + o_k[None, :]
        b_value = tl.load(p_value + i_row * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)
        if TOKENS:
            b_delta, m_carries, m_valid = token_errors(
                p_mask, p_value, p_log_prob, p_ref_log_prob, b_terminal, b_value, gamma, kl_coef, m_t, m_tk,
                o_t + 1 < T, o_k == G, i_row, o_t, o_tk, K,
            )  # fmt: skip
        else:
            b_delta, m_carries, m_valid = step_errors(
                p_reward, p_next_value, p_done, p_terminated, p_mask, b_value, gamma, m_t, m_tk, i_row, o_t,
                o_tk, K,
            )  # fmt: skip
        b_delta = tl.where(m_valid[:, None], b_delta, 0.0)
        b_adv = scan_back(b_delta, m_carries, b_following, forget)
        b_following = tl.sum(tl.where((o_t == t_start)[:, None], b_adv, 0.0), axis=0)
        b_adv = b_adv.to(tl.float32)
        tl.store(p_advantage + i_row * K + o_tk, b_adv, mask=m_tk)
        tl.store(p_target + i_row * K + o_tk, b_adv + b_value, mask=m_tk)
        if p_weights is not None or p_partial is not None:
            b_weighted = tl.sum(b_adv * b_w[None, :], axis=1)
        if p_weights is not None:
            tl.store(p_weighted + i_row + o_t, b_weighted, mask=m_t)
        if p_partial is not None:
            n_chunk, mean_chunk, m2_chunk = chunk_moments(b_weighted, m_valid)
            n, mean, m2 = merge_moments(n, mean, m2, n_chunk, mean_chunk, m2_chunk)
        t_start -= BLOCK_T
    if p_partial is not None:
        p_row = p_partial + i_b * 3
        tl.store(p_row, n)
        tl.store(p_row + 1, mean)
        tl.store(p_row + 2, m2)


@triton.jit
def moments_kernel(p_partial, p_moments, B, BLOCK_B: tl.constexpr):
    """Merge the moments of all rows in a fixed order: count, mean and biased variance."""
    b_n = tl.zeros((BLOCK_B,), dtype=tl.float64)
    b_mean = tl.zeros((BLOCK_B,), dtype=tl.float64)
    b_m2 = tl.zeros((BLOCK_B,), dtype=tl.float64)
    start = 0
    while start < B:
        o_b = start + tl.arange(0, BLOCK_B)
        m_b = o_b < B
        p_b = p_partial + o_b.to(tl.int64) * 3
        b_n, b_mean, b_m2 = merge_moments(
            b_n,
            b_mean,
            b_m2,
            tl.load(p_b, mask=m_b, other=0.0),
            tl.load(p_b + 1, mask=m_b, other=0.0),
            tl.load(p_b + 2, mask=m_b, other=0.0),
        )
        start += BLOCK_B
    n, mean, m2 = tl.reduce((b_n, b_mean, b_m2), 0, merge_moments)
    tl.store(p_moments, n.to(tl.float32))
    tl.store(p_moments + 1, mean.to(tl.float32))
    tl.store(p_moments + 2, (m2 / tl.maximum(n, 1.0)).to(tl.float32))


def gae_config(steps: int, columns: int) -> dict[str, int]:
    """Return the tile: all columns, and time steps up to what the scan can hold without spilling."""
    block_k = next_power_of_2(columns)
    ragged = block_k >= 8 and columns != block_k  # its mask takes the registers of half a tile
    elements = 1024 if columns == 1 else 256 if ragged else 512
    block_t = min(max(next_power_of_2(steps), 16), max(2, elements // block_k))
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": 4}


def moments_config(batch: int) -> dict[str, int]:
    """Return the tile: a lane for every row, as far as a program has lanes."""
    return {"BLOCK_B": min(max(next_power_of_2(batch), 32), 1024), "num_warps": 4}


def gae_forward(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    gamma: float,
    lmbda: float,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`gae_kernel` on steps."""
    inputs = (reward, value, next_value, done, terminated, mask, None, None, weights)
    return _launch(inputs, gamma, lmbda, 0.0, moments, tokens=False)


def token_gae_forward(
    terminal_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    sample_log_prob: Tensor | None,
    ref_log_prob: Tensor | None,
    group_weights: Tensor | None,
    gamma: float,
    lmbda: float,
    kl_coef: float,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`gae_kernel` on the tokens of responses."""
    log_probs = (sample_log_prob, ref_log_prob)
    inputs = (terminal_reward, value, None, None, None, mask, *log_probs, group_weights)
    return _launch(inputs, gamma, lmbda, kl_coef, moments, tokens=True)


def _launch(
    inputs: tuple[Tensor | None, ...],
    gamma: float,
    lmbda: float,
    kl_coef: float,
    moments: bool,
    *,
    tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`gae_kernel`, and :func:`moments_kernel` if the moments are wanted."""
    value, weights = inputs[1], inputs[-1]
    assert value is not None
    batch, steps, columns = value.shape
    advantage = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    target = torch.empty_like(advantage)
    weighted = advantage.new_empty(0 if weights is None else (batch, steps, 1))
    if value.numel() == 0:
        return advantage, target, weighted, advantage.new_zeros(3 if moments else 0)
    partial = advantage.new_empty(batch, 3, dtype=torch.float64) if moments else None
    merged = advantage.new_empty(3 if moments else 0)
    with on_device_of(value):
        gae_kernel[(batch,)](
            *contiguous(*inputs),
            advantage,
            target,
            weighted,
            partial,
            gamma,
            1.0 - gamma * lmbda,
            kl_coef,
            steps,
            K=columns,
            TOKENS=tokens,
            **gae_config(steps, columns),
        )
        if moments:
            moments_kernel[(1,)](partial, merged, batch, **moments_config(batch))
    return advantage, target, weighted, merged
