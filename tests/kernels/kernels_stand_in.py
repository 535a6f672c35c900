"""A device that is not there: tensors that say ``meta`` and hold their values on the CPU.

It finds what would stop the tests on a GPU and nowhere else, a tensor left on the CPU: an operation on
tensors of both devices raises here as it does on CUDA. Operators, autograd and vmap see an ordinary device.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What CUDA too does with tensors of both devices: copies, and indices from the host.
MIXED = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class StandIn(torch.Tensor):
    """A tensor on the stand-in device; ``values`` is the CPU tensor behind it."""

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, values.size(), **layout, dtype=values.dtype, device="meta"
        )

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return f"StandIn({self.values})"

    def tolist(self):
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation on the values behind its tensors; its results lie where CUDA's would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, StandIn) for x in tensors]
    left_behind = [x for x in tensors if not isinstance(x, StandIn) and x.ndim]
    if any(there) and left_behind and func not in MIXED:
        raise RuntimeError(f"{func}: a tensor of shape {tuple(left_behind[0].shape)} was left on the CPU")
    stays = there[0] if func in MIXED else any(there)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == "meta"
        kwargs = kwargs | {"device": torch.device("cpu")}
    if stays and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: random numbers of the CPU's generator on another device")
    args, kwargs = tree_map(lambda x: x.values if isinstance(x, StandIn) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if not stays:
        return result
    # What an operation in place returns is the tensor that it was given.
    owners = {id(x.values): x for x in tensors if isinstance(x, StandIn)}

    def wrap(x):
        return x if not isinstance(x, torch.Tensor) else owners[id(x)] if id(x) in owners else StandIn(x)

    return tree_map(wrap, result)


class Creation(TorchDispatchMode):
    """Make tensors on the stand-in where that device is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Build tensors from Python values, which happens below any dispatch, by way of the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor:
            device = kwargs.get("device") or torch.get_default_device()
            return literal(*args, **kwargs).to(device)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(literal(p) if isinstance(p, list) else p for p in places)
            args = (args[0], places if isinstance(args[1], tuple) else places[0], *args[2:])
        return func(*args, **kwargs)


def literal(*args, **kwargs):
    """Build a tensor from Python values on the CPU, whatever the default device."""
    with torch.device("cpu"):
        return torch.tensor(*args, **(kwargs | {"device": "cpu"}))


@contextlib.contextmanager
def stand_in():
    """Make the stand-in the default device, known to autocast as one where it is off."""
    known = torch.is_autocast_enabled

    def is_autocast_enabled(device=None):
        return False if device == "meta" else known(*([] if device is None else [device]))

    torch.set_default_device("meta")
    try:
        with mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled), Creation(), Literals():
            yield
    finally:
        torch.set_default_device(None)
