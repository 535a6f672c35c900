"""Which implementation runs: the Triton kernel, or the PyTorch reference.

CPU tensors take the PyTorch path. With ``TRITON_INTERPRET=1`` in the environment *before* the
first import of Triton, CPU tensors run the Triton kernels in Triton's interpreter instead, so that
the very same operators can be tested without a GPU. CUDA tensors always run the compiled kernels.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ._autograd import refuse_transforms

Backend = Literal["auto", "torch"]

HAS_TRITON: bool = importlib.util.find_spec("triton") is not None
INTERPRET: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether a CPU call runs the Triton kernel: interpreter asked for, and no float64 among the inputs."""
    return INTERPRET and not any(t is not None and t.dtype == torch.float64 for t in tensors)


def keeps(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, on the CPU in PyTorch, for which something can be kept."""
    there = [x for x in tensors if x is not None]
    plain = there[0].device.type == "cpu" and not use_triton_on_cpu(*there)
    return plain and torch.is_grad_enabled() and any(x.requires_grad for x in there)


def require_triton() -> None:
    """Raise one clear error if Triton is missing.

    Raises:
        RuntimeError: If Triton cannot be imported.
    """
    if not HAS_TRITON:
        raise RuntimeError(
            "maxmin_kernels needs Triton for CUDA tensors and it is not installed: `pip install triton`, "
            'or pass backend="torch" for the plain PyTorch implementation.'
        )


def kernel_operator(
    name: str, launcher: str, *, floats: Sequence[int], check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Make the operator ``maxmin::name`` of the PyTorch function that this decorates.

    Triton's launcher takes its place on CUDA, and on the CPU in the interpreter, unless an input is float64.

    Args:
        name: The operator's.
        launcher: ``room.function``: a function of that room's ``triton_kernels``, with the same arguments.
        floats: Positions of the inputs that decide on the precision.
        check: Called with the arguments before anything else, on the CPU alone, where values can be read.
    """

    def register(function: Callable[..., Any]) -> Any:
        def cuda(*args: Any) -> Any:
            if accumulate_dtype(*(args[i] for i in floats)) == torch.float64:
                return function(*args)
            require_triton()
            room, launch = launcher.split(".")
            return getattr(importlib.import_module(f"{__package__}.{room}.triton_kernels"), launch)(*args)

        @functools.wraps(function)
        def cpu(*args: Any) -> Any:
            if check is not None:
                check(*args)
            return cuda(*args) if use_triton_on_cpu(*(args[i] for i in floats)) else function(*args)

        operator: Any = torch.library.custom_op(f"maxmin::{name}", cpu, mutates_args=(), device_types="cpu")
        operator.register_kernel("cuda")(cuda)
        operator.cuda, operator.cpu = cuda, cpu
        return operator

    return register


def call(operator: Any, *args: Any) -> Any:
    """Call an operator; its function itself where nobody but the caller wants to know.

    That is on the CPU without gradients, transforms, modes or compilation, where the dispatcher's tenth of a
    millisecond would be all that the operator adds.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    watched = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or any(type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" for x in tensors)
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )
    return (operator if watched else operator.cpu)(*args)


def check_call(backend: str, **tensors: Tensor | None) -> None:
    """Raise unless the backend exists and can take these tensors, floating point and on one device.

    Raises:
        NotImplementedError: If an operator would be differentiated in a way that it does not have.
        TypeError: If a tensor is not floating point.
        ValueError: If the backend is unknown or two tensors are on different devices.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f'backend must be "auto" or "torch", got {backend!r}.')
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; convert it with .float().")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}; move it there.")
    if backend == "auto":
        refuse_transforms(*tensors.values())


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of sums and outputs: float64 if any input is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's CUDA device current, because Triton launches on the current device."""
    guard: Any = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with guard:
        yield


def without_autocast(tensor: Tensor) -> Any:
    """Return a context in which products keep the dtype that the operator chose.

    Autocast also reaches the code inside an operator, where it would turn float32 products into bfloat16.
    """
    device = tensor.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def aligned_rows(tensor: Tensor) -> Tensor:
    """Return the matrix with unit column stride and a 16-byte aligned base, copying only if it must."""
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors contiguous, booleans as bytes, as kernels take them."""
    return [
        x if x is None else x.contiguous().view(torch.uint8 if x.dtype == torch.bool else x.dtype)
        for x in tensors
    ]
