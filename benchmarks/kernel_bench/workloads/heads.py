"""Reward heads and their minimum."""

import dataclasses
from typing import ClassVar

import torch
from maxmin_kernels import reward_heads_min
from torch import Tensor

from .. import baselines, floors
from ..floors import Direction, Floor
from .base import DEFAULT, Implementation, Inputs, Workload, generator, number, with_compiled


@dataclasses.dataclass(frozen=True)
class Heads(Workload):
    """Rewards of ``num_heads`` linear heads on ``rows`` hidden states, and their minimum."""

    rows: int
    width: int
    num_heads: int
    dtype: torch.dtype = torch.float32
    compile_modes: tuple[str, ...] = DEFAULT

    op: ClassVar[str] = "heads"
    loss_output: ClassVar[int] = 1

    @property
    def size(self) -> str:
        return f"N={number(self.rows)} H={self.width} K={self.num_heads}"

    def make(self, device: str, seed: int = 0) -> Inputs:
        source = generator(device, seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device, dtype=self.dtype).requires_grad_()

        hidden, weight, bias = (
            normal(self.rows, self.width),
            normal(self.num_heads, self.width),
            normal(self.num_heads),
        )
        # A model of its own for every head: parameters of their own.
        apart = [[x.detach().clone().requires_grad_() for x in tensor.split(1)] for tensor in (weight, bias)]
        return {"hidden": hidden, "weight": weight, "bias": bias, "weights": apart[0], "biases": apart[1]}

    def floor(self, direction: Direction) -> Floor:
        return floors.heads(direction, self.rows, self.width, self.num_heads, self.dtype.itemsize)

    def implementations(self) -> list[Implementation]:
        def ours(i: Inputs) -> tuple[Tensor, ...]:
            return reward_heads_min(i["hidden"], i["weight"], i["bias"])

        def stacked(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.heads_eager(i["hidden"], i["weight"], i["bias"])

        def separate(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.heads_separate(i["hidden"], i["weights"], i["biases"])

        plain = Implementation("eager", stacked)
        apart = Implementation("eager, K linears", separate)
        return [Implementation("ours", ours), plain, apart, *with_compiled(plain, self.compile_modes)]

    def working_bytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize * 4

    def smaller(self) -> "Heads":
        return dataclasses.replace(self, rows=self.rows // 2)
