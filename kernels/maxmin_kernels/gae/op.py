"""``vector_gae`` as a PyTorch operator (namespace ``maxmin``)."""

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
)
from .._vmap import fold_vmap
from .naive import vector_gae_naive


@torch.library.custom_op("maxmin::vector_gae", mutates_args=(), device_types="cpu")
def _gae_op(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    gamma: float,
    lmbda: float,
) -> tuple[Tensor, Tensor]:
    if use_triton_on_cpu(reward, value, next_value):
        return _gae_cuda(reward, value, next_value, done, terminated, mask, gamma, lmbda)
    return vector_gae_naive(reward, value, next_value, done, terminated, gamma, lmbda, mask)


@_gae_op.register_kernel("cuda")
def _gae_cuda(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    gamma: float,
    lmbda: float,
) -> tuple[Tensor, Tensor]:
    if accumulate_dtype(reward, value, next_value) == torch.float64:
        return vector_gae_naive(reward, value, next_value, done, terminated, gamma, lmbda, mask)
    require_triton()
    from .triton_kernels import gae_forward

    return gae_forward(reward, value, next_value, done, terminated, mask, gamma, lmbda)


@_gae_op.register_fake
def _gae_fake(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    mask: Tensor | None,
    gamma: float,
    lmbda: float,
) -> tuple[Tensor, Tensor]:
    advantage = reward.new_empty(reward.shape, dtype=accumulate_dtype(reward, value, next_value))
    return advantage, torch.empty_like(advantage)


@_gae_op.register_vmap
def _gae_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    return fold_vmap(_gae_op, (0, 1, 2, 3, 4, 5), info, in_dims, args)


def vector_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    done: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
    lmbda: float,
    mask: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation of K rewards at once (Schulman et al., arXiv 1506.02438).

    With TorchRL's meaning of the end signals, for every column k:

    .. math::
        \delta_t &= r_t + \gamma (1 - \text{terminated}_t) V(s_{t+1}) - V(s_t) \\
        A_t &= \delta_t + \gamma \lambda (1 - \text{done}_t) A_{t+1}

    The last step carries nothing in; ``value_target = A + V``. Columns share the end signals, so the result
    equals K scalar estimates. What stands behind an end (a NaN, say) does not reach the steps before it.

    Args:
        reward: ``[..., T, K]``, typically ``[B, T, K]``; float32, bfloat16 or float16 (float64 takes the
            PyTorch path).
        value: ``[..., T, K]``, V(s_t).
        next_value: ``[..., T, K]``, V(s_{t+1}) of the step's own successor, before any reset.
        done: ``[..., T, 1]`` bool (or 0/1): the trajectory ends here, terminated or truncated.
        terminated: ``[..., T, 1]`` bool (or 0/1): the end is real, so nothing is bootstrapped.
        gamma: Discount.
        lmbda: Trace decay.
        mask: ``[..., T]`` bool or None, True at valid steps. A masked step has advantage 0, value target
            ``value``, and carries nothing to the step before it, whatever is stored there.
        backend: ``"auto"`` (fused on CUDA) or ``"torch"`` (plain PyTorch).

    Returns:
        ``(advantage [..., T, K], value_target [..., T, K])`` in float32. Both are targets: no gradient.

    Raises:
        TypeError: If reward or values are not floating point.
        ValueError: If shapes or devices do not fit.

    Example:
        >>> import torch
        >>> from maxmin_kernels import vector_gae
        >>> zero, end = torch.zeros(1, 2, 2), torch.tensor([[[False], [True]]])
        >>> advantage, _ = vector_gae(torch.ones(1, 2, 2), zero, zero, end, end, gamma=0.5, lmbda=1.0)
        >>> advantage[0, :, 0].tolist()
        [1.5, 1.0]
    """
    check_backend(backend)
    check_inputs(reward=reward, value=value, next_value=next_value)
    shape = reward.shape
    if reward.ndim < 2 or value.shape != shape or next_value.shape != shape:
        raise ValueError(
            "reward, value and next_value must all be [..., T, K], "
            f"got {tuple(shape)}, {tuple(value.shape)} and {tuple(next_value.shape)}."
        )
    for name, signal, expected in (
        ("done", done, (*shape[:-1], 1)),
        ("terminated", terminated, (*shape[:-1], 1)),
        ("mask", mask, shape[:-1]),
    ):
        if signal is not None and tuple(signal.shape) != tuple(expected):
            raise ValueError(f"{name} must be {tuple(expected)}, got {tuple(signal.shape)}.")
        if signal is not None and signal.device != reward.device:
            raise ValueError(f"{name} is on {signal.device}, reward on {reward.device}; move it there.")
    batch = shape[:-2]
    rows = batch.numel()
    with torch.no_grad():
        reward, value, next_value = (x.reshape(rows, *shape[-2:]) for x in (reward, value, next_value))
        done, terminated = (x.reshape(rows, shape[-2], 1).bool() for x in (done, terminated))
        mask = None if mask is None else mask.reshape(rows, shape[-2]).bool()
        if backend == "torch":
            outputs = vector_gae_naive(reward, value, next_value, done, terminated, gamma, lmbda, mask)
        else:
            outputs = _gae_op(reward, value, next_value, done, terminated, mask, float(gamma), float(lmbda))
    return outputs[0].reshape(shape), outputs[1].reshape(shape)
