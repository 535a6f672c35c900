"""The operators behind ``reward_heads_min`` and ``min_over_heads`` (namespace ``maxmin``).

Every operator has a CPU implementation (PyTorch, or the Triton kernel in the interpreter), a CUDA
implementation, a fake one for tracing, and rules for autograd and vmap. The head sums are always an output,
empty if not asked for, because an operator's number of outputs is fixed.
"""

from typing import Any

import torch
from torch import Tensor

from .._autograd import differentiable_once
from .._backend import accumulate_dtype, require_triton, use_triton_on_cpu, without_autocast
from .._vmap import fold_vmap, loop_vmap
from .naive import min_over_heads_backward_naive, min_over_heads_naive, reward_heads_min_naive


def check_head_mask(head_mask: Tensor | None) -> None:
    """Raise if every head is masked, where that can be read: on the CPU, outside tracing and batching.

    Raises:
        ValueError: If no head is real.
    """
    if head_mask is None or torch.compiler.is_compiling() or head_mask.device.type != "cpu":
        return
    plain = type(head_mask) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(head_mask)
    if plain and not head_mask.any():
        raise ValueError("head_mask is False for every head; at least one head must be True.")


# ---------------------------------------------------------------- min over given rewards [N, K]


@torch.library.custom_op("maxmin::min_over_heads", mutates_args=(), device_types="cpu")
def min_op(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return minimum, argmin, softmin and head sums (empty unless ``sums``)."""
    check_head_mask(head_mask)
    if use_triton_on_cpu(rewards):
        return _min_cuda(rewards, temperature, head_mask, row_mask, sums)
    return _min_torch(rewards, temperature, head_mask, row_mask, sums)


def _min_torch(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> Any:
    outputs = min_over_heads_naive(
        rewards, temperature, head_mask=head_mask, row_mask=row_mask, return_sums=sums
    )
    return outputs if sums else (*outputs, outputs[0].new_empty(0))


@min_op.register_kernel("cuda")
def _min_cuda(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> Any:
    if rewards.dtype == torch.float64:
        return _min_torch(rewards, temperature, head_mask, row_mask, sums)
    require_triton()
    from .triton_kernels import min_forward

    return min_forward(rewards, temperature, head_mask, row_mask, sums)


@min_op.register_fake
def _min_fake(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> Any:
    rows, heads = rewards.shape
    minimum = rewards.new_empty(rows, dtype=accumulate_dtype(rewards))
    argmin = rewards.new_empty(rows, dtype=torch.int64)
    return minimum, argmin, torch.empty_like(minimum), minimum.new_empty(heads if sums else 0)


@torch.library.custom_op("maxmin::min_over_heads_backward", mutates_args=(), device_types="cpu")
def _min_backward_op(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    grad_sums: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
) -> Tensor:
    args = (argmin, grad_rewards, grad_minimum, grad_softmin, grad_sums, temperature, head_mask, row_mask)
    if use_triton_on_cpu(rewards):
        return _min_backward_cuda(rewards, *args)
    return min_over_heads_backward_naive(rewards.to(accumulate_dtype(rewards)), *args)


@_min_backward_op.register_kernel("cuda")
def _min_backward_cuda(rewards: Tensor, *args: Any) -> Tensor:
    if rewards.dtype == torch.float64:
        return min_over_heads_backward_naive(rewards, *args)
    require_triton()
    from .triton_kernels import min_backward

    return min_backward(rewards, *args)


@_min_backward_op.register_fake
def _min_backward_fake(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards))


def _min_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, ctx.temperature, head_mask, row_mask, sums = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], *(() if sums else output[3:]))
    ctx.save_for_backward(rewards, output[1], head_mask, row_mask)


@differentiable_once
def _min_autograd(
    ctx: Any,
    saved: Any,
    grad_minimum: Tensor | None,
    _: Any,
    grad_softmin: Tensor | None,
    grad_sums: Tensor | None,
) -> Any:
    rewards, argmin, *masks = saved
    given = (None, grad_minimum, grad_softmin, grad_sums)
    grad = _min_backward_op(rewards, argmin, *given, ctx.temperature, *masks)
    return grad.to(rewards.dtype), None, None, None, None


torch.library.register_autograd("maxmin::min_over_heads", _min_autograd, setup_context=_min_setup)


@min_op.register_vmap
def _min_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _fold_or_loop(min_op, (0, 3), info, in_dims, args)


@_min_backward_op.register_vmap
def _min_backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    rows = (0, 1, 2, 3, 4, 8)
    (grad,), (dim,) = fold_vmap(lambda *a: (_min_backward_op(*a),), rows, info, in_dims, args)
    return grad, dim


def _fold_or_loop(op: Any, row_args: tuple[int, ...], info: Any, in_dims: Any, args: Any) -> Any:
    """Fold the batch into the rows, unless sums over the rows of each batch element are asked for."""
    if args[-1]:
        return loop_vmap(op, info, in_dims, args)
    outputs, dims = fold_vmap(lambda *a: op(*a)[:-1], row_args, info, in_dims, args)
    return (*outputs, outputs[0].new_empty(info.batch_size, 0)), (*dims, 0)


# ---------------------------------------------------------------- rewards of K linear heads, and their min


@torch.library.custom_op("maxmin::reward_heads_min", mutates_args=(), device_types="cpu")
def heads_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return rewards, minimum, argmin, softmin and head sums (empty unless ``sums``)."""
    check_head_mask(head_mask)
    args = (hidden, weight, bias, shift, scale, temperature, head_mask, row_mask, sums)
    return _heads_cuda(*args) if use_triton_on_cpu(*args[:5]) else _heads_torch(*args)


def _heads_torch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    head_mask: Tensor | None,
    row_mask: Tensor | None,
    sums: bool,
) -> Any:
    outputs = reward_heads_min_naive(
        hidden,
        weight,
        bias,
        shift=shift,
        scale=scale,
        temperature=temperature,
        head_mask=head_mask,
        row_mask=row_mask,
        return_sums=sums,
    )
    return outputs if sums else (*outputs, outputs[0].new_empty(0))


@heads_op.register_kernel("cuda")
def _heads_cuda(*args: Any) -> Any:
    if accumulate_dtype(*args[:5]) == torch.float64:
        return _heads_torch(*args)
    require_triton()
    from .triton_kernels import heads_forward

    return heads_forward(*args)


@heads_op.register_fake
def _heads_fake(hidden: Tensor, weight: Tensor, *args: Any) -> Any:
    rows, heads, sums = hidden.shape[0], weight.shape[0], args[-1]
    rewards = hidden.new_empty(rows, heads, dtype=accumulate_dtype(hidden, weight, *args[:3]))
    minimum, argmin = rewards.new_empty(rows), hidden.new_empty(rows, dtype=torch.int64)
    return rewards, minimum, argmin, torch.empty_like(minimum), rewards.new_empty(heads if sums else 0)


def _heads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, shift, scale, ctx.temperature, head_mask, row_mask, sums = inputs
    rewards, _, argmin, *_ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmin, *(() if sums else output[4:]))
    ctx.save_for_backward(hidden, weight, scale, rewards, argmin, head_mask, row_mask)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, shift))


@differentiable_once
def _heads_autograd(
    ctx: Any,
    saved: Any,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    _: Any,
    grad_softmin: Tensor | None,
    grad_sums: Tensor | None,
) -> Any:
    given = (grad_rewards, grad_minimum, grad_softmin, grad_sums)
    hidden, weight, scale, rewards, argmin, head_mask, row_mask = saved
    bias_dtype, shift_dtype = ctx.dtypes
    need = ctx.needs_input_grad
    grad = _min_backward_op(rewards, argmin, *given, ctx.temperature, head_mask, row_mask)
    if head_mask is not None:
        # Whatever a masked head holds must not reach the others as 0 * NaN, unless its reward is used.
        unused = ~head_mask & (grad == 0).all(0)
        weight, rewards = weight.masked_fill(unused.unsqueeze(-1), 0.0), rewards.masked_fill(unused, 0.0)
        scale = None if scale is None else scale.masked_fill(unused, 1.0)
    d_scale = None
    if scale is not None:
        grad = grad / scale.to(grad.dtype)
        if need[4]:
            d_scale = -(grad * rewards).sum(0).to(scale.dtype)
    # The library's matrix product, in the inputs' dtype: low precision on the GPU, accumulation in float32.
    low = weight.dtype if hidden.is_cuda and weight.dtype == hidden.dtype else grad.dtype
    rounded = grad.to(low)
    d_hidden = d_weight = None
    with without_autocast(hidden):
        if need[0]:
            d_hidden = (rounded @ weight.to(low)).to(hidden.dtype)
        if need[1]:
            # A copy without what the padding holds, for 0 * NaN is NaN.
            clean = hidden if row_mask is None else torch.where(row_mask.unsqueeze(-1), hidden, 0.0)
            d_weight = (rounded.mT @ clean.to(low)).to(weight.dtype)
    d_bias = grad.sum(0).to(bias_dtype) if bias_dtype is not None and need[2] else None
    d_shift = -grad.sum(0).to(shift_dtype) if shift_dtype is not None and need[3] else None
    return d_hidden, d_weight, d_bias, d_shift, d_scale, None, None, None, None


torch.library.register_autograd("maxmin::reward_heads_min", _heads_autograd, setup_context=_heads_setup)


@heads_op.register_vmap
def _heads_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return _fold_or_loop(heads_op, (0, 7), info, in_dims, args)
