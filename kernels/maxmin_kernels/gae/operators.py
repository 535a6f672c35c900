"""The operators behind ``vector_gae`` and ``token_gae`` (namespace ``maxmin``).

Every operator has a CPU implementation (PyTorch, or the Triton kernel in the interpreter), a CUDA
implementation, a fake one for tracing, and a rule for vmap; the estimates are targets, so none for autograd.
Both return advantage, value target, weighted advantage and moments; an output that was not asked for is
empty, because an operator's number of outputs is fixed.
"""

from typing import Any

import torch
from torch import Tensor

from .._backend import accumulate_dtype, require_triton, use_triton_on_cpu
from .._vmap import fold_vmap, loop_vmap
from .cpu import discounted_sum_in_place
from .naive import token_gae_naive, vector_gae_naive

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _pad_outputs(outputs: tuple[Tensor, ...], weighted: bool, moments: bool) -> Outputs:
    """Put an empty tensor where an output was not asked for."""
    advantage, target, *rest = outputs
    weights_out = rest.pop(0) if weighted else advantage.new_empty(0)
    return advantage, target, weights_out, rest.pop(0) if moments else advantage.new_empty(0)


def _fake_outputs(value: Tensor, dtype: torch.dtype, weighted: bool, moments: bool) -> Outputs:
    advantage = value.new_empty(value.shape, dtype=dtype)
    return (
        advantage,
        torch.empty_like(advantage),
        advantage.new_empty((*value.shape[:-1], 1) if weighted else 0),
        advantage.new_empty(3 if moments else 0),
    )


def _batch(op: Any, row_args: tuple[int, ...], weights: int, info: Any, in_dims: Any, args: Any) -> Any:
    """Fold the batch into the rows, unless each batch element has moments of its own."""
    if args[-1]:
        return loop_vmap(op, info, in_dims, args)
    used = 2 if args[weights] is None else 3
    outputs, dims = fold_vmap(lambda *a: op(*a)[:used], row_args, info, in_dims, args)
    empty = [outputs[0].new_empty(info.batch_size, 0) for _ in range(4 - used)]
    return (*outputs, *empty), (*dims, *[0] * len(empty))


# ---------------------------------------------------------------- steps with their own end signals


@torch.library.custom_op("maxmin::vector_gae", mutates_args=(), device_types="cpu")
def gae_op(
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
    """Estimate from rewards and values ``[B, T, K]``, end signals ``[B, T, 1]`` and a mask ``[B, T]``."""
    args = (reward, value, next_value, done, terminated, mask, weights, gamma, lmbda, moments)
    return _gae_cuda(*args) if use_triton_on_cpu(reward, value, next_value) else _gae_torch(*args)


def _gae_torch(*args: Any) -> Outputs:
    *signals, mask, weights, gamma, lmbda, moments = args
    outputs = vector_gae_naive(*signals, gamma, lmbda, mask, weights, moments, discounted_sum_in_place)
    return _pad_outputs(outputs, weights is not None, moments)


@gae_op.register_kernel("cuda")
def _gae_cuda(*args: Any) -> Outputs:
    if accumulate_dtype(*args[:3]) == torch.float64:
        return _gae_torch(*args)
    require_triton()
    from .triton_kernels import gae_forward

    return gae_forward(*args)


@gae_op.register_fake
def _gae_fake(*args: Any) -> Outputs:
    return _fake_outputs(args[0], accumulate_dtype(*args[:3]), args[6] is not None, args[-1])


@gae_op.register_vmap
def _gae_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _batch(gae_op, (0, 1, 2, 3, 4, 5), 6, info, in_dims, args)


# ---------------------------------------------------------------- tokens of responses


@torch.library.custom_op("maxmin::token_gae", mutates_args=(), device_types="cpu")
def token_gae_op(
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
    """Estimate from rewards ``[B, K]``, values ``[B, T, C]``, a mask and log-probabilities ``[B, T]``."""
    if not (mask[:, :1].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError(
            "mask must be right-padded: each row True at its first tokens, at least one, then False."
        )
    tensors = (terminal_reward, value, mask, sample_log_prob, ref_log_prob, group_weights)
    run = _token_gae_cuda if use_triton_on_cpu(*tensors[:2], *tensors[3:5]) else _token_gae_torch
    return run(*tensors, gamma, lmbda, kl_coef, moments)


def _token_gae_torch(*args: Any) -> Outputs:
    reward, value, mask, log_prob, ref_log_prob, weights, gamma, lmbda, kl_coef, moments = args
    outputs = token_gae_naive(
        reward, value, mask, gamma, lmbda, log_prob, ref_log_prob, kl_coef, weights, moments,
        discounted_sum_in_place,
    )  # fmt: skip
    return _pad_outputs(outputs, weights is not None, moments)


@token_gae_op.register_kernel("cuda")
def _token_gae_cuda(*args: Any) -> Outputs:
    if accumulate_dtype(*args[:2], *args[3:5]) == torch.float64:
        return _token_gae_torch(*args)
    require_triton()
    from .triton_kernels import token_gae_forward

    return token_gae_forward(*args)


@token_gae_op.register_fake
def _token_gae_fake(*args: Any) -> Outputs:
    dtype = accumulate_dtype(*args[:2], *args[3:5])
    return _fake_outputs(args[1], dtype, args[5] is not None, args[-1])


@token_gae_op.register_vmap
def _token_gae_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _batch(token_gae_op, (0, 1, 2, 3, 4), 5, info, in_dims, args)
