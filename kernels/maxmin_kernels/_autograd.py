"""Derivatives that the fused operators do not have: an error in their place, never a silent zero."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils import _pytree as pytree

_REMEDY = 'pass backend="torch", the plain PyTorch implementation, which is differentiable every way.'


def _levels(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor, and what the transforms of ``torch.func`` wrapped in it, but for batches."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not functorch.is_batchedtensor(tensor):
            yield tensor
        tensor = functorch.get_unwrapped(tensor)
    yield tensor


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def _has_functional_gradient(tensor: Tensor) -> bool:
    wrapped = torch._C._functorch.is_gradtrackingtensor(tensor)
    return wrapped and tensor.requires_grad and torch.is_grad_enabled()


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise where an operator would drop a forward-mode tangent, or PyTorch cannot call its backward rule.

    Raises:
        NotImplementedError: If a tensor carries a tangent, or ``torch.func`` differentiates by it.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    compiling = torch.compiler.is_compiling()  # the tracer knows tangents, and no wrapped tensors
    functional = not compiling and torch._C._are_functorch_transforms_active()
    levels = [level for tensor in given for level in _levels(tensor)] if functional else given
    if any(_has_tangent(level) for level in levels):
        raise NotImplementedError(
            f"forward-mode differentiation (jvp) does not go through the fused operators: {_REMEDY}"
        )
    if functional and any(_has_functional_gradient(level) for level in levels):
        raise NotImplementedError(
            f"torch.func.grad and its kin do not go through the fused operators: {_REMEDY}"
        )


class _NoSecondDerivative(torch.autograd.Function):
    """Return the first ``count`` tensors; to differentiate them with respect to any input raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"the fused operators are differentiable once: {_REMEDY}")


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make an operator's backward rule out of ``backward(ctx, saved_tensors, *grads)``.

    Without any gradient there is nothing to do. With ``create_graph`` the results depend on what was saved
    and on the gradients, so that a second derivative raises wherever it would not be zero.
    """

    @functools.wraps(backward)
    def rule(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return tuple([None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad)
        refuse_transforms(*grads)
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        causes = [x for x in (*saved, *grads) if x is not None and x.requires_grad]
        if not torch.is_grad_enabled() or not causes:
            return outputs
        leaves, structure = pytree.tree_flatten(outputs)
        given = [i for i, leaf in enumerate(leaves) if leaf is not None]
        guarded = _NoSecondDerivative.apply(len(given), *(leaves[i] for i in given), *causes)
        for i, leaf in zip(given, guarded, strict=True):
            leaves[i] = leaf
        return pytree.tree_unflatten(leaves, structure)

    return rule
