"""The gate of the log-probabilities."""

from collections.abc import Iterator, Sequence
from typing import Any

import maxmin_kernels as kernels
import torch
from torch import Tensor

from ..device import Device
from ..workloads import LogProbs, dtype_name
from .checks import Check, compare, normal, repeatable

MOST_TOKENS = 1024


def log_probs_checks(
    device: Device, name: str, inputs: Sequence[Tensor], targets: Tensor, temperature: float, repeat: bool
) -> Iterator[Check]:
    def ours(hidden: Tensor, lm_head: Tensor) -> Any:
        return kernels.token_log_probs(hidden, lm_head, targets, temperature=temperature, entropy=True)

    def reference(hidden: Tensor, lm_head: Tensor) -> Any:
        log_p = torch.log_softmax(hidden @ lm_head.mT / temperature, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy

    yield from compare(name, ours, reference, inputs)
    if repeat:
        yield repeatable(device, name, ours, inputs)


def log_probs_battery(device: Device, dtype: torch.dtype) -> Iterator[Check]:
    rows, width, vocabulary = (30, 32, 203) if device.quick else (300, 128, 5003)
    lm_head = normal(device, 1, vocabulary, width) * (8 / width) ** 0.5
    inputs = [normal(device, 0, rows, width).to(dtype), lm_head.to(dtype)]
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2)).to(device.type)
    yield from log_probs_checks(device, f"log_probs {dtype_name(dtype)}", inputs, targets, 0.7, repeat=True)


def log_probs_timed(device: Device, workload: LogProbs) -> Iterator[Check]:
    """At most a thousand tokens, which are several chunks: float64 logits of more would not fit."""
    inputs = workload.make(device.type)
    part = slice(0, MOST_TOKENS)
    leaves = [inputs["hidden"].detach()[part], inputs["lm_head"].detach()]
    name = f"log_probs {workload.size} {dtype_name(workload.dtype)}"
    yield from log_probs_checks(device, name, leaves, inputs["targets"][part], 1.0, repeat=False)
