"""How the C library hands out memory while a model is trained on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

__all__ = ["map_large_blocks", "maps_large_blocks"]

#: blocks of at least so many bytes get a mapping of their own, and outside of training what glibc grows to
MAPPED, USUAL = 2**19, 2**25
#: parameters of a model whose activations are worth it
LEAST_PARAMETERS = 2**25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def maps_large_blocks(
    parameters: int, dtype: torch.dtype, environment: Mapping[str, str] = os.environ
) -> bool:
    """Whether a model of so many parameters in such a dtype is trained with :func:`map_large_blocks`.

    Not in float32: mapped memory comes page by page, which makes an update a third slower, and who asks for
    half precision asks for memory. Not where the C library is another than glibc, and not where the user has
    set its allocator: a variable ``MALLOC_*``, ``glibc.malloc`` in ``GLIBC_TUNABLES``, another allocator in
    ``LD_PRELOAD``.

    Example:
        >>> maps_large_blocks(10**9, torch.float32)
        False
    """
    own = any(name.startswith("MALLOC_") for name in environment)
    tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    replaced = "malloc" in environment.get("LD_PRELOAD", "")
    wanted = parameters >= LEAST_PARAMETERS and dtype.itemsize < 4
    return wanted and not (own or tuned or replaced) and _glibc() is not None


def map_large_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which large blocks of memory are mapped one by one, the system's again once freed.

    glibc raises the size from which it does so with every such block that is freed, up to 32 MB. What a
    training pass keeps and what it frees then lie in one heap, whose holes made a fifth of the memory of an
    update (SmolLM2-135M, bfloat16, adapters). Values stay what they are, to the bit. The context may be
    entered again and again; it does nothing on a GPU, for small or float32 models, and where
    :func:`maps_large_blocks` says so.

    Args:
        model: what is trained, its frozen parameters included.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    size = sum(parameter.numel() for parameter in model.parameters())
    if devices != {"cpu"}:
        return nullcontext()
    narrowest = min((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
    return _Mapped(_glibc()) if maps_large_blocks(size, narrowest) else nullcontext()


class _Mapped(AbstractContextManager[None]):
    """Sets glibc on entry, and on exit to where it had grown: it adjusts nothing by itself any more."""

    def __init__(self, libc: Any):
        self.libc = libc

    def __enter__(self) -> None:
        self.libc.malloc_trim(0)  # what was freed before
        self.libc.mallopt(_M_MMAP_THRESHOLD, MAPPED)

    def __exit__(self, *_: object) -> None:
        self.libc.mallopt(_M_MMAP_THRESHOLD, USUAL)
        self.libc.mallopt(_M_TRIM_THRESHOLD, 2 * USUAL)


def _glibc() -> Any:
    """The C library of this process where it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
    except TypeError:  # Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
