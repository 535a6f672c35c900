"""The E-step on CPU: the reference's arithmetic, a block of pairs at a time so that it stays in the cache."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype
from .naive import margins, posterior, user_of_pair

BLOCK_PAIRS = 65_536


def em_forward_cpu(
    chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return responsibilities and log-likelihood as :func:`em_responsibilities_naive`, without a gradient."""
    dtype = accumulate_dtype(chosen, rejected, log_prior)
    pairs, users = chosen.shape[0], user_offsets.shape[0] - 1
    sums = torch.zeros(users, chosen.shape[1], dtype=torch.float64)
    # The user in which each block of pairs begins; a user is never cut.
    user_offsets = user_offsets.contiguous()
    starts = torch.arange(0, pairs, BLOCK_PAIRS)
    cuts = torch.searchsorted(user_offsets, starts).unique().tolist()
    edges = sorted({0, *cuts, users})
    for first, last in itertools.pairwise(edges):
        low, high = int(user_offsets[first]), int(user_offsets[last])
        if low == high:
            continue
        block = slice(low, high)
        margin = margins(chosen[block], None if rejected is None else rejected[block], dtype)
        log_choice = F.logsigmoid(margin).double()
        offsets = user_offsets[first : last + 1] - low
        sums[first:last] = torch.segment_reduce(log_choice, "sum", offsets=offsets, axis=0, unsafe=True)
    prior = log_prior.double()
    responsibilities, log_likelihood = posterior(sums + prior, prior)
    return responsibilities.to(dtype), log_likelihood.to(dtype)


def em_backward_cpu(
    chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, responsibilities: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of chosen and rejected as :func:`em_backward_naive`."""
    dtype = responsibilities.dtype
    weights = responsibilities * grad.to(dtype).unsqueeze(-1)
    users = user_of_pair(user_offsets, chosen.shape[0])
    grad_chosen = torch.empty(chosen.shape, dtype=chosen.dtype)
    grad_rejected = chosen.new_empty(0)
    if rejected is not None:
        grad_rejected = torch.empty(rejected.shape, dtype=rejected.dtype)
    for low in range(0, chosen.shape[0], BLOCK_PAIRS):
        block = slice(low, low + BLOCK_PAIRS)
        margin = margins(chosen[block], None if rejected is None else rejected[block], dtype)
        slope = torch.sigmoid(-margin) * weights.index_select(0, users[block])
        grad_chosen[block] = slope
        if rejected is not None:
            grad_rejected[block] = slope.neg_()
    return grad_chosen, grad_rejected
