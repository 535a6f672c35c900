"""The gate of tensors with more than 2^31 elements, whose offsets no 32-bit integer holds.

The last rows alone are held against float64: every user, row and trajectory stands for itself.
"""

from collections.abc import Iterator
from typing import Any

import maxmin_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import baselines
from ..device import Device
from ..workloads.gae import GAMMA, LMBDA
from .checks import EXACT, LOW, Check, rms

BEYOND = 2**31 + 2**20
LAST = 16
# Bytes of what a case holds at once, for each element of its largest tensor.
BYTES = {"em": 8, "heads": 10, "gae": 24}


def large_battery(device: Device, op: str) -> Iterator[Check]:
    """Run the operator on a tensor beyond 2^31 elements, on a small one where memory or time is short."""
    fits = device.type == "cuda" and device.free_bytes() > 1.2 * BYTES[op] * BEYOND
    elements = BEYOND if fits and not device.quick else 2**11
    name = f"{op} of {elements} elements, the last {LAST}"
    for index, (mine, wide) in enumerate(CASES[op](device, elements)):
        yield Check(f"{name}, tensor {index}", rms(mine, wide), LOW.get(mine.dtype, EXACT))


def random_bfloat16(device: Device, *shape: int) -> Tensor:
    """Return random numbers made in place, without a wide copy."""
    source = torch.Generator(device.type).manual_seed(0)
    return torch.empty(shape, dtype=torch.bfloat16, device=device.type).normal_(generator=source)


def em_large(device: Device, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    pairs, count = elements // 4, 32
    margins = random_bfloat16(device, pairs, 4).requires_grad_()
    offsets = torch.arange(0, pairs + 1, count, device=device.type)
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], device=device.type).log()
    responsibilities, likelihood = kernels.em_responsibilities(margins, None, offsets, prior)
    (grad,) = torch.autograd.grad(likelihood.sum(), margins)
    rows = LAST * count
    leaf = margins.detach()[-rows:].double().requires_grad_()
    users = torch.arange(LAST, device=device.type).repeat_interleave(count)
    part = torch.arange(0, rows + 1, count, device=device.type)
    expected = baselines.em_eager(leaf, torch.zeros_like(leaf), users, part, prior.double())
    yield responsibilities[-LAST:], expected[0]
    yield likelihood[-LAST:].detach(), expected[1].detach()
    yield grad[-rows:], torch.autograd.grad(expected[1].sum(), leaf)[0]


def heads_large(device: Device, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    hidden = random_bfloat16(device, elements // 1024, 1024).requires_grad_()
    weight = random_bfloat16(device, 4, 1024) / 32
    rewards, minimum, *_ = kernels.reward_heads_min(hidden, weight)
    (grad,) = torch.autograd.grad(rewards.square().sum() + minimum.sum(), hidden)
    leaf = hidden.detach()[-LAST:].double().requires_grad_()
    expected = F.linear(leaf, weight.double())
    lowest = expected.amin(-1)
    yield rewards[-LAST:].detach(), expected.detach()
    yield minimum[-LAST:].detach(), lowest.detach()
    yield grad[-LAST:], torch.autograd.grad(expected.square().sum() + lowest.sum(), leaf)[0]


def gae_large(device: Device, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows = elements // 128
    signals = [random_bfloat16(device, rows, 128, 1)] * 3
    end = torch.zeros(rows, 128, 1, dtype=torch.bool, device=device.type)
    end[:, 50] = True
    outputs = kernels.vector_gae(*signals, end, end, gamma=GAMMA, lmbda=LMBDA)
    last: Any = [x[-LAST:] for x in (*signals, end, end)]
    wide = [x.double() for x in last[:3]]
    yield from zip(
        (x[-LAST:] for x in outputs), baselines.gae_eager(*wide, *last[3:], GAMMA, LMBDA), strict=True
    )


CASES = {"em": em_large, "heads": heads_large, "gae": gae_large}
