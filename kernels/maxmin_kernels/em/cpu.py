"""The E-step on CPU: the reference's arithmetic, a block of pairs at a time so that it stays in the cache."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype
from .naive import margins, posterior, user_of_pair

BLOCK_PAIRS = 131_072
RUN_PAIRS = 128  # added up in the scores' own precision; the runs of one user are added up in float64


def difference(minuend: Tensor, subtrahend: Tensor, buffer: Tensor) -> Tensor:
    """Return ``minuend - subtrahend`` in `buffer` and in its precision."""
    if minuend.dtype == subtrahend.dtype == buffer.dtype:
        return torch.sub(minuend, subtrahend, out=buffer)
    return buffer.copy_(minuend).sub_(subtrahend)


def surprise(chosen: Tensor, rejected: Tensor | None, odds: Tensor, buffer: Tensor) -> Tensor:
    """Return ``-logsigmoid(chosen - rejected)`` in `buffer`, and ``exp(rejected - chosen)`` in `odds`.

    ``log(1 + odds)``: ``logsigmoid`` writes a second output, and ``exp`` takes three times ``exp2``. Both are
    infinite where a margin is below -88 in float32. The two may be one tensor.
    """
    margin = odds.copy_(chosen) if rejected is None else difference(chosen, rejected, odds)
    return torch.log1p(margin.mul_(-1 / math.log(2)).exp2_(), out=buffer)


def exact_surprise(chosen: Tensor, rejected: Tensor | None, odds: Tensor, buffer: Tensor) -> Tensor:
    """Return the same at any margin, slower; the odds end at the largest number."""
    odds.clamp_(max=torch.finfo(odds.dtype).max)
    return F.logsigmoid(margins(chosen, rejected, buffer.dtype)).neg_()


def bag_sums(values: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Add up rows ``offsets[i]`` to ``offsets[i + 1] - 1``, in float64 from there on.

    ``embedding_bag`` runs over bags in parallel, ``segment_reduce`` and ``index_add_`` do not.
    """
    sums, *_ = torch.embedding_bag(values, rows, offsets, mode=0, include_last_offset=True)
    return sums.double()


def sums_by_user(values: Tensor, user_offsets: Tensor, rows: Tensor) -> Tensor:
    """Add up the rows of each user, [P, K] to [U, K] in float64, in runs; `rows` counts from 0 to P - 1."""
    runs = user_offsets.diff().add_(RUN_PAIRS - 1).div_(RUN_PAIRS, rounding_mode="floor")
    first_run = F.pad(runs.cumsum(0), (1, 0))
    within = torch.arange(int(first_run[-1])) - first_run[:-1].repeat_interleave(runs)
    offsets = F.pad(user_offsets[:-1].repeat_interleave(runs) + RUN_PAIRS * within, (0, 1), value=len(rows))
    of_run = bag_sums(values, offsets, rows)
    return torch.segment_reduce(of_run, "sum", offsets=first_run, axis=0, unsafe=True)


def log_likelihoods(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    dtype: torch.dtype,
    odds: Tensor,
    measure: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor],
) -> Tensor:
    """Return each user's log-likelihood under each group [U, K] float64; a block holds whole users.

    The odds [P, K] are written; [0, K] asks for none.
    """
    users = user_offsets.shape[0] - 1
    sums = torch.zeros(users, chosen.shape[1], dtype=torch.float64)
    cuts = torch.searchsorted(user_offsets, torch.arange(0, chosen.shape[0], BLOCK_PAIRS)).unique()
    edges = sorted({0, *cuts.tolist(), users})
    blocks = list(itertools.pairwise(zip(edges, user_offsets[edges].tolist(), strict=True)))
    rows = torch.arange(max((high - low for (_, low), (_, high) in blocks), default=0))
    buffer = torch.empty(len(rows), chosen.shape[1], dtype=dtype)
    short = users > 0 and int(user_offsets.diff().max()) <= RUN_PAIRS
    add_up = bag_sums if short else sums_by_user
    for (first, low), (last, high) in blocks:
        if low < high:
            other, room = None if rejected is None else rejected[low:high], buffer[: high - low]
            values = measure(chosen[low:high], other, odds[low:high] if len(odds) else room, room)
            offsets = user_offsets[first : last + 1] - low
            torch.neg(add_up(values, offsets, rows[: high - low]), out=sums[first:last])
    return sums


def em_forward_cpu(
    chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, log_prior: Tensor, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return responsibilities and log-likelihood as :func:`em_responsibilities_naive`, without a gradient.

    Last come the odds against each choice [P, K], from which its gradient is had faster; [0, K] if not kept.
    """
    dtype = accumulate_dtype(chosen, rejected, log_prior)
    odds = torch.empty(chosen.shape if keep else (0, chosen.shape[1]), dtype=dtype)
    inputs = (chosen, rejected, user_offsets.contiguous(), dtype, odds)
    sums = log_likelihoods(*inputs, surprise)
    if not (known := sums.isfinite()).all():  # a huge margin, or what the scores held
        sums = torch.where(known, sums, log_likelihoods(*inputs, exact_surprise))
    prior = log_prior.double()
    responsibilities, log_likelihood = posterior(sums + prior, prior)
    return responsibilities.to(dtype), log_likelihood.to(dtype), odds


def as_numbers(rows: Tensor) -> Tensor:
    """Return a view in which a row of 8 or 16 bytes is one number, which takes half the time to gather."""
    number = {8: torch.complex64, 16: torch.complex128}.get(rows.shape[1] * rows.element_size())
    return rows if number is None else rows.view(number).squeeze(1)


def gather_rows(rows: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """Return ``rows[index]`` in `out`, by `take` where a row is a number: in parallel, as what follows is."""
    rows, numbers = as_numbers(rows), as_numbers(out)
    if rows.ndim == 1:
        torch.take(rows, index, out=numbers)
    else:
        torch.index_select(rows, 0, index, out=numbers)
    return out


def em_backward_cpu(
    chosen: Tensor,
    rejected: Tensor | None,
    user_offsets: Tensor,
    responsibilities: Tensor,
    grad: Tensor,
    odds: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of chosen and rejected as :func:`em_backward_naive`, from the odds [P, K] if kept.

    The gradient of rejected holds each pair's weights first, where it has their precision.
    """
    dtype, pairs = responsibilities.dtype, chosen.shape[0]
    weights = responsibilities * grad.to(dtype).unsqueeze(-1)
    users = user_of_pair(user_offsets, pairs)
    grad_chosen = torch.empty(chosen.shape, dtype=chosen.dtype)
    grad_rejected = (
        chosen.new_empty(0) if rejected is None else torch.empty(rejected.shape, dtype=rejected.dtype)
    )
    for low in range(0, pairs, BLOCK_PAIRS):
        block = slice(low, low + BLOCK_PAIRS)
        slope, share = grad_chosen[block], grad_rejected[block]
        if slope.dtype != dtype:
            slope = torch.empty(slope.shape, dtype=dtype)
        if rejected is None or share.dtype != dtype:
            share = torch.empty_like(slope)
        gather_rows(weights, users[block], share)
        if len(odds):
            # share * odds / (1 + odds): of its point, the odds here as well, only the sign counts.
            against = odds[block]
            torch.ops.aten.log_sigmoid_backward.grad_input(share, against, against, grad_input=slope)
        else:
            if rejected is None:
                slope.copy_(chosen[block]).neg_()
            else:
                difference(rejected[block], chosen[block], slope)
            slope.sigmoid_().mul_(share)
        if chosen.dtype != dtype:
            grad_chosen[block] = slope
        if rejected is not None:
            torch.neg(slope, out=share)
            if rejected.dtype != dtype:
                grad_rejected[block] = share
    return grad_chosen, grad_rejected
