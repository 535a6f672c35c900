"""Log-probability of the taken token and entropy from hidden states, in plain PyTorch."""

import torch
from torch import Tensor

from .._backend import accumulate_dtype, without_autocast


def token_log_probs_naive(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities ``[N]`` and entropy ``[N]`` (or None) through the full ``[N, V]`` logits.

    Arguments as :func:`maxmin_kernels.token_log_probs`.
    """
    dtype = accumulate_dtype(hidden, lm_head, bias)
    with without_autocast(hidden):
        logits = hidden.to(dtype) @ lm_head.to(dtype).mT
    if logit_scale != 1.0:
        logits = logit_scale * logits
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    log_probs = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return log_probs, None
    # A token of probability zero adds nothing: 0 * -inf would be NaN.
    return log_probs, -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
