"""A stand-in for ``torch.cuda``: a clock that advances with every replay, and a log of what was asked."""

import contextlib
from types import SimpleNamespace

from kernel_bench.device import Cuda

REPLAY_MS = 3.0


class FakeCuda:
    """As much of ``torch.cuda`` as the device uses; a replay takes ``REPLAY_MS``."""

    def __init__(self, fail_capture=False):
        self.log, self.clock, self.fail_capture = [], 0.0, fail_capture
        self.capturing = False

    def Stream(self):
        return "side stream"

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream}")
        yield
        self.log.append(f"off {stream}")

    def CUDAGraph(self):
        return SimpleNamespace(replay=self._replay)

    def _replay(self):
        self.clock += REPLAY_MS

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert stream == "side stream"
        self.log.append("capture")
        if self.fail_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        yield
        self.capturing = False

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.clock)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty cache")

    def reset_peak_memory_stats(self):
        self.log.append("reset peak")

    def memory_allocated(self):
        return 1000

    def max_memory_allocated(self):
        return 1750

    def mem_get_info(self):
        return 8 * 2**30, 80 * 2**30

    def get_device_name(self):
        return "NVIDIA Fake 100"

    def get_device_properties(self):
        return SimpleNamespace(L2_cache_size=50 * 2**20, total_memory=80 * 2**30)


class CudaOnCpu(Cuda):
    """The CUDA device's logic on tensors of the CPU."""

    type = "cpu"


def do_bench(call, warmup, rep, quantiles):
    """Call once and say 2, 1 and 4 milliseconds, in the order of the quantiles asked for."""
    call()
    return [{0.5: 2.0, 0.2: 1.0, 0.8: 4.0}[q] for q in quantiles]


def fake_device(**options):
    cuda = FakeCuda(**options)
    return CudaOnCpu(quick=True, cuda=cuda, do_bench=do_bench), cuda
