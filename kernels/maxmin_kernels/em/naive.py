"""The E-step of a Bradley-Terry mixture over users, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype


def posterior(total: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax and logsumexp over the last dimension of ``total [U, K]``, the log joint.

    A user whose every group has likelihood zero gets the prior, and log-likelihood -inf.
    """
    peak = total.detach().amax(dim=-1, keepdim=True)
    impossible = peak == -torch.inf
    joint = torch.exp(total - torch.where(impossible, 0.0, peak))
    evidence = joint.sum(dim=-1, keepdim=True)
    share = torch.where(impossible, torch.softmax(log_prior, dim=-1), joint / evidence)
    return share, (peak + evidence.log()).squeeze(-1)


def margins(chosen: Tensor, rejected: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``chosen - rejected`` in ``dtype``; without ``rejected``, ``chosen`` holds the margins."""
    return chosen.to(dtype) if rejected is None else chosen.to(dtype) - rejected.to(dtype)


def em_responsibilities_naive(
    chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, log_prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Return responsibilities ``[U, K]`` and log-likelihood ``[U]``, the latter differentiable.

    Arguments and policies as :func:`maxmin_kernels.em_responsibilities`.
    """
    dtype = accumulate_dtype(chosen, rejected, log_prior)
    log_prior = log_prior.to(dtype)
    log_choice = F.logsigmoid(margins(chosen, rejected, dtype))
    # A user may have millions of pairs: the sum is taken in float64.
    sums = log_choice.new_zeros(user_offsets.shape[0] - 1, chosen.shape[1], dtype=torch.float64)
    sums = sums.index_add(0, user_of_pair(user_offsets, chosen.shape[0]), log_choice.double())
    responsibilities, log_likelihood = posterior(sums + log_prior.double(), log_prior.double())
    return responsibilities.detach().to(dtype), log_likelihood.to(dtype)


def user_of_pair(user_offsets: Tensor, num_pairs: int) -> Tensor:
    """Return the user index of each of the ``num_pairs`` rows."""
    return torch.repeat_interleave(user_offsets.diff(), output_size=num_pairs)


def em_backward_naive(
    chosen: Tensor, rejected: Tensor | None, user_offsets: Tensor, responsibilities: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum_u grad_u log_likelihood_u`` with respect to chosen and rejected.

    The latter is empty (``[0]``) if there is no ``rejected``.

    Fisher's identity: the gradient of the marginal log-likelihood is the responsibility times that of the
    complete one, ``resp_uk * sigmoid(-(chosen - rejected))``.
    """
    dtype = responsibilities.dtype
    weights = responsibilities * grad.to(dtype).unsqueeze(-1)
    users = user_of_pair(user_offsets, chosen.shape[0])
    slope = torch.sigmoid(-margins(chosen, rejected, dtype)) * weights[users]
    if rejected is None:
        return slope.to(chosen.dtype), chosen.new_empty(0)
    return slope.to(chosen.dtype), slope.neg().to(rejected.dtype)
