"""Weights from a trainer to the workers of an inference server, over a process group that is theirs alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

import torch
from torch import Tensor, distributed

__all__ = ["WeightLink", "described", "received"]

#: for one tensor, or for all workers to come
_PATIENCE = timedelta(minutes=5)
Described = list[tuple[str, str, list[int]]]


def described(weights: Mapping[str, Tensor]) -> Described:
    """Name, dtype and shape of each, in order.

    Example:
        >>> described({"bias": torch.zeros(2, dtype=torch.bfloat16)})
        [('bias', 'bfloat16', [2])]
    """
    return [
        (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
        for name, weight in weights.items()
    ]


class WeightLink(AbstractContextManager["WeightLink"]):
    """The trainer's end for one push: every push makes one, so that a server may come and go between them.

    Args:
        host: this machine's address, as the workers reach it.
        size: processes, of which the trainer is the first.

    Attributes:
        address: host and port for :func:`received`.
    """

    def __init__(self, host: str, size: int):
        self.size = size
        self.store = distributed.TCPStore(
            host, 0, None, is_master=True, timeout=_PATIENCE, wait_for_workers=False
        )
        self.address = f"{host}:{self.store.port}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.store

    def all_are_there(self) -> bool:
        """Whether every worker waits."""
        return self.store.check([f"worker {rank}" for rank in range(1, self.size)])

    def send(self, weights: Iterable[Tensor]) -> None:
        """Send them in order; returns once all are received."""
        group = _group(self.store, 0, self.size)
        for weight in weights:
            _broadcast(group, weight.detach().cpu().contiguous())
        group.barrier().wait()


def received(address: str, rank: int, size: int, weights: Described) -> Iterator[tuple[str, Tensor]]:
    """Yield what the trainer sends, on the CPU.

    Args:
        address: the trainer's.
        rank: this worker's, from 1.
        size: processes, the trainer among them.
        weights: what :func:`described` says of them.
    """
    host, _, port = address.rpartition(":")
    store = distributed.TCPStore(host, int(port), None, is_master=False, timeout=_PATIENCE)
    store.set(f"worker {rank}", "")
    group = _group(store, rank, size)
    for name, dtype, shape in weights:
        weight = torch.empty(shape, dtype=getattr(torch, dtype))
        _broadcast(group, weight)
        yield name, weight
    group.barrier().wait()


def _group(store: distributed.Store, rank: int, size: int) -> distributed.ProcessGroupGloo:
    return distributed.ProcessGroupGloo(distributed.PrefixStore("weights", store), rank, size, _PATIENCE)


def _broadcast(group: distributed.ProcessGroupGloo, tensor: Tensor) -> None:
    group.broadcast(tensor.reshape(-1).view(torch.uint8), 0).wait()  # bytes, whatever the dtype
