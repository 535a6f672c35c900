"""Batching rules shared by the operators."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def _unbind(arg: Any, dim: Any, size: int) -> list[Any]:
    """Return one argument per batch element; ``dim`` is None, an int, or a list of these."""
    if isinstance(arg, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
        columns = [_unbind(a, d, size) for a, d in zip(arg, dims, strict=True)]
        return [[column[i] for column in columns] for i in range(size)]
    return [arg] * size if dim is None else list(arg.unbind(dim))


def _meta_element(arg: Any, dim: Any) -> Any:
    """Return one argument of a batch element with its shape and dtype alone."""
    if isinstance(arg, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
        return [_meta_element(a, d) for a, d in zip(arg, dims, strict=True)]
    if not isinstance(arg, Tensor):
        return arg
    shape = list(arg.shape)
    if dim is not None:
        del shape[dim]
    return torch.empty(shape, dtype=arg.dtype, device="meta")


def _empty_batch(op: Callable[..., Any], in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Return the outputs of no batch element at all, their shapes and dtypes from the fake operator."""
    outputs = op(*map(_meta_element, args, in_dims))
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    # Zero, and what the outputs' empty gradients are with respect to.
    zero = torch.stack([x.flatten()[:0].sum() for x in tensors if x.is_floating_point()]).sum()
    empty = [torch.empty(0, *out.shape, dtype=out.dtype, device=tensors[0].device) for out in outputs]
    stacked = tuple(out + zero.to(out.dtype) if out.is_floating_point() else out for out in empty)
    return stacked, (0,) * len(stacked)


def loop_vmap(op: Callable[..., Any], info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """Batch by calling ``op`` once per batch element and stacking the outputs."""
    if info.batch_size == 0:
        return _empty_batch(op, in_dims, args)
    per_arg = [_unbind(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)]
    outputs = [op(*call) for call in zip(*per_arg, strict=True)]
    stacked = tuple(torch.stack(column) for column in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def fold_vmap(
    op: Callable[..., Any], row_args: Sequence[int], info: Any, in_dims: Sequence[Any], *args: Any
) -> Any:
    """Batch by folding the batch into the leading (row) dimension of the arguments ``row_args``.

    Falls back to one call per element if any other argument is batched.
    """
    # An empty batch too: one row count over zero elements is unknown.
    if info.batch_size == 0 or any(d is not None for i, d in enumerate(in_dims) if i not in row_args):
        return loop_vmap(op, info, in_dims, *args)
    folded = list(args)
    for i in row_args:
        arg, dim = args[i], in_dims[i]
        if isinstance(arg, Tensor):
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            folded[i] = arg.flatten(0, 1)
    outputs = op(*folded)
    unfolded = tuple(out.unflatten(0, (info.batch_size, out.shape[0] // info.batch_size)) for out in outputs)
    return unfolded, (0,) * len(unfolded)


def fold_rows_vmap(
    op: Callable[..., Any], row_args: Sequence[int], info: Any, in_dims: Sequence[Any], *args: Any
) -> Any:
    """Fold, unless the last argument asks for what is taken over the rows of each batch element."""
    if args[-1]:
        return loop_vmap(op, info, in_dims, *args)
    return fold_vmap(op, row_args, info, in_dims, *args)
