"""Log-probabilities of tokens."""

import dataclasses
from typing import ClassVar

import torch
from maxmin_kernels import token_log_probs
from torch import Tensor

from .. import baselines, floors
from ..floors import Direction, Floor
from .base import DEFAULT, Implementation, Inputs, Workload, generator, number, with_compiled


@dataclasses.dataclass(frozen=True)
class LogProbs(Workload):
    """Log-probabilities of ``rows`` tokens of a vocabulary."""

    rows: int
    width: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    compile_modes: tuple[str, ...] = DEFAULT
    chunks: tuple[int, ...] = ()  # further sizes of a chunk, in tokens

    op: ClassVar[str] = "log_probs"

    @property
    def size(self) -> str:
        return f"N={number(self.rows)} H={self.width} V={self.vocabulary}"

    def make(self, device: str, seed: int = 0) -> Inputs:
        source = generator(device, seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device, dtype=self.dtype)

        lm_head = normal(self.vocabulary, self.width).mul_(3 / self.width**0.5)
        targets = torch.randint(self.vocabulary, (self.rows,), generator=source, device=device)
        hidden = normal(self.rows, self.width)
        return {"hidden": hidden.requires_grad_(), "lm_head": lm_head.requires_grad_(), "targets": targets}

    def floor(self, direction: Direction) -> Floor:
        return floors.log_probs(direction, self.rows, self.width, self.vocabulary, self.dtype.itemsize)

    def implementations(self) -> list[Implementation]:
        def ours(i: Inputs) -> tuple[Tensor, ...]:
            return (token_log_probs(i["hidden"], i["lm_head"], i["targets"])[0],)

        def eager(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.log_probs_eager(i["hidden"], i["lm_head"], i["targets"])

        def liger(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.log_probs_liger(i["hidden"], i["lm_head"], i["targets"])

        def cut(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.log_probs_cut(i["hidden"], i["lm_head"], i["targets"])

        def chunked(size: int) -> Implementation:
            def call(i: Inputs) -> tuple[Tensor, ...]:
                return (token_log_probs(i["hidden"], i["lm_head"], i["targets"], chunk_size=size)[0],)

            return Implementation(f"ours, chunk {size}", call)

        plain = Implementation("eager", eager)
        fused = Implementation("liger", liger, "liger_kernel", graph=False)
        cut_cross_entropy = Implementation("cut cross-entropy", cut, "cut_cross_entropy", graph=False)
        found = [Implementation("ours", ours), *map(chunked, self.chunks), plain, fused, cut_cross_entropy]
        return [*found, *with_compiled(plain, self.compile_modes)]

    def working_bytes(self) -> int:
        logits = self.rows * self.vocabulary
        matrices = (self.rows + self.vocabulary) * self.width
        return logits * 16 + matrices * self.dtype.itemsize * 2
