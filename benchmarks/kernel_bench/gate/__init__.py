"""The equivalence gate: nothing is timed before it is right on this device.

Every operator is held against float64, values and gradients, first on sizes that reach every branch (one
head, head counts that are no power of two, users of very different sizes, one with a tenth of all pairs, huge
margins, low precision, bitwise repeatability), then as the product calls it, on tensors with more than 2^31
elements, and on every workload that is about to be timed.

Errors are relative root mean squares, but for the responsibilities, which are probabilities: their bar grows
with the log-likelihood, because float32 tells sums of size 100 no better apart than 8e-6. In low precision an
error may also be at most twice that of eager PyTorch in the same dtype.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..device import Device
from ..workloads import Workload, one_line
from .checks import Check
from .em import em_battery, em_timed
from .gae import gae_battery, gae_timed, token_gae_battery, token_gae_timed
from .heads import heads_battery, heads_timed
from .large import large_battery
from .log_probs import log_probs_battery, log_probs_timed
from .product import (
    margins_battery,
    masked_gae_battery,
    masked_heads_battery,
    mixed_battery,
    surroundings_battery,
    transformed_battery,
)

MANY = 70  # heads, more than one tile holds


class Extent(NamedTuple):
    """How much of the gate runs: numbers of groups, margins of the E-step, and dtypes."""

    groups: Sequence[int]
    margins: Sequence[float]
    dtypes: Sequence[torch.dtype]


FULL = Extent((1, 2, 4, 5, 8, 17), (7.0, 20.0, 1e4), (torch.float32, torch.bfloat16, torch.float16))
QUICK = Extent((5,), (20.0,), (torch.float32, torch.bfloat16))

Job = tuple[str, partial[Iterator[Check]]]

TIMED: dict[str, Callable[..., Iterator[Check]]] = {
    "em": em_timed,
    "heads": heads_timed,
    "gae": gae_timed,
    "token_gae": token_gae_timed,
    "log_probs": log_probs_timed,
}


def jobs(device: Device, workloads: Sequence[Workload]) -> Iterator[Job]:
    """Yield the checks of every branch on small inputs, of the product's calls, and of the workloads."""
    extent = QUICK if device.quick else FULL
    for groups in extent.groups:
        for dtype in extent.dtypes:
            if dtype == torch.float16 and groups not in (4, 8):
                continue
            yield "em", partial(em_battery, device, groups, dtype, 1.0)
            yield "heads", partial(heads_battery, device, groups, dtype)
            yield "gae", partial(gae_battery, device, groups, dtype)
            yield "token_gae", partial(token_gae_battery, device, groups, dtype)
    for dtype in extent.dtypes:
        for margin in extent.margins:
            yield "em", partial(em_battery, device, 4, dtype, margin)
        yield "log_probs", partial(log_probs_battery, device, dtype)
    yield from product_jobs(device)
    for workload in workloads:
        yield workload.op, partial(TIMED[workload.op], device, workload)


def product_jobs(device: Device) -> Iterator[Job]:
    """Yield the checks of the calls that the product makes, few of each, for every one is compiled anew."""
    fp32, bf16 = torch.float32, torch.bfloat16
    for groups, dtype in ((3, fp32),) if device.quick else ((1, fp32), (3, fp32), (8, fp32), (4, bf16)):
        yield "em", partial(margins_battery, device, groups, dtype)
    for heads, dtype in ((3, fp32), (MANY, fp32)) if device.quick else ((3, fp32), (8, bf16), (MANY, fp32)):
        yield "heads", partial(masked_heads_battery, device, heads, dtype)
    for columns, dtype in ((3, fp32),) if device.quick else ((1, fp32), (3, fp32), (4, bf16)):
        yield "gae", partial(masked_gae_battery, device, columns, dtype)
    yield "heads", partial(heads_battery, device, MANY, fp32)
    if not device.quick:
        yield "em", partial(em_battery, device, MANY, fp32, 1.0)
        yield "gae", partial(gae_battery, device, MANY, fp32)
    for op in ("heads", "log_probs"):
        yield op, partial(mixed_battery, device, op)
    for dtype in (fp32,) if device.quick else (fp32, bf16):
        yield "log_probs", partial(transformed_battery, device, dtype)
    for op in ("em", "heads", "gae", "log_probs"):
        yield op, partial(surroundings_battery, device, op)
    for op in ("em", "heads", "gae"):
        yield op, partial(large_battery, device, op)


def run_gate(device: Device, ops: Sequence[str], workloads: Sequence[Workload]) -> Iterator[list[Check]]:
    """Yield the checks of the operators and of the workloads, a case at a time; one that raises fails."""
    for op, case in jobs(device, workloads):
        if op not in ops:
            continue
        checks = []
        try:
            for check in case():
                checks.append(check)
        except Exception as error:
            checks.append(Check(f"{op} {case.args[1:]} raised {one_line(error)}", math.inf, 0.0))
        yield checks
        if case.func in TIMED.values() or case.func is large_battery:
            device.clear()


def closest(checks: Sequence[Check]) -> Check:
    """Return the check whose error is the largest part of its bar; one that is no number is beyond any."""

    def part_of_bar(check: Check) -> float:
        if math.isnan(check.error):
            return math.inf
        return check.error / check.bar if check.bar else check.error

    return max(checks, key=part_of_bar)


def worst_by_op(checks: Sequence[Check]) -> dict[str, dict[str, float | str]]:
    """Return for every operator the number of checks, and the one that is closest to its bar."""
    table: dict[str, dict[str, float | str]] = {}
    for op in dict.fromkeys(check.name.split()[0] for check in checks):
        chosen = [check for check in checks if check.name.split()[0] == op]
        worst = closest(chosen)
        table[op] = {
            "checks": len(chosen),
            "closest": worst.name,
            "error": worst.error,
            "bar": worst.bar,
        }
    return table
