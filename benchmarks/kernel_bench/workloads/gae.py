"""Generalised advantage estimation, by steps and by tokens of responses."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from maxmin_kernels import token_gae, vector_gae
from torch import Tensor

from .. import baselines, floors
from ..floors import Direction, Floor
from .base import Implementation, Inputs, Workload, generator

GAMMA, LMBDA, KL_COEF = 0.99, 0.95, 0.1


@dataclasses.dataclass(frozen=True)
class GAE(Workload):
    """Advantages of ``columns`` rewards on ``batch`` rows of ``steps`` steps, some of which end."""

    batch: int
    steps: int
    columns: int
    dtype: torch.dtype = torch.float32

    op: ClassVar[str] = "gae"
    directions: ClassVar[tuple[Direction, ...]] = ("forward",)

    @property
    def size(self) -> str:
        return f"B={self.batch} T={self.steps} K={self.columns}"

    def make(self, device: str, seed: int = 0) -> Inputs:
        source = generator(device, seed)
        shape = (self.batch, self.steps, self.columns)
        signals = [torch.randn(shape, generator=source, device=device, dtype=self.dtype) for _ in range(3)]
        chance = torch.rand((self.batch, self.steps, 1), generator=source, device=device)
        done, terminated = chance < 0.01, chance < 0.005
        done[:, -1] = True
        # TorchRL wants the flags in the rewards' shape.
        wide = {"done_wide": done.expand(shape).clone(), "terminated_wide": terminated.expand(shape).clone()}
        names = ("reward", "value", "next_value")
        return dict(zip(names, signals, strict=True)) | {"done": done, "terminated": terminated} | wide

    def floor(self, direction: Direction) -> Floor:
        return floors.gae(direction, self.batch, self.steps, self.columns, self.dtype.itemsize)

    def implementations(self) -> list[Implementation]:
        def signals(i: Inputs, suffix: str = "") -> tuple[Tensor, ...]:
            names = ("reward", "value", "next_value", f"done{suffix}", f"terminated{suffix}")
            return tuple(i[name] for name in names)

        def ours(i: Inputs) -> tuple[Tensor, ...]:
            return vector_gae(*signals(i), gamma=GAMMA, lmbda=LMBDA)

        def loop(i: Inputs) -> tuple[Tensor, ...]:
            return baselines.gae_eager(*signals(i), GAMMA, LMBDA)

        def torchrl(kind: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
            return lambda i: baselines.gae_torchrl(kind, *signals(i, "_wide"), GAMMA, LMBDA)

        # torch.compile would unroll the loops over time and a graph hold thousands of launches; TorchRL's
        # vectorised form waits for the device.
        return [
            Implementation("ours", ours),
            Implementation("eager", loop, graph=False),
            Implementation(
                "torchrl vec", torchrl("vec_generalized_advantage_estimate"), "torchrl", graph=False
            ),
            Implementation("torchrl loop", torchrl("generalized_advantage_estimate"), "torchrl", graph=False),
        ]

    def working_bytes(self) -> int:
        return 16 * 4 * self.batch * self.steps * self.columns


@dataclasses.dataclass(frozen=True)
class TokenGAE(Workload):
    """Advantages of responses with ``groups`` rewards at the end and a KL penalty a token, weighted."""

    batch: int
    steps: int
    groups: int
    dtype: torch.dtype = torch.float32

    op: ClassVar[str] = "token_gae"
    directions: ClassVar[tuple[Direction, ...]] = ("forward",)

    @property
    def size(self) -> str:
        return f"B={self.batch} T={self.steps} K={self.groups}"

    def make(self, device: str, seed: int = 0) -> Inputs:
        source = generator(device, seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device, dtype=self.dtype)

        lengths = torch.randint(1, self.steps + 1, (self.batch, 1), generator=source, device=device)
        return {
            # Away from zero, so that the mean of the advantages is no difference of large sums.
            "terminal_reward": normal(self.batch, self.groups) + 2,
            "value": normal(self.batch, self.steps, self.groups + 1),
            "mask": torch.arange(self.steps, device=device) < lengths,
            "sample_log_prob": normal(self.batch, self.steps),
            "ref_log_prob": normal(self.batch, self.steps),
            "group_weights": torch.rand(self.groups, generator=source, device=device).softmax(-1),
        }

    def floor(self, direction: Direction) -> Floor:
        return floors.token_gae(direction, self.batch, self.steps, self.groups, self.dtype.itemsize)

    def implementations(self) -> list[Implementation]:
        def ours(i: Inputs) -> tuple[Tensor, ...]:
            return token_gae(**i, gamma=GAMMA, lmbda=LMBDA, kl_coef=KL_COEF, return_moments=True)

        def shaped(estimate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Inputs], tuple[Tensor, ...]]:
            return lambda i: baselines.token_gae_eager(
                **i, gamma=GAMMA, lmbda=LMBDA, kl_coef=KL_COEF, estimate=estimate
            )

        def torchrl(*signals: Tensor) -> tuple[Tensor, Tensor]:
            return baselines.gae_torchrl("vec_generalized_advantage_estimate", *signals)

        return [
            Implementation("ours", ours),
            Implementation("eager", shaped(baselines.gae_eager), graph=False),
            Implementation("torchrl vec", shaped(torchrl), "torchrl", graph=False),
        ]

    def working_bytes(self) -> int:
        return 20 * 4 * self.batch * self.steps * (self.groups + 1)
