"""What differs between a CPU and a GPU: how time and memory are measured, and how fast the machine is.

Wall time is what one call costs its caller; on a GPU ``triton.testing.do_bench`` takes it with events, after
clearing the L2 cache. Device time, on a GPU only, is that of a CUDA graph that holds the call once for each
of several sets of inputs which together are larger than the L2 cache: no launch overhead, no warm cache. Peak
memory is what was allocated above what lay there before the call: PyTorch's own count on a GPU, the
profiler's record of every allocation on a CPU, both exact, unlike the size of the process. On a CPU memory
that is freed stays with the process: else any call may pay for mapping it again, or not, by what was freed
before it, and a call of three milliseconds then takes six.
"""

import ctypes
import gc
import importlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
QUANTILES = [0.5, 0.2, 0.8]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Times(NamedTuple):
    """Median and 20% and 80% quantile, in microseconds."""

    p50: float
    p20: float
    p80: float


def quantiles(seconds: Sequence[float]) -> Times:
    """Return median and the outer quantiles of times in seconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(*(1e6 * x for x in (statistics.median(seconds), fifths[0], fifths[3])))


def repeat(call: Call, least: int, seconds: float, after: Call | None = None) -> list[float]:
    """Time the call at least ``least`` times and for ``seconds``; ``after`` each, outside the clock."""
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if after is not None:
            after()
    return times


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to a gigabyte in pieces of up to 32 MB, its limit."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**30)


class Cpu:
    """A CPU with a fixed number of threads."""

    type = "cpu"
    dtypes = (torch.float32,)

    def __init__(self, threads: int, quick: bool = False) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.quick = quick

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wall(self, call: Call) -> Times:
        call()
        call()
        return quantiles(repeat(call, 7, 0.0 if self.quick else 0.3))

    def host(self, call: Call) -> Times:
        return self.wall(call)

    def device_time(self, make_calls: Callable[[], list[Call]]) -> float | None:
        """A CPU has no device time of its own."""
        return None

    def peak_bytes(self, call: Call) -> int:
        cpu = torch.profiler.ProfilerActivity.CPU
        gc.disable()  # what the collector frees was not allocated by the call
        try:
            with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
                call()
        finally:
            gc.enable()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        return peak

    def sets_of_inputs(self, nbytes: int) -> int:
        """One set: what stays in the cache between calls stays there for every implementation."""
        return 1

    def free_bytes(self) -> int:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/meminfo has no line MemAvailable; run on Linux")

    def clear(self) -> None:
        """Nothing to give back: what is no longer used is free."""

    def copy_bytes(self) -> int:
        return 2**24 if self.quick else 2**28

    def gemm_size(self, dtype: torch.dtype) -> int:
        return 512 if self.quick else 2048

    def facts(self) -> dict[str, Any]:
        return {"device": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """Return the processor's model, which platform.processor() leaves empty on many systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


class Cuda:
    """The current CUDA device. ``cuda`` and ``do_bench`` can be replaced, so that this runs without one."""

    type = "cuda"
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, quick: bool = False, cuda: Any = torch.cuda, do_bench: Any = None) -> None:
        self.cuda, self.quick = cuda, quick
        self.do_bench = do_bench or importlib.import_module("triton.testing").do_bench
        # Some images switch TF32 on by an environment variable.
        torch.set_float32_matmul_precision("highest")

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def wall(self, call: Call) -> Times:
        """Event times around a call behind a cleared L2 cache."""
        warmup, rep = (5, 20) if self.quick else (25, 100)
        return Times(*(1e3 * ms for ms in self.do_bench(call, warmup=warmup, rep=rep, quantiles=QUANTILES)))

    def host(self, call: Call) -> Times:
        """Time until the call returns; the device works on the queue meanwhile and is waited for between."""
        for _ in range(10):
            call()
        self.synchronize()
        return quantiles(repeat(call, 50 if self.quick else 500, 0.0, after=self.synchronize))

    def device_time(self, make_calls: Callable[[], list[Call]]) -> float | None:
        """Microseconds per call of a graph of all the calls, which are made on the stream that records."""
        self.synchronize()
        self.cuda.empty_cache()
        stream = self.cuda.Stream()
        with self.cuda.stream(stream):
            calls = make_calls()
            for call in calls:
                call()
        self.synchronize()
        self.cuda.empty_cache()
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph, stream=stream):
            # Outputs are kept until the end, so that every call writes to memory of its own.
            kept = [call() for call in calls]
        del kept
        for _ in range(3):
            graph.replay()
        self.synchronize()
        first = self._replay_seconds(graph, 1)
        replays = max(1, min(1000, round(0.01 / max(first, 1e-6))))
        times = [self._replay_seconds(graph, replays) / replays for _ in range(5)]
        return 1e6 * statistics.median(times) / len(calls)

    def _replay_seconds(self, graph: Any, replays: int) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Call) -> int:
        self.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        result = call()
        self.synchronize()
        del result
        return self.cuda.max_memory_allocated() - before

    def sets_of_inputs(self, nbytes: int) -> int:
        """As many sets as make twice the L2 cache, one if a single set does."""
        cache = self.cuda.get_device_properties().L2_cache_size
        return min(64, max(1, -(-2 * cache // max(nbytes, 1))))

    def free_bytes(self) -> int:
        return self.cuda.mem_get_info()[0]

    def clear(self) -> None:
        """Give the memory of graphs and failed calls back, so that the next measurement has all of it."""
        gc.collect()
        self.cuda.empty_cache()

    def copy_bytes(self) -> int:
        return 2**28 if self.quick else 2**31

    def gemm_size(self, dtype: torch.dtype) -> int:
        return 8192

    def facts(self) -> dict[str, Any]:
        properties = self.cuda.get_device_properties()
        return {
            "device": self.cuda.get_device_name(),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        }


Device = Cpu | Cuda


def driver_version() -> str:
    """Return the NVIDIA driver's version as the kernel module states it."""
    stated = Path("/proc/driver/nvidia/version")
    if stated.exists():
        words = stated.read_text().splitlines()[0].split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    return "unknown"


def make_device(kind: str, threads: int, quick: bool) -> Device:
    """Return the device of a run."""
    return Cuda(quick) if kind == "cuda" else Cpu(threads, quick)


def copy_bandwidth(device: Device) -> float:
    """Measure bytes read and written per second by a large copy of random data."""
    source = torch.rand(device.copy_bytes() // 4, device=device.type)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (device.wall(lambda: target.copy_(source)).p50 / 1e6)


def gemm_rate(device: Device, dtype: torch.dtype) -> float:
    """Measure operations per second of a product of two large random square matrices."""
    n = device.gemm_size(dtype)
    left, right = (torch.randn(n, n, device=device.type, dtype=dtype) for _ in range(2))
    return 2 * n**3 / (device.wall(lambda: left @ right).p50 / 1e6)
