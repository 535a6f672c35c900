"""The gate of the reward heads and of the minimum over given rewards."""

from collections.abc import Iterator, Sequence
from typing import Any

import maxmin_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import baselines
from ..device import Device
from ..workloads import Heads, dtype_name
from .checks import EXACT, Check, compare, normal, repeatable


def heads_checks(
    device: Device, name: str, inputs: Sequence[Tensor], temperature: float, repeat: bool
) -> Iterator[Check]:
    """Hold the heads against float64. Where two heads tie within rounding, either may be the minimum."""

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor, *shift_scale: Tensor) -> Any:
        shift, scale = shift_scale or (None, None)
        return kernels.reward_heads_min(
            hidden, weight, bias, shift=shift, scale=scale, temperature=temperature
        )

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor, *shift_scale: Tensor) -> Tensor:
        rewards = F.linear(hidden, weight, bias)
        return (rewards - shift_scale[0]) / shift_scale[1] if shift_scale else rewards

    with torch.no_grad():
        argmin = ours(*inputs)[2].unsqueeze(-1)
        exact_rewards = linear(*(x.double() for x in inputs))
        excess = (exact_rewards.gather(-1, argmin).squeeze(-1) - exact_rewards.amin(-1)).max()
        spread = exact_rewards.abs().max()

    def reference(*args: Tensor) -> Any:
        rewards, _, _, softmin = baselines.min_eager(linear(*args), temperature)
        return rewards, rewards.gather(-1, argmin).squeeze(-1), softmin

    yield Check(f"{name} argmin above the minimum", (excess / spread).item(), EXACT)
    yield from compare(name, ours, reference, inputs)
    if repeat:
        yield repeatable(device, name, ours, inputs)


def heads_battery(device: Device, num_heads: int, dtype: torch.dtype) -> Iterator[Check]:
    rows, width, more = (37, 64, 45) if device.quick else (301, 256, 1037)
    shapes = ((rows, width), (num_heads, width), (num_heads,), (num_heads,))
    inputs = [normal(device, seed, *shape).to(dtype) for seed, shape in enumerate(shapes)]
    scale = (normal(device, 9, num_heads).abs() + 0.5).to(dtype)
    name = f"heads K={num_heads} {dtype_name(dtype)}"
    yield from heads_checks(device, name, [*inputs, scale], 0.7, repeat=True)

    def minimum(rewards: Tensor) -> Any:
        return kernels.min_over_heads(rewards, temperature=0.7)

    def minimum_reference(rewards: Tensor) -> Any:
        return baselines.min_eager(rewards, 0.7)[1:]

    rewards = [normal(device, 5, more, num_heads).to(dtype)]
    yield from compare(f"min {name}", minimum, minimum_reference, rewards, exact=True)
    yield repeatable(device, f"min {name}", minimum, rewards)


def heads_timed(device: Device, workload: Heads) -> Iterator[Check]:
    inputs = workload.make(device.type)
    leaves = [inputs[key].detach() for key in ("hidden", "weight", "bias")]
    name = f"heads {workload.size} {dtype_name(workload.dtype)}"
    yield from heads_checks(device, name, leaves, 1.0, repeat=False)
