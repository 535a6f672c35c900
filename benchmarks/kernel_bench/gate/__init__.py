"""The equivalence gate: nothing is timed before it is right on this device.

Every operator is held against float64, values and gradients, first on sizes that reach every branch (one
head, head counts that are no power of two, users of very different sizes, one with a tenth of all pairs, huge
margins, low precision, bitwise repeatability), then on every workload that is about to be timed.

Errors are relative root mean squares, but for the responsibilities, which are probabilities: their bar grows
with the log-likelihood, because float32 tells sums of size 100 no better apart than 8e-6. In low precision an
error may also be at most twice that of eager PyTorch in the same dtype.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from ..device import Device
from ..workloads import Workload, one_line
from .checks import Check
from .em import em_battery, em_timed
from .gae import gae_battery, gae_timed, token_gae_battery, token_gae_timed
from .heads import heads_battery, heads_timed
from .log_probs import log_probs_battery, log_probs_timed

GROUPS = (1, 2, 4, 5, 8, 17)
MARGINS = (7.0, 20.0, 1e4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Job = tuple[str, partial[Iterator[Check]]]

TIMED: dict[str, Callable[..., Iterator[Check]]] = {
    "em": em_timed,
    "heads": heads_timed,
    "gae": gae_timed,
    "token_gae": token_gae_timed,
    "log_probs": log_probs_timed,
}


def jobs(device: Device, workloads: Sequence[Workload]) -> Iterator[Job]:
    """Yield the checks of every branch on small inputs, then those of the workloads."""
    for groups in GROUPS:
        for dtype in DTYPES:
            if dtype == torch.float16 and groups not in (4, 8):
                continue
            yield "em", partial(em_battery, device, groups, dtype, 1.0)
            yield "heads", partial(heads_battery, device, groups, dtype)
            yield "gae", partial(gae_battery, device, groups, dtype)
            yield "token_gae", partial(token_gae_battery, device, groups, dtype)
    for dtype in DTYPES:
        for margin in MARGINS:
            yield "em", partial(em_battery, device, 4, dtype, margin)
        yield "log_probs", partial(log_probs_battery, device, dtype)
    for workload in workloads:
        yield workload.op, partial(TIMED[workload.op], device, workload)


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
        if case.func in TIMED.values():
            device.clear()


def worst_by_op(checks: Sequence[Check]) -> dict[str, dict[str, float | str]]:
    """Return for every operator the number of checks, and the one that is closest to its bar."""
    table: dict[str, dict[str, float | str]] = {}
    for op in dict.fromkeys(check.name.split()[0] for check in checks):
        chosen = [check for check in checks if check.name.split()[0] == op]
        closest = max(chosen, key=lambda check: check.error / check.bar if check.bar else check.error)
        table[op] = {
            "checks": len(chosen),
            "closest": closest.name,
            "error": closest.error,
            "bar": closest.bar,
        }
    return table
