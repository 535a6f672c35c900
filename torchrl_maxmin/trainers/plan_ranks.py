"""What processes of this machine can do while the others work, and what lies between them, measured."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.rates import Rates, measure_rates
from torchrl_maxmin.trainers.plan_messages import Link

__all__ = ["measure_ranks"]

#: messages that are under way at once, as gradients are, and the bytes of a large one
_MESSAGES, _LARGE = 16, 2**20
_WAIT_S = 300


def measure_ranks(ranks: int, dtypes: Sequence[torch.dtype]) -> tuple[Rates, Link]:
    """Measure :class:`~torchrl_maxmin.models.rates.Rates` of a process beside others, and their link.

    As many processes as there will be, at most one a core, measure at the same time; each has the threads
    that torchrun gives it, ``OMP_NUM_THREADS`` or one. Messages go by gloo.

    Args:
        ranks: processes.
        dtypes: of the matrix products.

    Raises:
        UserError: where they cannot be started.
    """
    world = max(2, min(ranks, os.cpu_count() or 1))
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": paths}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder, str(world), *names]
        started = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], env=environment, stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            errors = [process.communicate(timeout=_WAIT_S)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        if any(process.returncode for process in started):
            why = next(filter(None, errors), "no more is known").strip().splitlines()[-1]
            raise UserError(f"{world} processes cannot be measured at once ({why}); give --gpus 1")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return _mean([Rates.from_dict(each["rates"]) for each in found]), Link(**found[0]["link"])


def _mean(rates: Sequence[Rates]) -> Rates:
    """The mean of every figure."""
    parts: dict[str, Any] = {}
    for each in fields(Rates):
        values = [getattr(one, each.name) for one in rates]
        if isinstance(values[0], dict):
            parts[each.name] = {key: statistics.fmean(value[key] for value in values) for key in values[0]}
        else:
            parts[each.name] = values[0] if each.name == "device" else statistics.fmean(values)
    return Rates(**parts)


def _measure_link(world: int) -> Link:
    """Latency of small sums and bandwidth of large ones, many under way at once as gradients are."""
    small = _sum_seconds(1)
    large = _sum_seconds(_LARGE // 4)
    turns = 2 * (world - 1) / world
    latency = small / 2 / (world - 1).bit_length()
    # where others keep the cores busy, latency may hide what bytes take
    return Link(turns * _LARGE / max(large - small, large / 2), latency)


def _sum_seconds(elements: int) -> float:
    """Seconds of a sum over the processes, of so many numbers."""
    values = [torch.ones(elements) for _ in range(_MESSAGES)]

    def together() -> None:
        for work in [dist.all_reduce(value, async_op=True) for value in values]:
            work.wait()

    return _median_seconds(together) / _MESSAGES


def _median_seconds(function: Callable[[], None]) -> float:
    times = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _measure_here(folder: str, rank: int, world: int, dtypes: tuple[torch.dtype, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    dist.barrier()
    rates = measure_rates(torch.device("cpu"), dtypes)
    link = _measure_link(world)
    found = {"rates": rates.to_dict(), "link": asdict(link)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("world", type=int)
    parser.add_argument("dtypes", nargs="+")
    parser.add_argument("--rank", type=int)
    given = parser.parse_args()
    _measure_here(given.folder, given.rank, given.world, tuple(getattr(torch, name) for name in given.dtypes))
