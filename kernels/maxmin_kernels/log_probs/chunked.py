"""The loop over chunks of tokens: one library matrix product and one pass over the logits per chunk."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype, require_triton, use_triton_on_cpu
from .transform import LogitTransform

# Elements of one chunk of logits, and the least rows with which a matrix product is still efficient.
_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
_LEAST_ROWS = {"cpu": 256, "cuda": 256}


def pick_chunk_size(rows: int, vocabulary: int, device: str) -> int:
    """Return the tokens per chunk: as few equal chunks as the budget allows, one if the problem is small."""
    most = max(_ELEMENTS[device] // max(vocabulary, 1), _LEAST_ROWS[device])
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def block_rows(lm_head: Tensor, device: str) -> int:
    """Return the rows of an output layer that are widened at once, where it is not wide by itself."""
    return max(1, _ELEMENTS[device] // 2 // max(lm_head.shape[1], 1))


def _blocks(lm_head: Tensor) -> Iterator[slice]:
    rows = block_rows(lm_head, lm_head.device.type)
    return (slice(start, start + rows) for start in range(0, lm_head.shape[0], rows))


def _product_dtype(hidden: Tensor, lm_head: Tensor, wide: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's factors, low only where its sums can be float32."""
    low = hidden.is_cuda and hidden.dtype == lm_head.dtype and wide == torch.float32
    return hidden.dtype if low else wide


def _logits(hidden: Tensor, lm_head: Tensor, wide: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """Return one chunk of logits; low-precision factors still give float32 sums.

    They are put in the first rows of a buffer of the wide dtype, where there is one.
    """
    if hidden.dtype == lm_head.dtype != wide:
        return torch.mm(hidden, lm_head.mT, out_dtype=wide)
    if buffer is None:
        logits = hidden.new_empty(hidden.shape[0], lm_head.shape[0])
    else:
        logits = buffer[: hidden.shape[0]]
    if hidden.dtype == lm_head.dtype:
        return torch.mm(hidden, lm_head.mT, out=logits)
    for block in _blocks(lm_head):
        torch.mm(hidden, lm_head[block].to(wide).mT, out=logits[:, block])
    return logits


def _chunk_buffer(hidden: Tensor, vocabulary: int, chunk: int, wide: torch.dtype) -> Tensor | None:
    """Room for a chunk's logits; None on CUDA, whose allocator hands out the last chunk's again.

    The system clears fresh pages, which takes a sixth of the time of a product.
    """
    if hidden.is_cuda:
        return None
    return hidden.new_empty(min(chunk, hidden.shape[0]), vocabulary, dtype=wide)


def _grad_hidden(grad: Tensor, lm_head: Tensor, wide: torch.dtype, scale: float) -> Tensor:
    """Return the gradient of one chunk of hidden states, ``scale * grad @ lm_head``."""
    if grad.dtype != lm_head.dtype:
        total = grad.new_zeros(grad.shape[0], lm_head.shape[1])
        for block in _blocks(lm_head):
            total.addmm_(grad[:, block], lm_head[block].to(wide))
    elif scale == 1.0:
        return grad @ lm_head
    else:
        total = _logits(grad, lm_head.mT, wide)
    return total if scale == 1.0 else total.mul_(scale)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Return ``total + left @ right`` in the wide dtype, in place of the total."""
    if total is None:
        return _logits(left, right.mT, wide)
    if left.dtype == wide:
        return total.addmm_(left, right)
    # Rows of the vocabulary in turn: a wide product of low-precision factors cannot be added in place.
    rows = max(1, _ELEMENTS["cuda"] // right.shape[1])
    for start in range(0, left.shape[0], rows):
        block = slice(start, start + rows)
        total[block] += _logits(left[block], right.mT, wide)
    return total


def _row_kernels(hidden: Tensor, wide: torch.dtype) -> bool:
    """Whether the pass over the logits, of dtype ``wide``, is a Triton kernel."""
    if wide == torch.float64:
        return False
    if hidden.is_cuda:
        require_triton()
        return True
    return use_triton_on_cpu(hidden)


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if not targets.is_cuda and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"targets must be in [0, {vocabulary}), got {low} to {high}; drop padded positions first."
            )


def _log_smallest(dtype: torch.dtype) -> float:
    """Return where ``exp`` is e * tiny: subnormal results, below tiny, cost a CPU ten times more."""
    return math.log(torch.finfo(dtype).tiny) + 1.0


def rows_forward(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> list[Tensor]:
    """Return log-probability, logsumexp and (if asked) entropy of one chunk. Overwrites the logits."""
    if temperature != 1.0:
        logits.div_(temperature)
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    highest = logits.amax(-1, keepdim=True)
    below = logits.sub_(highest).clamp_(min=_log_smallest(logits.dtype))
    weights = below.exp() if entropy else below.exp_()
    total = weights.sum(-1)
    log_total = total.log()
    logsumexp = highest.squeeze(-1) + log_total
    if not entropy:
        return [picked - logsumexp, logsumexp]
    return [picked - logsumexp, logsumexp, log_total - weights.mul_(below).sum(-1) / total]


def rows_backward(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor | None,
    logsumexp: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return the gradient with respect to one chunk of logits. Overwrites the logits.

    ``d log p_target / dx = onehot - p`` and ``dH / dx = -p (log p + H)``, both over T.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    log_p = logits.sub_(logsumexp.unsqueeze(-1)).clamp_(min=_log_smallest(logits.dtype))
    p = log_p.exp_() if grad_entropy is None else log_p.exp()
    grad = F.threshold_(p, 3 * torch.finfo(p.dtype).tiny, 0.0)
    slope: Tensor | None = None if grad_log_probs is None else grad_log_probs.unsqueeze(-1)
    if grad_entropy is not None and entropy is not None:
        of_entropy = log_p.add_(entropy.unsqueeze(-1)).mul_(grad_entropy.unsqueeze(-1))
        slope = of_entropy if slope is None else of_entropy.add_(slope)
    if slope is not None:
        grad.mul_(slope.neg() if slope.shape[-1] == 1 else slope.neg_())  # a matrix is the entropy's own
    if grad_log_probs is not None:
        grad.scatter_add_(-1, targets.unsqueeze(-1), grad_log_probs.unsqueeze(-1))
    return grad if temperature == 1.0 else grad.div_(temperature)


def chunked_forward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    chunk_size: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(log_probs [N], entropy [N] or [0], logsumexp [N])``; ``chunk_size`` 0 picks one."""
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    _check_targets(targets, vocabulary)
    wide = accumulate_dtype(hidden, lm_head, bias)
    kernels = _row_kernels(hidden, wide)
    hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = _product_dtype(hidden, lm_head, wide)
    transform = LogitTransform(bias, logit_scale, softcap).to(wide)
    chunk = chunk_size or pick_chunk_size(rows, vocabulary, hidden.device.type)
    outputs = [hidden.new_empty(rows, dtype=wide) for _ in range(3 if entropy else 2)]
    buffer = _chunk_buffer(hidden, vocabulary, chunk, wide)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        logits = _logits(hidden[part].to(dtype), lm_head, wide, buffer)
        if kernels:
            from .triton_kernels import log_probs_forward

            results = log_probs_forward(logits, targets[part], temperature, entropy, transform)
        else:
            logits = transform.capped_(transform.uncapped_(logits))
            results = rows_forward(logits, targets[part], temperature, entropy)
        del logits  # before the next chunk's are made, so that there is one chunk at a time
        for out, result in zip(outputs, results, strict=True):
            out[part] = result
    return outputs[0], outputs[2] if entropy else hidden.new_empty(0, dtype=wide), outputs[1]


def chunked_backward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    chunk_size: int,
    need_hidden: bool,
    need_lm_head: bool,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, lm_head and bias, each empty (``[0]``) if it is not needed."""
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    wide = accumulate_dtype(hidden, lm_head, bias)
    kernels = _row_kernels(hidden, wide)
    hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = _product_dtype(hidden, lm_head, wide)
    transform = LogitTransform(bias, logit_scale, softcap).to(wide)
    chunk = chunk_size or pick_chunk_size(rows, vocabulary, hidden.device.type)
    buffer = _chunk_buffer(hidden, vocabulary, chunk, wide)
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    # Chunks add up in the wide dtype, one after the other: the same sum every time.
    d_lm_head: Tensor | None = None
    d_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=wide)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        states = hidden[part].to(dtype)
        logits = _logits(states, lm_head, wide, buffer)
        row_args = (
            targets[part],
            entropy[part] if entropy.numel() else None,
            logsumexp[part],
            None if grad_log_probs is None else grad_log_probs[part].to(wide),
            None if grad_entropy is None else grad_entropy[part].to(wide),
            temperature,
        )
        if kernels:
            from .triton_kernels import log_probs_backward

            grad = log_probs_backward(logits, *row_args, transform, out_dtype=dtype)
        else:
            slope = transform.slope(transform.uncapped_(logits))
            grad = rows_backward(transform.capped_(logits), *row_args)
            grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
            del slope
        if need_bias:
            d_bias += grad.sum(0, dtype=wide)
        if need_hidden:
            d_hidden[part] = _grad_hidden(grad, lm_head, wide, logit_scale)
        if need_lm_head:
            d_lm_head = _add_product(d_lm_head, grad.mT, states, wide)
        # Freed before the next chunk's logits are made, so that there is one chunk at a time.
        del logits, grad
    if not need_lm_head:
        d_lm_head = lm_head.new_empty(0)
    elif d_lm_head is None:
        d_lm_head = torch.zeros_like(lm_head)
    elif logit_scale != 1.0:
        d_lm_head.mul_(logit_scale)
    return d_hidden, d_lm_head.to(lm_head.dtype), d_bias.to(wide if bias is None else bias.dtype)
