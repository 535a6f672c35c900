"""Time every implementation of every workload on a device, one row a direction.

A baseline that cannot run is a row with the reason in ``note``; only those of libraries that are not
installed are left out, which the environment states. So that a time limit costs the least, what must be
compiled first comes after everything else, and is skipped once the budget is spent.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .baselines import LIBRARIES
from .device import Call, Device, Times
from .floors import Direction
from .workloads import Implementation, Inputs, Workload, dtype_name, one_line

# A baseline that is further than this from ours, in relative root mean square, computes something else.
SAME = 2e-2


@dataclasses.dataclass
class Row:
    """One measurement. Times in microseconds; a time that does not exist is None.

    Attributes:
        direction: ``forward``, ``backward``, ``both``, or ``host`` for the cost of a call on tiny inputs.
        peak_bytes: Allocated above the inputs.
        share_of_copy: Floor bytes per second of device time (else wall time) over the copy bandwidth.
        share_of_gemm: Floor operations per second over the rate of the library's matrix product.
        ratio_to_ours: Time over that of ``ours``.
        note: Why a measurement is missing.
    """

    op: str
    size: str
    dtype: str
    direction: str
    implementation: str
    wall_us: float | None = None
    wall_p20_us: float | None = None
    wall_p80_us: float | None = None
    device_us: float | None = None
    peak_bytes: int | None = None
    floor_bytes: int | None = None
    floor_flops: int | None = None
    share_of_copy: float | None = None
    share_of_gemm: float | None = None
    ratio_to_ours: float | None = None
    note: str = ""

    def sizes(self) -> dict[str, float]:
        """Return the dimensions by name."""
        pairs = (part.split("=") for part in self.size.split())
        return {name: float(value) for name, value in pairs}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the device was measured to do: bytes copied and operations per second, the latter by dtype."""

    copy: float
    gemm: dict[str, float]


def compiled(implementation: Implementation) -> Implementation:
    """Apply ``torch.compile`` if the implementation asks for it."""
    mode = implementation.compile_mode
    if not mode:
        return implementation
    torch.compiler.reset()
    # The timed backward pass runs many times over one forward pass, whose buffers it must not take over.
    torch._functorch.config.donated_buffer = False
    call = torch.compile(implementation.call, dynamic=False, mode=None if mode == "default" else mode)
    return implementation._replace(call=call)


def make_call(
    workload: Workload, implementation: Implementation, direction: Direction, inputs: Inputs
) -> Call:
    """Return what is timed: one pass of the implementation over these inputs."""
    leaves = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]

    def forward() -> Any:
        with torch.no_grad():
            return implementation.call(inputs)

    if direction == "forward":
        return forward

    def loss() -> Tensor:
        return implementation.call(inputs)[workload.loss_output]

    def gradients(output: Tensor, retain: bool) -> Any:
        # Leaves of another implementation (a parameter for every head) take no part.
        return torch.autograd.grad(output, leaves, cotangent, retain_graph=retain, allow_unused=True)

    output = loss()
    cotangent = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device)
    if direction == "both":
        del output
        return lambda: gradients(loss(), False)
    return lambda: gradients(output, True)


def measure(device: Device, workload: Workload, implementation: Implementation, direction: Direction) -> Row:
    """Measure wall time, device time and peak memory of one direction."""
    row = blank_row(workload, implementation, direction)
    inputs = workload.make(device.type)
    call = make_call(workload, implementation, direction, inputs)
    set_wall(row, device.wall(call))
    row.peak_bytes = device.peak_bytes(call)
    del call
    if not implementation.graph:
        return row
    count = device.sets_of_inputs(workload.floor(direction).bytes)
    sets = [inputs, *(workload.make(device.type, seed) for seed in range(1, count))]
    try:
        row.device_us = device.device_time(
            lambda: [make_call(workload, implementation, direction, each) for each in sets]
        )
    except Exception as error:
        row.note = f"no device time: {one_line(error)}"
    return row


def blank_row(workload: Workload, implementation: Implementation, direction: Direction) -> Row:
    """Return the row of a measurement, with its floors and without its times."""
    floor = workload.floor(direction)
    return Row(
        op=workload.op,
        size=workload.size,
        dtype=dtype_name(workload.dtype),
        direction=direction,
        implementation=implementation.name,
        floor_bytes=floor.bytes,
        floor_flops=floor.flops,
    )


def set_wall(row: Row, times: Times) -> None:
    """Write median and quantiles into the row."""
    row.wall_us, row.wall_p20_us, row.wall_p80_us = times


def check_same(workload: Workload, implementation: Implementation, inputs: Inputs, ours: Sequence) -> None:
    """Raise if a baseline's outputs are not ours: then its time means nothing.

    Raises:
        ArithmeticError: If an output is further from ours than rounding explains.
    """
    with torch.no_grad():
        outputs = implementation.call(inputs)
    for index, (theirs, mine) in enumerate(zip(outputs, ours, strict=True)):
        if not theirs.is_floating_point():
            continue
        error = ((theirs.float() - mine).norm() / mine.norm()).item()
        if not error < SAME:
            raise ArithmeticError(f"output {index} differs from ours by {error:.1e}")


def is_wanted(implementation: Implementation, compile_modes: Sequence[str]) -> bool:
    """Whether the implementation can and should run: its library is there, its way of compiling wanted."""
    if implementation.library and not LIBRARIES[implementation.library]:
        return False
    return not implementation.compile_mode or implementation.compile_mode in compile_modes


def run(
    device: Device,
    workloads: Sequence[Workload],
    compile_modes: Sequence[str],
    budget: float,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """Measure everything; yields rows as they come.

    Args:
        device: Where to run.
        workloads: What to run.
        compile_modes: The modes of ``torch.compile`` that are wanted.
        budget: Seconds after which what must be compiled first is skipped.
        progress: Told one line a case.
    """
    start = time.perf_counter()
    cases = [
        (workload, each)
        for late in (False, True)
        for workload in workloads
        for each in workload.implementations()
        if bool(each.compile_mode) == late and is_wanted(each, compile_modes)
    ]
    for number, (workload, implementation) in enumerate(cases, 1):
        label = f"[{number}/{len(cases)}] {workload.op} {workload.size} {dtype_name(workload.dtype)}"
        late = bool(implementation.compile_mode) and time.perf_counter() - start > budget
        rows = run_case(device, workload, implementation, "time budget spent" if late else "")
        for row in rows:
            progress(f"{label} {row.direction} {implementation.name}: {told(row)}")
            yield row


def run_case(device: Device, workload: Workload, implementation: Implementation, skip: str) -> list[Row]:
    """Measure all directions of one implementation; whatever it raises is noted."""
    rows = [blank_row(workload, implementation, direction) for direction in workload.directions]
    failure = f"skipped: {skip}" if skip else ""
    for index, direction in enumerate(workload.directions):
        if not failure:
            try:
                if index == 0:
                    implementation = compiled(implementation)
                    compare_with_ours(device, workload, implementation)
                rows[index] = measure(device, workload, implementation, direction)
            except Exception as error:
                failure = f"failed: {one_line(error)}"
        if failure:
            rows[index].note = failure
    device.clear()
    return rows


def compare_with_ours(device: Device, workload: Workload, implementation: Implementation) -> None:
    """Hold a baseline against ours, which the gate has held against float64."""
    if implementation.name == "ours":
        return
    inputs = workload.make(device.type)
    with torch.no_grad():
        ours = workload.implementations()[0].call(inputs)
    check_same(workload, implementation, inputs, ours)


def told(row: Row) -> str:
    """Return a measurement in words."""
    if row.wall_us is None:
        return row.note
    on_device = "" if row.device_us is None else f", device {row.device_us:.1f} us"
    return f"{row.wall_us:.1f} us{on_device}{f' ({row.note})' if row.note else ''}"


def best_time(row: Row) -> float | None:
    """Return the device time if there is one, else the wall time."""
    return row.wall_us if row.device_us is None else row.device_us


def compare(rows: Sequence[Row], machine: Machine) -> None:
    """Fill in what follows from several measurements: shares of what the machine can do, ratios to ours."""
    ours = {(r.op, r.size, r.dtype, r.direction): r for r in rows if r.implementation == "ours"}
    for row in rows:
        taken = best_time(row)
        if taken is None:
            continue
        if row.floor_bytes and row.floor_flops:
            row.share_of_copy = row.floor_bytes / (taken / 1e6) / machine.copy
            row.share_of_gemm = row.floor_flops / (taken / 1e6) / machine.gemm[row.dtype]
        reference = ours.get((row.op, row.size, row.dtype, row.direction))
        if reference is not None:
            row.ratio_to_ours = ratio_of(row, reference)


def ratio_of(row: Row, reference: Row) -> float | None:
    """Return the time of one over that of the other, both on the device or both wall."""
    if row.device_us is not None and reference.device_us is not None:
        return row.device_us / reference.device_us
    if row.wall_us is not None and reference.wall_us is not None:
        return row.wall_us / reference.wall_us
    return None
