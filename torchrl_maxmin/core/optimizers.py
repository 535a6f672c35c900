"""Optimizers by the names of transformers, with float32 states for weights of half precision."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError

__all__ = ["MasterWeights", "make_optimizer"]


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
