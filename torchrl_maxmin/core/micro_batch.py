"""How many rows are in memory with their gradients at once; halved once where memory does not suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torchrl_maxmin.core.distributed import gather_objects, rank, world_size
from torchrl_maxmin.core.progress import PlainConsole
from torchrl_maxmin.core.system_errors import is_out_of_memory

__all__ = ["MicroBatch"]

Result = TypeVar("Result")


class MicroBatch:
    """The size of a micro-batch, and what becomes of it in a run.

    Processes that hold whole copies halve it each by itself, since only sums are exchanged, and those after
    all parts. Where a model is sharded it stays: shards are gathered as often in all processes.

    Args:
        size: most rows at once.
        sharded: whether the model is.

    Attributes:
        size: most rows at once, now.
        halved: whether memory did not suffice for more.

    Example:
        >>> micro_batch = MicroBatch(8)
        >>> micro_batch.load_state_dict({"micro_batch_size": 3})
        >>> micro_batch.size, micro_batch.halved
        (3, True)
    """

    def __init__(self, size: int, *, sharded: bool = False):
        self.size, self.sharded, self.halved = size, sharded, False

    def accumulate(self, function: Callable[[], Result], num_rows: int) -> Result:
        """Call what accumulates a gradient by parts of :attr:`size` rows; once more where memory fails it.

        Args:
            function: begins with the gradient at zero, and ends with that of all rows.
            num_rows: of the optimizer step, over all processes.
        """
        try:
            return function()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._halve(num_rows):
                raise
        return function()  # not in the clause above: the error holds memory, too

    def _halve(self, num_rows: int) -> bool:
        """Halve the size for a step of so many rows; returns whether that can be done."""
        size = min(self.size, -(-num_rows // world_size()))
        if self.halved or self.sharded or size == 1:
            return False
        self.size, self.halved = -(-size // 2), True
        who = f"rank {rank()}: " if world_size() > 1 else ""
        PlainConsole(stderr=True).print(
            f"! {who}memory does not suffice for {size} rows at once; the update goes on with "
            f"{self.size}, as by --per_device_train_batch_size {self.size}",
            soft_wrap=True,
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """The size that memory sufficed for in all processes, where it was halved; all of them call it."""
        halved = min(gather_objects(self.size if self.halved else math.inf))
        return {} if halved == math.inf else {"micro_batch_size": halved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a size that was halved before from a state that may hold other things, too."""
        if "micro_batch_size" in state:
            self.size, self.halved = min(self.size, int(state["micro_batch_size"])), True
