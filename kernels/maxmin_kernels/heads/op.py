"""``reward_heads_min`` and ``min_over_heads``: the operators (namespace ``maxmin``) and the public functions.

The head sums are always an operator's output, empty if not asked for, because the number of outputs is fixed.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd import differentiable_once
from .._backend import Backend, accumulate_dtype, call, check_call, kernel_operator, without_autocast
from .._narrow import narrow_linear
from .._vmap import fold_rows_vmap, fold_vmap
from .naive import (
    linear_rewards,
    min_over_heads_backward_naive,
    min_over_heads_naive,
    reward_heads_min_naive,
)


def _check_head_mask(head_mask: Tensor | None) -> None:
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


@kernel_operator(
    "min_over_heads", "heads.min_forward", floats=(0,), check=lambda *args: _check_head_mask(args[2])
)
def _min_op(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return minimum, argmin, softmin and head sums (empty unless ``sums``)."""
    masks = {"head_mask": head_mask, "row_mask": row_mask}
    outputs: Any = min_over_heads_naive(rewards, temperature, **masks, return_sums=sums)
    return outputs if sums else (*outputs, outputs[0].new_empty(0))


@_min_op.register_fake
def _min_fake(
    rewards: Tensor, temperature: float, head_mask: Tensor | None, row_mask: Tensor | None, sums: bool
) -> Any:
    rows, heads = rewards.shape
    minimum = rewards.new_empty(rows, dtype=accumulate_dtype(rewards))
    argmin = rewards.new_empty(rows, dtype=torch.int64)
    return minimum, argmin, torch.empty_like(minimum), minimum.new_empty(heads if sums else 0)


_min_backward_op = kernel_operator("min_over_heads_backward", "heads.min_backward", floats=(0,))(
    min_over_heads_backward_naive
)


@_min_backward_op.register_fake
def _min_backward_fake(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards))


@_min_backward_op.register_vmap
def _min_backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    rows = (0, 1, 2, 3, 4, 8)
    (grad,), (dim,) = fold_vmap(lambda *a: (_min_backward_op(*a),), rows, info, in_dims, *args)
    return grad, dim


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


_min_op.register_autograd(_min_autograd, setup_context=_min_setup)
_min_op.register_vmap(partial(fold_rows_vmap, _min_op, (0, 3)))


# ---------------------------------------------------------------- rewards of K linear heads, and their min


@kernel_operator(
    "reward_heads_min", "heads.heads_forward", floats=range(5), check=lambda *args: _check_head_mask(args[6])
)
def _heads_op(
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
    rewards = linear_rewards(hidden, weight, bias, shift, scale, row_mask, narrow_linear)
    masks = {"head_mask": head_mask, "row_mask": row_mask}
    lowest: Any = min_over_heads_naive(rewards, temperature, **masks, return_sums=sums)
    return (rewards, *lowest) if sums else (rewards, *lowest, rewards.new_empty(0))


@_heads_op.register_fake
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


_heads_op.register_autograd(_heads_autograd, setup_context=_heads_setup)
_heads_op.register_vmap(partial(fold_rows_vmap, _heads_op, (0, 7)))


# ---------------------------------------------------------------- the public functions


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; use `minimum` for the limit 0.")


def _check_mask(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; convert it with .bool().")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}.")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the other tensors on {device}; move it there.")


def min_over_heads(
    rewards: Tensor,
    *,
    temperature: float = 1.0,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Minimum, argmin and soft minimum over the last dimension of given rewards.

    :math:`\text{softmin} = -T \log \frac1K \sum_k e^{-r_k/T}`, so that equal heads give their value.
    Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.

    Args:
        rewards: ``[..., K]`` with K >= 1; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        temperature: T > 0.
        head_mask: ``[K]`` bool or None, True at real heads: the others, NaN or not, are never the minimum and
            no part of the soft minimum's mean. On CUDA, where checking would wait for the device, no real
            head gives minimum and softmin +inf, argmin 0.
        row_mask: ``[...]`` bool or None, True at real rows: the others return 0, whatever they hold, are no
            part of the sums and get no gradient.
        return_sums: Whether to return the sums over rows too.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable every way).

    Returns:
        ``(minimum [...], argmin [...] int64, softmin [...])`` in float32, differentiable except
        for ``argmin``. With ``return_sums`` also ``head_sums [K]``, differentiable: the rewards of every head
        (masked ones too) summed over the real rows, equal in every bit from call to call.

    Raises:
        TypeError: If the rewards are not floating point or a mask is not bool.
        ValueError: If there is no head, the temperature is not positive, shapes or devices do not fit, or
            (CPU) every head is masked.

    Example:
        >>> import torch
        >>> from maxmin_kernels import min_over_heads
        >>> minimum, argmin, softmin = min_over_heads(torch.tensor([[2.0, 1.0, 1.0]]))
        >>> minimum.item(), argmin.item()
        (1.0, 1)
    """
    check_call(backend, rewards=rewards)
    _check_temperature(temperature)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards must be [..., K] with K >= 1, got shape {tuple(rewards.shape)}.")
    batch, heads = rewards.shape[:-1], rewards.shape[-1]
    _check_mask("head_mask", head_mask, rewards.shape[-1:], rewards.device)
    _check_mask("row_mask", row_mask, batch, rewards.device)
    if backend == "torch":
        _check_head_mask(head_mask)
        return min_over_heads_naive(
            rewards, temperature, head_mask=head_mask, row_mask=row_mask, return_sums=return_sums
        )
    rows = math.prod(batch)
    row_mask = None if row_mask is None else row_mask.reshape(rows)
    *lowest, sums = call(_min_op, rewards.reshape(rows, heads), temperature, head_mask, row_mask, return_sums)
    outputs = tuple(out.reshape(batch) for out in lowest)
    return (*outputs, sums) if return_sums else outputs


def reward_heads_min(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float = 1.0,
    head_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    return_sums: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    r"""Rewards of K linear heads on one hidden state, with their minimum and soft minimum.

    :math:`r = (h W^\top + b - \text{shift}) / \text{scale}` in float32: ``shift`` and ``scale`` put the heads
    on one convention before the minimum is taken (Bradley-Terry fixes a reward only up to an offset). The
    minimum over heads is the reward of MaxMin-RLHF (Chakraborty et al., ICML 2024, arXiv 2402.08925) per
    sample; ``(head_sums / N).min()`` is the smallest of the groups' means, the paper's objective.

    Args:
        hidden: ``[N, H]``; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        weight: ``[K, H]``. If its dtype differs from that of ``hidden``, both are widened.
        bias: ``[K]`` or None.
        shift: ``[K]`` or None, subtracted.
        scale: ``[K]`` or None, divided by.
        temperature: T > 0 of ``softmin = -T log mean_k exp(-r_k / T)``.
        head_mask: ``[K]`` bool or None, True at real heads: the others, NaN or not, return their reward but
            are never the minimum and no part of the soft minimum's mean. If a masked head's reward gets no
            gradient, nothing it holds reaches another gradient (with ``backend="torch"`` its NaN does). On
            CUDA, where checking would wait for the device, no real head gives minimum and softmin +inf,
            argmin 0.
        row_mask: ``[N]`` bool or None, True at real rows: the others return 0, whatever they hold, are no
            part of the sums, and neither get nor pass a gradient. The gradient of ``weight`` then takes a
            copy of ``hidden``.
        return_sums: Whether to return the sums over rows too.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable every way).

    Returns:
        ``(rewards [N, K], minimum [N], argmin [N] int64, softmin [N])`` in float32; all but ``argmin`` are
        differentiable. Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.
        With ``return_sums`` also ``head_sums [K]``, differentiable: the rewards of every head (masked ones
        too) summed over the real rows, equal in every bit from call to call.

    Raises:
        TypeError: If an input is not floating point or a mask is not bool.
        ValueError: If shapes or devices do not fit, the temperature is not positive, or (CPU) every head is
            masked.

    Example:
        >>> import torch
        >>> from maxmin_kernels import reward_heads_min
        >>> weight = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
        >>> rewards, minimum, argmin, softmin = reward_heads_min(torch.eye(2), weight)
        >>> minimum.tolist(), argmin.tolist()
        ([1.0, 3.0], [0, 1])
        >>> *_, head_sums = reward_heads_min(torch.eye(2), weight, return_sums=True)
        >>> (head_sums / 2).min().item()
        2.5
    """
    check_call(backend, hidden=hidden, weight=weight, bias=bias, shift=shift, scale=scale)
    _check_temperature(temperature)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [N, H] and weight [K, H] with the same H and K >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    for name, vector in (("bias", bias), ("shift", shift), ("scale", scale)):
        if vector is not None and vector.shape != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}.")
    _check_mask("head_mask", head_mask, weight.shape[:1], hidden.device)
    _check_mask("row_mask", row_mask, hidden.shape[:1], hidden.device)
    if backend == "torch":
        _check_head_mask(head_mask)
        return reward_heads_min_naive(
            hidden,
            weight,
            bias,
            shift=shift,
            scale=scale,
            temperature=temperature,
            head_mask=head_mask,
            row_mask=row_mask,
            return_sums=return_sums,
        )
    outputs = call(
        _heads_op, hidden, weight, bias, shift, scale, temperature, head_mask, row_mask, return_sums
    )
    return outputs if return_sums else outputs[:-1]
