"""``token_log_probs`` as a PyTorch operator (namespace ``maxmin``)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .._autograd import differentiable_once
from .._backend import Backend, accumulate_dtype, check_call, keeps, without_autocast
from .._vmap import fold_vmap, loop_vmap
from .chunked import chunked_backward, chunked_forward, kept_rows
from .naive import token_log_probs_naive
from .transform import LogitTransform


def _operator(name: str, function: Callable[..., Any]) -> Any:
    """Make an operator whose products keep their dtype under autocast."""

    @wraps(function)
    def run(hidden: Tensor, *args: Any) -> Any:
        with without_autocast(hidden):
            return function(hidden, *args)

    return torch.library.custom_op(f"maxmin::{name}", run, mutates_args=(), device_types=("cpu", "cuda"))


_log_probs_op = _operator("token_log_probs", chunked_forward)
_log_probs_backward_op = _operator("token_log_probs_backward", chunked_backward)


@_log_probs_op.register_fake
def _log_probs_fake(hidden: Tensor, lm_head: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, entropy, chunk_size, bias, _, _, keep = args
    (rows, vocabulary), dtype = (hidden.shape[0], lm_head.shape[0]), accumulate_dtype(hidden, lm_head, bias)
    log_probs = hidden.new_empty(rows, dtype=dtype)
    entropies = hidden.new_empty(rows if entropy else 0, dtype=dtype)
    kept = kept_rows(rows, vocabulary, hidden.device, chunk_size) if keep else 0
    return log_probs, entropies, torch.empty_like(log_probs), hidden.new_empty(kept, vocabulary, dtype=dtype)


@_log_probs_backward_op.register_fake
def _log_probs_backward_fake(hidden: Tensor, lm_head: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_lm_head, bias, _, _, need_bias = args[-6:]
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    d_lm_head = lm_head.new_empty(lm_head.shape if need_lm_head else (0,))
    d_bias = hidden.new_empty(0, dtype=accumulate_dtype(hidden, lm_head)) if bias is None else bias
    return d_hidden, d_lm_head, d_bias.new_empty(lm_head.shape[0] if need_bias else 0)


def _log_probs_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, lm_head, targets, ctx.temperature, _, ctx.chunk_size, bias, ctx.logit_scale, ctx.softcap, _ = (
        inputs
    )
    _, entropy, logsumexp, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, kept)
    ctx.save_for_backward(hidden, lm_head, targets, entropy, logsumexp, kept, bias)


@differentiable_once
def _log_probs_autograd(
    ctx: Any, saved: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, *_: Any
) -> Any:
    need = [ctx.needs_input_grad[i] for i in (0, 1, 6)]
    *tensors, bias = saved
    grads = _log_probs_backward_op(
        *tensors,
        grad_log_probs,
        grad_entropy,
        ctx.temperature,
        ctx.chunk_size,
        *need[:2],
        bias,
        ctx.logit_scale,
        ctx.softcap,
        need[2],
    )
    d_hidden, d_lm_head, d_bias = (grad if n else None for grad, n in zip(grads, need, strict=True))
    return d_hidden, d_lm_head, None, None, None, None, d_bias, None, None, None


_log_probs_op.register_autograd(_log_probs_autograd, setup_context=_log_probs_setup)


@_log_probs_op.register_vmap
def _log_probs_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    if args[4]:  # the entropy
        return fold_vmap(_log_probs_op, (0, 2), info, in_dims, *args)
    return loop_vmap(_log_probs_op, info, in_dims, *args)


def token_log_probs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probability of each taken token, and the entropy, without the ``[N, V]`` logits.

    :math:`\log \text{softmax}(x / T)` at the target, with :math:`x = s\, h W^\top + b` and, under a soft cap,
    :math:`c \tanh(x / c)` in its place, computed for a chunk of tokens at a time with the library's matrix
    product and computed again in the backward pass, so that the memory is that of one chunk.

    Args:
        hidden: ``[N, H]`` hidden states at the positions that predict the targets; float32, bfloat16 or
            float16 (float64 is kept). Under autocast, both matrices are cast to its dtype.
        lm_head: ``[V, H]`` output embedding. If its dtype differs, both matrices are widened.
        targets: ``[N]`` int64 token ids in ``[0, V)``. On CUDA an id outside gives NaN.
        temperature: T > 0, that of sampling.
        entropy: Whether to return the entropy of the whole distribution too.
        logit_scale: s, finite and not 0 (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: c > 0 or None (Gemma 2's ``final_logit_softcapping``).
        bias: ``[V]`` floating point or None, added after scaling and before the cap, in float32.
        chunk_size: Tokens per chunk; None takes 256, or what gives 16 MB of logits (CPU), or what gives them
            a hundredth of a GPU's memory. On the CPU the last chunk's probabilities are kept for the backward
            pass, unless there is an entropy or a soft cap.
        backend: ``"auto"`` or ``"torch"`` (the full logits, differentiable every way).

    Returns:
        ``(log_probs [N], entropy [N] or None)`` in float32, differentiable in hidden, lm_head and bias.

    Raises:
        TypeError: If hidden or lm_head is not floating point, or the targets are not int64.
        ValueError: If shapes or devices do not fit, temperature, softcap or chunk_size is not positive,
            logit_scale is 0 or not finite, or the bias is not floating point.
        IndexError: If a target is outside the vocabulary (CPU).

    Example:
        >>> import torch
        >>> from maxmin_kernels import token_log_probs
        >>> hidden, lm_head, target = torch.zeros(1, 4), torch.ones(8, 4), torch.tensor([3])
        >>> log_probs, entropy = token_log_probs(hidden, lm_head, target, entropy=True)
        >>> torch.allclose(-log_probs, entropy)
        True
        >>> log_probs, _ = token_log_probs(hidden, lm_head, target, softcap=1.0, bias=torch.arange(8.0))
        >>> torch.allclose(log_probs, torch.arange(8.0).tanh().log_softmax(0)[3])
        True
    """
    transform = LogitTransform(bias, logit_scale, softcap)
    check_call(backend, hidden=hidden, lm_head=lm_head)
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if hidden.ndim != 2 or lm_head.ndim != 2 or hidden.shape[1] != lm_head.shape[1] or lm_head.shape[0] == 0:
        raise ValueError(
            "hidden must be [N, H] and lm_head [V, H] with the same H and V >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(lm_head.shape)}."
        )
    transform.check(lm_head.shape[0])
    check_call(backend, hidden=hidden, bias=bias)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}; convert it with .long().")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = [{hidden.shape[0]}], got {tuple(targets.shape)}.")
    if targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device}, hidden on {hidden.device}; move it there.")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        hidden, lm_head = hidden.to(low), lm_head.to(low)
    if backend == "torch":
        return token_log_probs_naive(hidden, lm_head, targets, temperature, entropy, **transform._asdict())
    keep = not entropy and softcap is None and keeps(hidden, lm_head, bias)
    log_probs, entropies, *_ = _log_probs_op(
        hidden, lm_head, targets, temperature, entropy, chunk_size or 0, *transform, keep
    )
    return log_probs, entropies if entropy else None
