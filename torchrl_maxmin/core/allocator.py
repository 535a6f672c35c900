"""How the C library hands out memory while a model is trained on a CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

__all__ = ["MAPPED", "USUAL", "map_large_blocks", "maps_large_blocks"]

#: blocks of at least so many bytes get a mapping of their own, and outside of forward passes what glibc
#: grows to by itself
MAPPED, USUAL = 2**19, 2**25
#: parameters of a model whose activations are worth it
LEAST_PARAMETERS = 2**25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def maps_large_blocks(parameters: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a model of so many parameters is trained with :func:`map_large_blocks`.

    Not where the C library is another than glibc, and not where the user has set its allocator: a variable
    ``MALLOC_*``, ``glibc.malloc`` in ``GLIBC_TUNABLES``, another allocator in ``LD_PRELOAD``.

    Example:
        >>> maps_large_blocks(10**6)
        False
    """
    own = any(name.startswith("MALLOC_") for name in environment)
    tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    replaced = "malloc" in environment.get("LD_PRELOAD", "")
    return parameters >= LEAST_PARAMETERS and not (own or tuned or replaced) and _glibc() is not None


def map_large_blocks(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context for a forward pass, whose large blocks are mapped one by one: the system's once freed.

    glibc raises the size from which it does so with every such block that is freed, up to 32 MB. Below that
    an aligned block that was freed serves smaller requests alone, as a request looks for room to align in:
    what a forward pass frees between what it keeps is lost, which made a third of a run's peak
    (SmolLM2-135M, float32, adapters). The backward pass frees neighbours, which are joined. Mapped memory
    comes page by page, so that is left as it is, at half the time. Values stay what they are, to the bit.
    The context may be entered again and again; it does nothing on a GPU, for small models, and where
    :func:`maps_large_blocks` says so.

    Args:
        model: what is trained, its frozen parameters included.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    size = sum(parameter.numel() for parameter in model.parameters())
    return _Mapped(_glibc()) if devices == {"cpu"} and maps_large_blocks(size) else nullcontext()


class _Mapped(AbstractContextManager[None]):
    """Sets glibc on entry, and on exit to where it had grown: it adjusts nothing by itself any more."""

    def __init__(self, libc: Any):
        self.libc = libc

    def __enter__(self) -> None:
        self.libc.malloc_trim(0)  # what was freed before, and would be taken in place of a mapping
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
