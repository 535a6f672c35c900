"""The E-step."""

import dataclasses
from typing import ClassVar

import torch
from maxmin_kernels import em_responsibilities, plan_users
from torch import Tensor

from .. import baselines, floors
from ..floors import Direction, Floor
from .base import DEFAULT, Implementation, Inputs, Workload, generator, number, with_compiled


@dataclasses.dataclass(frozen=True)
class EStep(Workload):
    """E-step of a mixture: ``pairs`` by users of ``mean`` pairs, one of whom may have the share ``skew``."""

    pairs: int
    groups: int
    dtype: torch.dtype = torch.float32
    skew: float = 0.0
    mean: int = 100
    compile_modes: tuple[str, ...] = DEFAULT

    op: ClassVar[str] = "em"
    loss_output: ClassVar[int] = 1

    @property
    def size(self) -> str:
        skew = f" skew={self.skew:g}" if self.skew else ""
        return f"P={number(self.pairs)} K={self.groups}{skew}"

    @property
    def users(self) -> int:
        return bool(self.skew) + -(-(self.pairs - round(self.skew * self.pairs)) // self.mean)

    def offsets(self) -> Tensor:
        """Return the first pair of each user, and the number of pairs; the large user comes first."""
        first = [0] if self.skew else []
        rest = torch.arange(round(self.skew * self.pairs), self.pairs, self.mean)
        return torch.cat([torch.tensor(first, dtype=torch.int64), rest, torch.tensor([self.pairs])])

    def make(self, device: str, seed: int = 0) -> Inputs:
        source = generator(device, seed)
        shape = (self.pairs, self.groups)
        scores = [
            torch.randn(shape, generator=source, device=device, dtype=self.dtype).requires_grad_()
            for _ in range(2)
        ]
        offsets = self.offsets().to(device)
        prior = torch.randn(self.groups, generator=source, device=device).log_softmax(-1)
        users = torch.repeat_interleave(offsets.diff(), output_size=self.pairs)
        return {
            "chosen": scores[0],
            "rejected": scores[1],
            "user_offsets": offsets,
            "log_prior": prior,
            "plan": plan_users(offsets),
            "users": users,
        }

    def floor(self, direction: Direction) -> Floor:
        return floors.em(direction, self.pairs, self.groups, self.users, self.dtype.itemsize)

    def implementations(self) -> list[Implementation]:
        def ours(i: Inputs) -> tuple[Tensor, ...]:
            return em_responsibilities(
                i["chosen"], i["rejected"], i["user_offsets"], i["log_prior"], plan=i["plan"]
            )

        def eager(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.em_eager(
                i["chosen"], i["rejected"], i["users"], i["user_offsets"], i["log_prior"]
            )

        plain = Implementation("eager", eager)
        return [Implementation("ours", ours), plain, *with_compiled(plain, self.compile_modes)]

    def working_bytes(self) -> int:
        elements = self.pairs * self.groups
        return elements * (4 * self.dtype.itemsize + 5 * 4) + 8 * self.pairs

    def smaller(self) -> "EStep":
        return dataclasses.replace(self, pairs=self.pairs // 2)
