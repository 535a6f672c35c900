"""``reward_heads_min`` and ``min_over_heads`` as PyTorch operators (namespace ``maxmin``)."""

from typing import Any

import torch
from torch import Tensor

from .._backend import (
    Backend,
    accumulate_dtype,
    check_backend,
    check_inputs,
    require_triton,
    use_triton_on_cpu,
    without_autocast,
)
from .._vmap import fold_vmap
from .naive import min_over_heads_backward_naive, min_over_heads_naive, reward_heads_min_naive

# ---------------------------------------------------------------- min over given rewards [N, K]


@torch.library.custom_op("maxmin::min_over_heads", mutates_args=(), device_types="cpu")
def _min_op(rewards: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton_on_cpu(rewards):
        return _min_cuda(rewards, temperature)
    return min_over_heads_naive(rewards, temperature)


@_min_op.register_kernel("cuda")
def _min_cuda(rewards: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    if rewards.dtype == torch.float64:
        return min_over_heads_naive(rewards, temperature)
    require_triton()
    from .triton_kernels import min_forward

    return min_forward(rewards, temperature)


@_min_op.register_fake
def _min_fake(rewards: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = rewards.shape[0]
    value = rewards.new_empty(rows, dtype=accumulate_dtype(rewards))
    return value, rewards.new_empty(rows, dtype=torch.int64), torch.empty_like(value)


@torch.library.custom_op("maxmin::min_over_heads_backward", mutates_args=(), device_types="cpu")
def _min_backward_op(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    temperature: float,
) -> Tensor:
    args = (rewards, argmin, grad_rewards, grad_minimum, grad_softmin, temperature)
    if use_triton_on_cpu(rewards):
        return _min_backward_cuda(*args)
    return min_over_heads_backward_naive(*_accumulated(rewards), *args[1:])


def _accumulated(rewards: Tensor) -> tuple[Tensor]:
    return (rewards.to(accumulate_dtype(rewards)),)


@_min_backward_op.register_kernel("cuda")
def _min_backward_cuda(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    temperature: float,
) -> Tensor:
    args = (argmin, grad_rewards, grad_minimum, grad_softmin, temperature)
    if rewards.dtype == torch.float64:
        return min_over_heads_backward_naive(rewards, *args)
    require_triton()
    from .triton_kernels import min_backward

    return min_backward(rewards, *args)


@_min_backward_op.register_fake
def _min_backward_fake(
    rewards: Tensor,
    argmin: Tensor,
    grad_rewards: Tensor | None,
    grad_minimum: Tensor | None,
    grad_softmin: Tensor | None,
    temperature: float,
) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulate_dtype(rewards))


def _min_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, ctx.temperature = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rewards, output[1])


def _min_autograd(ctx: Any, grad_minimum: Tensor | None, _: Any, grad_softmin: Tensor | None) -> Any:
    rewards, argmin = ctx.saved_tensors
    if grad_minimum is None and grad_softmin is None:
        return None, None
    grad = _min_backward_op(rewards, argmin, None, grad_minimum, grad_softmin, ctx.temperature)
    return grad.to(rewards.dtype), None


torch.library.register_autograd("maxmin::min_over_heads", _min_autograd, setup_context=_min_setup)


@_min_op.register_vmap
def _min_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return fold_vmap(_min_op, (0,), info, in_dims, args)


@_min_backward_op.register_vmap
def _min_backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (grad,), (dim,) = fold_vmap(lambda *a: (_min_backward_op(*a),), (0, 1, 2, 3, 4), info, in_dims, args)
    return grad, dim


# ---------------------------------------------------------------- rewards of K linear heads, and their min


@torch.library.custom_op("maxmin::reward_heads_min", mutates_args=(), device_types="cpu")
def _heads_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_triton_on_cpu(hidden, weight, bias, shift, scale):
        return _heads_cuda(hidden, weight, bias, shift, scale, temperature)
    return reward_heads_min_naive(hidden, weight, bias, shift=shift, scale=scale, temperature=temperature)


@_heads_op.register_kernel("cuda")
def _heads_cuda(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if accumulate_dtype(hidden, weight, bias, shift, scale) == torch.float64:
        return reward_heads_min_naive(hidden, weight, bias, shift=shift, scale=scale, temperature=temperature)
    require_triton()
    from .triton_kernels import heads_forward

    return heads_forward(hidden, weight, bias, shift, scale, temperature)


@_heads_op.register_fake
def _heads_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads = hidden.shape[0], weight.shape[0]
    rewards = hidden.new_empty(rows, heads, dtype=accumulate_dtype(hidden, weight, bias, shift, scale))
    minimum = rewards.new_empty(rows)
    return rewards, minimum, hidden.new_empty(rows, dtype=torch.int64), torch.empty_like(minimum)


def _heads_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, shift, scale, ctx.temperature = inputs
    rewards, _, argmin, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmin)
    ctx.save_for_backward(hidden, weight, scale, rewards, argmin)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (bias, shift))


def _heads_autograd(
    ctx: Any, grad_rewards: Tensor | None, grad_minimum: Tensor | None, _: Any, grad_softmin: Tensor | None
) -> Any:
    if grad_rewards is None and grad_minimum is None and grad_softmin is None:
        return None, None, None, None, None, None
    hidden, weight, scale, rewards, argmin = ctx.saved_tensors
    bias_dtype, shift_dtype = ctx.dtypes
    need = ctx.needs_input_grad
    grad = _min_backward_op(rewards, argmin, grad_rewards, grad_minimum, grad_softmin, ctx.temperature)
    d_scale = None
    if scale is not None:
        grad = grad / scale.to(grad.dtype)
        if need[4]:
            d_scale = -(grad * rewards).sum(0).to(scale.dtype)
    # The library's matrix product, in the inputs' dtype: low precision on the GPU, accumulation in float32.
    low = weight.dtype if hidden.is_cuda and weight.dtype == hidden.dtype else grad.dtype
    rounded = grad.to(low)
    with without_autocast(hidden):
        d_hidden = (rounded @ weight.to(low)).to(hidden.dtype) if need[0] else None
        d_weight = (rounded.mT @ hidden.to(low)).to(weight.dtype) if need[1] else None
    d_bias = grad.sum(0).to(bias_dtype) if bias_dtype is not None and need[2] else None
    d_shift = -grad.sum(0).to(shift_dtype) if shift_dtype is not None and need[3] else None
    return d_hidden, d_weight, d_bias, d_shift, d_scale, None


torch.library.register_autograd("maxmin::reward_heads_min", _heads_autograd, setup_context=_heads_setup)


@_heads_op.register_vmap
def _heads_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return fold_vmap(_heads_op, (0,), info, in_dims, args)


# ---------------------------------------------------------------- public functions


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; use `minimum` for the limit 0.")


def min_over_heads(
    rewards: Tensor, *, temperature: float = 1.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Minimum, argmin and soft minimum over the last dimension of given rewards.

    :math:`\text{softmin} = -T \log \frac1K \sum_k e^{-r_k/T}`, so that equal heads give their value.
    Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.

    Args:
        rewards: ``[..., K]`` with K >= 1; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        temperature: T > 0.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable twice).

    Returns:
        ``(minimum [...], argmin [...] int64, softmin [...])`` in float32, differentiable except
        for ``argmin``.

    Raises:
        TypeError: If the rewards are not floating point.
        ValueError: If there is no head or the temperature is not positive.

    Example:
        >>> import torch
        >>> from maxmin_kernels import min_over_heads
        >>> minimum, argmin, softmin = min_over_heads(torch.tensor([[2.0, 1.0, 1.0]]))
        >>> minimum.item(), argmin.item()
        (1.0, 1)
    """
    check_backend(backend)
    check_inputs(rewards=rewards)
    _check_temperature(temperature)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards must be [..., K] with K >= 1, got shape {tuple(rewards.shape)}.")
    if backend == "torch":
        return min_over_heads_naive(rewards, temperature)
    batch = rewards.shape[:-1]
    outputs = _min_op(rewards.reshape(batch.numel(), rewards.shape[-1]), temperature)
    minimum, argmin, softmin = (out.reshape(batch) for out in outputs)
    return minimum, argmin, softmin


def reward_heads_min(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Rewards of K linear heads on one hidden state, with their minimum and soft minimum.

    :math:`r = (h W^\top + b - \text{shift}) / \text{scale}` in float32: ``shift`` and ``scale`` put the heads
    on one convention before the minimum is taken (Bradley-Terry fixes a reward only up to an offset). The
    minimum over heads is the reward of MaxMin-RLHF (Chakraborty et al., ICML 2024, arXiv 2402.08925) per
    sample; the rewards give the groups' means.

    Args:
        hidden: ``[N, H]``; float32, bfloat16 or float16 (float64 takes the PyTorch path).
        weight: ``[K, H]``. If its dtype differs from that of ``hidden``, both are widened.
        bias: ``[K]`` or None.
        shift: ``[K]`` or None, subtracted.
        scale: ``[K]`` or None, divided by.
        temperature: T > 0 of ``softmin = -T log mean_k exp(-r_k / T)``.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch, differentiable twice).

    Returns:
        ``(rewards [N, K], minimum [N], argmin [N] int64, softmin [N])`` in float32; all but ``argmin`` are
        differentiable. Ties go to the lowest index; a NaN head is the minimum, as in :func:`torch.min`.

    Raises:
        TypeError: If an input is not floating point.
        ValueError: If shapes or devices do not fit, or the temperature is not positive.

    Example:
        >>> import torch
        >>> from maxmin_kernels import reward_heads_min
        >>> weight = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
        >>> rewards, minimum, argmin, softmin = reward_heads_min(torch.eye(2), weight)
        >>> minimum.tolist(), argmin.tolist()
        ([1.0, 3.0], [0, 1])
    """
    check_backend(backend)
    check_inputs(hidden=hidden, weight=weight, bias=bias, shift=shift, scale=scale)
    _check_temperature(temperature)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            "hidden must be [N, H] and weight [K, H] with the same H and K >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    for name, vector in (("bias", bias), ("shift", shift), ("scale", scale)):
        if vector is not None and vector.shape != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}.")
    if backend == "torch":
        return reward_heads_min_naive(hidden, weight, bias, shift=shift, scale=scale, temperature=temperature)
    return _heads_op(hidden, weight, bias, shift, scale, temperature)
