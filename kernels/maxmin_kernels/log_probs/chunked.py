"""The loops over the logits, which never stand in memory whole: a chunk of tokens in the forward pass, a block
of the vocabulary in the backward pass.

Forward, a row's sum needs all of its logits. Backward, the sum is known, so each logit's gradient follows from
that logit alone, and blocks of the vocabulary can be taken for all rows at once: the gradient of ``lm_head`` is
then written once, a block at a time, and what has to be added up is that of the hidden states, which is smaller
by V / N.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype, require_triton, use_triton_on_cpu
from .transform import LogitTransform

# Elements of logits in memory at once, and the least rows with which a matrix product is still efficient.
_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
_LEAST_ROWS = {"cpu": 256, "cuda": 256}
# Rows of a matrix in low precision start at multiples of this, else the library's products are slow.
_ALIGNED = 64


def pick_chunk_size(rows: int, vocabulary: int, device: str) -> int:
    """Return the tokens per chunk: as few equal chunks as the budget allows, one if the problem is small."""
    most = max(_ELEMENTS[device] // max(vocabulary, 1), _LEAST_ROWS[device])
    return equal_parts(rows, most)


def equal_parts(total: int, most: int) -> int:
    """Return the size of as few equal parts as there can be with at most ``most`` in each."""
    parts = max(1, -(-total // most))
    return max(1, -(-total // parts))


class Tile(NamedTuple):
    """Rows and columns of the logits that the backward pass holds at once."""

    rows: int
    columns: int


def pick_tile(rows: int, width: int, vocabulary: int, device: str, chunk_size: int, widened: bool) -> Tile:
    """Return the tile of the backward pass.

    All rows, so that nothing but the hidden states' gradient is added up, unless there are more of them than
    the vocabulary has tokens.

    Args:
        rows: Tokens.
        width: Of the hidden states.
        vocabulary: Rows of ``lm_head``.
        device: ``cpu`` or ``cuda``.
        chunk_size: Tokens per chunk of the forward pass, for as many elements at once; 0 picks.
        widened: Whether a block of ``lm_head`` is copied in a wider dtype, so that it has a limit as well.
    """
    budget = chunk_size * vocabulary or _ELEMENTS[device]
    part = equal_parts(rows, max(vocabulary, budget // max(vocabulary, 1)))
    least = 1 if chunk_size else _LEAST_ROWS[device]
    columns = max(budget // part, least, 1)
    if widened:
        columns = min(columns, block_rows(width, device))
    columns = equal_parts(vocabulary, columns)
    if not chunk_size and columns < vocabulary:
        columns = -(-columns // _ALIGNED) * _ALIGNED
    return Tile(part, min(columns, vocabulary))


def block_rows(width: int, device: str) -> int:
    """Return the rows of an output layer that are widened at once, where it is not wide by itself."""
    return max(1, _ELEMENTS[device] // 2 // max(width, 1))


def _product_dtype(hidden: Tensor, lm_head: Tensor, wide: torch.dtype) -> torch.dtype:
    """Return the dtype of a product's factors, low only where its sums can be float32."""
    low = hidden.is_cuda and hidden.dtype == lm_head.dtype and wide == torch.float32
    return hidden.dtype if low else wide


def _logits_buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return room for ``[rows, columns]``, used again and again; rows are aligned on CUDA.

    Fresh pages would be cleared by the system, which takes a sixth of the time of a product.
    """
    stride = -(-columns // _ALIGNED) * _ALIGNED if like.is_cuda else columns
    return like.new_empty(rows, stride, dtype=dtype)[:, :columns]


def _put_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, add: bool = False) -> Tensor:
    """Write ``alpha * left @ right`` into the total, or add it; sums are at least float32."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, beta=int(add), alpha=alpha)
    if not left.is_cuda or left.dtype in (torch.float32, torch.float64):
        product = torch.mm(left, right)
        if alpha != 1.0:
            product.mul_(alpha)
        return total.add_(product) if add else total.copy_(product)
    return _put_wide_product(total, left, right, alpha, add)


def _put_wide_product(total: Tensor, left: Tensor, right: Tensor, alpha: float, add: bool) -> Tensor:
    """Do so with factors in low precision, whose product the library can write in float32."""
    wide: dict[str, Any] = {"out_dtype": total.dtype, "out": total}
    if not add and alpha == 1.0:
        return torch.mm(left, right, **wide)
    return torch.addmm(total, left, right, beta=int(add), alpha=alpha, **wide)


def _put_logits(logits: Tensor, hidden: Tensor, lm_head: Tensor) -> Tensor:
    """Write a chunk of logits; an output layer of another dtype is widened in blocks."""
    if hidden.dtype == lm_head.dtype:
        return _put_product(logits, hidden, lm_head.mT)
    rows = block_rows(lm_head.shape[1], lm_head.device.type)
    for start in range(0, lm_head.shape[0], rows):
        block = slice(start, start + rows)
        _put_product(logits[:, block], hidden, lm_head[block].to(hidden.dtype).mT)
    return logits


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
    """Return the gradient with respect to one block of logits. Overwrites the logits.

    ``d log p_target / dx = onehot - p`` and ``dH / dx = -p (log p + H)``, both over T. Targets are columns of
    the block; one outside is in another block.
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
        last = logits.shape[-1] - 1
        inside = (targets >= 0) & (targets <= last)
        columns = targets.clamp(0, last).unsqueeze(-1)
        grad.scatter_add_(-1, columns, grad_log_probs.where(inside, 0.0).unsqueeze(-1))
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
    buffer = _logits_buffer(hidden, min(chunk, rows), vocabulary, wide)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        states = hidden[part].to(dtype)
        logits = _put_logits(buffer[: states.shape[0]], states, lm_head)
        if kernels:
            from .triton_kernels import log_probs_forward

            results = log_probs_forward(logits, targets[part], temperature, entropy, transform)
        else:
            logits = transform.capped_(transform.uncapped_(logits))
            results = rows_forward(logits, targets[part], temperature, entropy)
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
    (rows, width), vocabulary = hidden.shape, lm_head.shape[0]
    wide = accumulate_dtype(hidden, lm_head, bias)
    kernels = _row_kernels(hidden, wide)
    hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = _product_dtype(hidden, lm_head, wide)
    transform = LogitTransform(bias, logit_scale, softcap).to(wide)
    tile = pick_tile(rows, width, vocabulary, hidden.device.type, chunk_size, lm_head.dtype != dtype)
    # What is added up is so in the wide dtype, one tile after the other: the same sum every time.
    once = tile.columns >= vocabulary
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    total = None if once or hidden.dtype == wide else hidden.new_empty(tile.rows, width, dtype=wide)
    lm_head_dtype = lm_head.dtype if tile.rows >= rows else wide
    d_lm_head = lm_head.new_empty(lm_head.shape if need_lm_head else (0,), dtype=lm_head_dtype)
    d_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=wide)
    buffer = _logits_buffer(hidden, min(tile.rows, rows), tile.columns, wide)
    narrow = buffer if dtype == wide else _logits_buffer(hidden, *buffer.shape, dtype)
    for start in range(0, rows, tile.rows):
        part = slice(start, min(start + tile.rows, rows))
        states = hidden[part].to(dtype)
        size = states.shape[0]
        row_args = (
            entropy[part] if entropy.numel() else None,
            logsumexp[part],
            None if grad_log_probs is None else grad_log_probs[part].to(wide),
            None if grad_entropy is None else grad_entropy[part].to(wide),
            temperature,
        )
        d_states = d_hidden[part] if total is None else total[:size]
        for first in range(0, vocabulary, tile.columns):
            block = slice(first, min(first + tile.columns, vocabulary))
            weights = lm_head[block].to(dtype)
            logits = _put_product(buffer[:size, : weights.shape[0]], states, weights.mT)
            targets_here = targets[part] - first
            transform_here = transform.of_block(block)
            if kernels:
                from .triton_kernels import log_probs_backward

                grad = narrow[:size, : weights.shape[0]]
                log_probs_backward(logits, targets_here, *row_args, transform_here, out=grad)
            else:
                slope = transform_here.slope(transform_here.uncapped_(logits))
                grad = rows_backward(transform_here.capped_(logits), targets_here, *row_args)
                grad = (grad if slope is None else grad.mul_(slope)).to(dtype)
                del slope
            if need_bias:
                d_bias[block] += grad.sum(0, dtype=wide)
            if need_hidden:
                _put_product(d_states, grad, weights, logit_scale, add=first > 0)
            if need_lm_head:
                _put_product(d_lm_head[block], grad.mT, states, logit_scale, add=start > 0)
        if need_hidden and total is not None:
            d_hidden[part] = d_states
    if need_lm_head and rows == 0:
        d_lm_head.zero_()
    return d_hidden, d_lm_head.to(lm_head.dtype), d_bias.to(wide if bias is None else bias.dtype)
