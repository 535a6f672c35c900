"""What a workload is, and what its implementations are."""

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..floors import Direction, Floor

Inputs = dict[str, Any]


class Implementation(NamedTuple):
    """One way to compute a workload.

    Attributes:
        name: ``ours`` or a baseline's.
        call: From the workload's inputs to its outputs.
        library: What must be importable, if anything.
        compile_mode: Mode of ``torch.compile``, which is applied when the implementation is used.
        graph: Whether a CUDA graph can record it: nothing in it waits for the device.
    """

    name: str
    call: Callable[[Inputs], tuple[Tensor, ...]]
    library: str = ""
    compile_mode: str = ""
    graph: bool = True


class Workload(abc.ABC):
    """One size of one operator.

    Attributes:
        op: The operator.
        directions: What is timed.
        loss_output: Through which of the outputs the timed backward pass goes.
        dtype: Of the inputs.
    """

    op: ClassVar[str]
    directions: ClassVar[tuple[Direction, ...]] = ("forward", "backward", "both")
    loss_output: ClassVar[int] = 0
    dtype: torch.dtype

    @property
    @abc.abstractmethod
    def size(self) -> str:
        """``NAME=NUMBER`` of each dimension, separated by blanks."""

    @abc.abstractmethod
    def make(self, device: str, seed: int = 0) -> Inputs:
        """Return random inputs; those that get a gradient require one."""

    @abc.abstractmethod
    def floor(self, direction: Direction) -> Floor:
        """Return what the direction must move and compute."""

    @abc.abstractmethod
    def implementations(self) -> list[Implementation]:
        """Return ours and the baselines."""

    @abc.abstractmethod
    def working_bytes(self) -> int:
        """Return about what the most wasteful baseline needs, inputs included."""

    def smaller(self) -> "Workload | None":
        """Return the workload at half its size, or None if it is timed at this size or not at all."""
        return None


def number(value: float) -> str:
    """Return 100000000 as 1e8, and small numbers as they are."""
    return f"{value:g}".replace("e+0", "e")


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def one_line(error: Exception) -> str:
    """Return what was raised in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def generator(device: str, seed: int) -> torch.Generator:
    """Return a seeded generator on the device."""
    return torch.Generator(device).manual_seed(seed)


def with_compiled(plain: Implementation, modes: Iterable[str], **more: Any) -> list[Implementation]:
    """Return ``torch.compile`` of an eager implementation, once a mode."""
    return [Implementation(f"torch.compile {mode}", plain.call, compile_mode=mode, **more) for mode in modes]


DEFAULT = ("default",)
AUTOTUNED = ("default", "max-autotune-no-cudagraphs")
