"""Optimizers by the names of transformers, with float32 states for half precision; their micro-batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import gather_objects, rank, world_size
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import PlainConsole
from torchrl_maxmin.core.system_errors import is_out_of_memory

__all__ = ["MasterWeights", "MicroBatch", "make_optimizer"]


def make_optimizer(
    groups: Sequence[dict[str, Any]], name: str = "adamw_torch", weight_decay: float = 0.0
) -> MasterWeights:
    """Make an optimizer.

    Args:
        groups: ``params`` and ``lr`` of each.
        name: as ``TrainingArguments(optim=...)`` has it.
        weight_decay: of those that have one.

    Raises:
        UserError: for one whose package is not installed, or that does not run here.
    """
    if name == "adamw_torch":
        return MasterWeights(groups, torch.optim.AdamW, eps=1e-8, weight_decay=weight_decay)
    from transformers import Trainer, TrainingArguments

    try:
        arguments = TrainingArguments(output_dir="unused", optim=name, report_to=[], use_cpu=True)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if "weight_decay" in inspect.signature(kind).parameters:
            options["weight_decay"] = weight_decay
        return MasterWeights(groups, kind, **options)
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--optim {name} cannot be had ({error}); adamw_torch always can") from error


class MasterWeights:
    """An optimizer that steps on float32 copies of the parameters that are in half precision.

    A step of a learning rate of 1e-5 is less than the rounding of a bfloat16 weight, and would be lost.
    float32 parameters have no copy, and are stepped on as they are.

    Args:
        groups: ``params`` and ``lr`` of each.
        kind: a class of optimizers.
        **options: its further arguments.

    Attributes:
        optimizer: the optimizer itself, on the copies.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], kind: type[torch.optim.Optimizer], **options: Any):
        self.copies: list[tuple[nn.Parameter, Tensor]] = []
        stepped = [{**group, "params": [self._master(p) for p in group["params"]]} for group in groups]
        self.optimizer = kind(stepped, **options)
        self.groups = [list(group["params"]) for group in groups]

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if parameter.dtype.itemsize > 2:
            return parameter
        master = parameter.detach().float()
        self.copies.append((parameter, master))
        return master

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, with the rates as they are."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Take a step on the gradients, which are as large as they were clipped to."""
        for parameter, master in self.copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        for parameter, master in self.copies:
            parameter.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; with copies also these."""
        state = self.optimizer.state_dict()
        return {**state, "masters": [master for _, master in self.copies]} if self.copies else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        masters = state.get("masters", [])
        self.optimizer.load_state_dict({name: part for name, part in state.items() if name != "masters"})
        for (_, master), loaded in zip(self.copies, masters, strict=True):
            master.copy_(loaded)


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

    def halve(self, error: BaseException, num_rows: int) -> bool:
        """Halve the size, once in a run, where an optimizer step met a want of memory; say so.

        Args:
            error: what the step met.
            num_rows: of the step, over all processes.

        Returns:
            Whether the step should be taken again; not for other errors, nor where halves are of no use.
        """
        size = min(self.size, -(-num_rows // world_size()))
        if not is_out_of_memory(error) or self.halved or self.sharded or size == 1:
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
