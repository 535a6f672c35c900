"""The gate of generalised advantage estimation, by steps and by tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import maxmin_kernels as kernels
import torch
from torch import Tensor

from .. import baselines
from ..device import Device
from ..workloads import GAE, TokenGAE, dtype_name
from ..workloads.gae import GAMMA, KL_COEF, LMBDA
from .checks import Check, compare, normal, repeatable


def gae_checks(
    device: Device, name: str, signals: Sequence[Tensor], flags: Sequence[Tensor], repeat: bool
) -> Iterator[Check]:
    def ours(*signals: Tensor) -> Any:
        return kernels.vector_gae(*signals, *flags, gamma=GAMMA, lmbda=LMBDA)

    def reference(*signals: Tensor) -> Any:
        with torch.no_grad():
            return baselines.gae_eager(*signals, *flags, GAMMA, LMBDA, compute=signals[0].dtype)

    yield from compare(name, ours, reference, signals, exact=True)
    if repeat:
        yield repeatable(device, name, ours, signals)


def gae_battery(device: Device, columns: int, dtype: torch.dtype) -> Iterator[Check]:
    """Rows longer than a block of time steps, with ends of both kinds."""
    steps = 20 if device.quick else 1500
    signals = [normal(device, seed, 5, steps, columns).to(dtype) for seed in range(3)]
    chance = normal(device, 4, 5, steps, 1)
    flags = [chance < -2.5, chance < -2.8]
    yield from gae_checks(device, f"gae K={columns} {dtype_name(dtype)}", signals, flags, repeat=True)


def gae_timed(device: Device, workload: GAE) -> Iterator[Check]:
    inputs = workload.make(device.type)
    signals = [inputs[key] for key in ("reward", "value", "next_value")]
    flags = [inputs["done"], inputs["terminated"]]
    name = f"gae {workload.size} {dtype_name(workload.dtype)}"
    yield from gae_checks(device, name, signals, flags, repeat=False)


def token_gae_checks(device: Device, name: str, inputs: dict[str, Tensor], repeat: bool) -> Iterator[Check]:
    names = [key for key, value in inputs.items() if value.is_floating_point()]
    constants = {"gamma": GAMMA, "lmbda": LMBDA, "kl_coef": KL_COEF}

    def apart(advantage: Tensor, target: Tensor, weighted: Tensor, moments: Tensor) -> Any:
        # One by one: beside the number of tokens, an error of the mean would not be seen.
        return advantage, target, weighted, *moments

    def ours(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return apart(*kernels.token_gae(**given, mask=inputs["mask"], return_moments=True, **constants))

    def reference(*tensors: Tensor) -> Any:
        given, compute = dict(zip(names, tensors, strict=True)), tensors[0].dtype
        with torch.no_grad():
            estimates = baselines.token_gae_eager(**given, mask=inputs["mask"], **constants, compute=compute)
        return apart(*estimates)

    floats = [inputs[key] for key in names]
    yield from compare(name, ours, reference, floats, exact=True)
    if repeat:
        yield repeatable(device, name, ours, floats)


def token_gae_battery(device: Device, groups: int, dtype: torch.dtype) -> Iterator[Check]:
    """Ragged responses, some longer than a block of time steps."""
    rows, steps = (3, 20) if device.quick else (7, 1300)
    inputs = TokenGAE(rows, steps, groups, dtype).make("cpu")
    inputs = {key: value.to(device.type) for key, value in inputs.items()}
    inputs["group_weights"] = inputs["group_weights"].to(dtype)
    name = f"token_gae K={groups} {dtype_name(dtype)}"
    yield from token_gae_checks(device, name, inputs, repeat=True)


def token_gae_timed(device: Device, workload: TokenGAE) -> Iterator[Check]:
    inputs = workload.make(device.type)
    name = f"token_gae {workload.size} {dtype_name(workload.dtype)}"
    yield from token_gae_checks(device, name, inputs, repeat=False)
