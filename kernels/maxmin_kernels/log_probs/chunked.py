"""The loops over the logits, of which a part stands in memory at a time.

Forward it is a chunk of tokens, since a row's sum needs all of its logits. Backward, the sum is known and
each gradient follows from its logit alone, so that it is a block of the vocabulary for all tokens: that of
``lm_head`` is written once, and what has to be added up is that of the hidden states, smaller by V / N.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import accumulate_dtype, require_triton, use_triton_on_cpu
from .transform import LogitTransform

# Elements of logits in memory at once, and the least rows with which a matrix product is still efficient.
_CPU_ELEMENTS = 2**22
_LEAST_ROWS = 256
# A GPU gives them a hundredth of its memory, within bounds: larger blocks, fewer sums to add up.
_CUDA_ELEMENTS = (2**25, 3 * 2**26)
_USUAL_MEMORY = 80 * 2**30
# Matrices in low precision whose sizes and rows are no multiples of this are slow in the library's products.
_ALIGNED = 64


@functools.cache
def budget_elements(device: torch.device | str) -> int:
    """Return how many logits may stand in memory at once on a device; of a GPU that is not there, 80 GB's."""
    device = torch.device(device)
    if device.type != "cuda":
        return _CPU_ELEMENTS
    there = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(device).total_memory if there else _USUAL_MEMORY
    least, most = _CUDA_ELEMENTS
    # Four bytes of the logit and two of its gradient.
    return min(max(memory // 100 // 6, least), most)


def pick_chunk_size(rows: int, vocabulary: int, device: torch.device | str) -> int:
    """Return the tokens per chunk: as few equal chunks as the budget allows, one if the problem is small."""
    return equal_parts(rows, max(budget_elements(device) // max(vocabulary, 1), _LEAST_ROWS))


def equal_parts(total: int, most: int) -> int:
    """Return the size of as few equal parts as there can be with at most ``most`` in each."""
    parts = max(1, -(-total // most))
    return max(1, -(-total // parts))


class Tile(NamedTuple):
    """Rows and columns of the logits that the backward pass holds at once."""

    rows: int
    columns: int


def pick_tile(
    rows: int, width: int, vocabulary: int, device: torch.device | str, chunk_size: int, widened: bool
) -> Tile:
    """Return the tile of the backward pass.

    All rows, so that nothing but the hidden states' gradient is added up, unless there are more of them than
    the vocabulary has tokens.

    Args:
        rows: Tokens.
        width: Of the hidden states.
        vocabulary: Rows of ``lm_head``.
        device: Whose memory sets the limit.
        chunk_size: Tokens per chunk of the forward pass, for as many elements at once; 0 picks.
        widened: Whether a block of ``lm_head`` is copied in a wider dtype, so that it has a limit as well.
    """
    budget = chunk_size * vocabulary or budget_elements(device)
    part = equal_parts(rows, max(vocabulary, budget // max(vocabulary, 1)))
    columns = max(budget // part, 1 if chunk_size else _LEAST_ROWS)
    if widened:
        columns = min(columns, block_rows(width, device))
    columns = equal_parts(vocabulary, columns)
    if columns < vocabulary and not chunk_size:
        columns = -(-columns // _ALIGNED) * _ALIGNED
    return Tile(part, min(columns, vocabulary))


def block_rows(width: int, device: torch.device | str) -> int:
    """Return the rows of an output layer that are widened at once, where it is not wide by itself."""
    return max(1, budget_elements(device) // 2 // max(width, 1))


def blocks(total: int, size: int, aligned: bool) -> Iterator[slice]:
    """Cut a vocabulary into blocks; if ``aligned``, what is left over beyond a multiple of 64 by itself.

    An odd number of columns makes a product in low precision eight times slower (50257 on an H200).
    """
    for start in range(0, total, size):
        end = min(start + size, total)
        odd = (end - start) % _ALIGNED if aligned and end - start > _ALIGNED else 0
        yield slice(start, end - odd)
        if odd:
            yield slice(end - odd, end)


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
    (vocabulary, width), low = lm_head.shape, hidden.dtype != logits.dtype
    size = vocabulary if hidden.dtype == lm_head.dtype else block_rows(width, lm_head.device)
    for block in blocks(vocabulary, size, low):
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


def _log_smallest(dtype: torch.dtype, terms: int = 1) -> float:
    """Return where ``exp`` is e * tiny, times the terms of a sum that will divide it.

    Subnormal numbers, below tiny, cost a CPU ten times more.
    """
    return math.log(torch.finfo(dtype).tiny) + 1.0 + math.log(terms)


def kept_rows(rows: int, vocabulary: int, device: torch.device | str, chunk_size: int) -> int:
    """Return the tokens of the last chunk, whose probabilities can be kept for the backward pass.

    They save it that much of its product, and are no more than stood in memory before. None where there is
    but one chunk, which takes little time.
    """
    chunk = chunk_size or pick_chunk_size(rows, vocabulary, device)
    return rows - (rows - 1) // chunk * chunk if rows > chunk else 0


def rows_forward(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> list[Tensor]:
    """Return log-probability, logsumexp and (if asked) entropy of one chunk. Overwrites the logits."""
    if temperature != 1.0:
        logits.div_(temperature)
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    highest = logits.amax(-1, keepdim=True)
    below = logits.sub_(highest).clamp_(min=_log_smallest(logits.dtype, logits.shape[-1]))
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
        _add_at_targets(grad, targets, grad_log_probs)
    return grad if temperature == 1.0 else grad.div_(temperature)


def _add_at_targets(grad: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """Add a value at each row's target, where that is a column."""
    last = grad.shape[-1] - 1
    inside = (targets >= 0) & (targets <= last)
    columns = targets.clamp(0, last).unsqueeze(-1)
    return grad.scatter_add_(-1, columns, values.where(inside, 0.0).unsqueeze(-1))


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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(log_probs [N], entropy [N] or [0], logsumexp [N], kept [M, V])``; ``chunk_size`` 0 picks one.

    Kept are the probabilities of the last M rows, if ``keep``: M is 0, or that of :func:`kept_rows`.
    """
    rows, vocabulary = hidden.shape[0], lm_head.shape[0]
    _check_targets(targets, vocabulary)
    wide = accumulate_dtype(hidden, lm_head, bias)
    kernels = _row_kernels(hidden, wide)
    hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = _product_dtype(hidden, lm_head, wide)
    transform = LogitTransform(bias, logit_scale, softcap).to(wide)
    chunk = chunk_size or pick_chunk_size(rows, vocabulary, hidden.device)
    outputs = [hidden.new_empty(rows, dtype=wide) for _ in range(3 if entropy else 2)]
    buffer = _logits_buffer(hidden, min(chunk, rows), vocabulary, wide)
    kept = hidden.new_empty(0, vocabulary, dtype=wide)
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
    if keep and (size := kept_rows(rows, vocabulary, hidden.device, chunk_size)):
        kept = buffer[:size]  # holds exp(x - max), the largest of which is 1
        kept.div_(kept.sum(-1, keepdim=True))
    return outputs[0], outputs[2] if entropy else hidden.new_empty(0, dtype=wide), outputs[1], kept


def chunked_backward(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    kept: Tensor,
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
    low = dtype != wide
    tile = pick_tile(rows, width, vocabulary, hidden.device, chunk_size, lm_head.dtype != dtype)
    columns = list(blocks(vocabulary, tile.columns, low))
    # What is added up is so in the wide dtype, one block after the other: the same sum every time.
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    added = need_hidden and len(columns) > 1 and hidden.dtype != wide
    total = hidden.new_empty(tile.rows, width, dtype=wide) if added else None
    lm_head_dtype = lm_head.dtype if tile.rows >= rows else wide
    d_lm_head = lm_head.new_empty(lm_head.shape if need_lm_head else (0,), dtype=lm_head_dtype)
    d_bias = hidden.new_zeros(vocabulary if need_bias else 0, dtype=wide)
    buffer = _logits_buffer(hidden, min(tile.rows, rows), tile.columns, wide)
    narrow = _logits_buffer(hidden, buffer.shape[0], buffer.shape[1], dtype) if low else buffer
    fresh = rows - kept.shape[0]
    for start in range(0, rows, tile.rows):
        part = slice(start, min(start + tile.rows, rows))
        states = hidden[part].to(dtype)
        size = states.shape[0]
        d_states = d_hidden[part] if total is None else total[:size]
        # Of the rows behind, the probabilities are at hand.
        to_do = slice(start, max(start, min(part.stop, fresh)))
        at_hand = slice(to_do.stop, part.stop)
        row_args = (
            entropy[to_do] if entropy.numel() else None,
            logsumexp[to_do],
            None if grad_log_probs is None else grad_log_probs[to_do].to(wide),
            None if grad_entropy is None else grad_entropy[to_do].to(wide),
            temperature,
        )
        for block in columns:
            weights = lm_head[block].to(dtype)
            n, width_here = to_do.stop - start, weights.shape[0]
            grad = narrow[:size, :width_here]
            if n:
                logits = _put_product(buffer[:n, :width_here], states[:n], weights.mT)
                block_args = (targets[to_do] - block.start, *row_args, transform.of_block(block))
                # The gradient of the bias is a sum over rows of what is not rounded yet.
                out = logits if need_bias else grad[:n]
                grad_here = _gradient_of_logits(logits, *block_args, kernels=kernels, out=out)
            if n < size and grad_log_probs is not None:  # nothing is kept where there is an entropy
                known = kept[at_hand.start - fresh : at_hand.stop - fresh, block]
                gains = grad_log_probs[at_hand].to(wide) / temperature
                torch.mul(known, gains.neg().unsqueeze(-1), out=grad[n:])
                _add_at_targets(grad[n:], targets[at_hand] - block.start, gains)
                grad_here = grad
            if need_bias:
                d_bias[block] += grad_here.sum(0)
            grad = grad.copy_(grad_here) if grad_here.dtype != dtype else grad_here
            if need_hidden:
                _put_product(d_states, grad, weights, logit_scale, add=block.start > 0)
            if need_lm_head:
                _put_product(d_lm_head[block], grad.mT, states, logit_scale, add=start > 0)
            del grad_here, grad, weights  # before the next block's are made
        if total is not None:
            d_hidden[part] = d_states
    if need_lm_head and rows == 0:
        d_lm_head.zero_()
    return d_hidden, d_lm_head.to(lm_head.dtype), d_bias.to(wide if bias is None else bias.dtype)


def _gradient_of_logits(logits: Tensor, *args: Any, kernels: bool, out: Tensor) -> Tensor:
    """Return the gradient of ``scale h W^T + bias``. Overwrites the logits.

    Args:
        logits: A block of ``h W^T``.
        *args: Those of :func:`rows_backward`, and the transform of the block.
        kernels: Whether one Triton kernel does it all.
        out: Where a kernel writes to; may be the logits.
    """
    if kernels:
        from .triton_kernels import log_probs_backward

        log_probs_backward(logits, *args, out=out)
        return out
    *row_args, transform = args
    slope = transform.slope(transform.uncapped_(logits))
    grad = rows_backward(transform.capped_(logits), *row_args)
    return grad if slope is None else grad.mul_(slope)
