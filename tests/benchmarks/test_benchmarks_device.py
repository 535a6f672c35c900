"""Time and memory on a CPU, and the CUDA device's logic on a stand-in for ``torch.cuda``."""

import pytest
import torch
from benchmarks_fakes import REPLAY_MS, do_bench, fake_device
from kernel_bench import device
from kernel_bench.measure import measure
from kernel_bench.workloads import GAE, EStep, Heads, LogProbs

MB = 2**20


def test_peak_memory_on_a_cpu_is_exact(cpu):
    x = torch.zeros(MB, dtype=torch.uint8)

    def two_alive():
        first = x + 1
        second = first + 1
        del first
        return second + 1

    assert cpu.peak_bytes(two_alive) == pytest.approx(2 * MB, abs=100)
    assert cpu.peak_bytes(lambda: torch.empty(3 * MB, dtype=torch.uint8)) == 3 * MB
    assert cpu.peak_bytes(lambda: x.add_(1)) < 100


def test_peak_memory_sees_inside_of_operators(cpu):
    """A chunk of logits at a time, where eager PyTorch holds all of them, and twice."""
    workload = LogProbs(64, 8, 70_000)
    inputs = workload.make("cpu")
    peaks = {i.name: cpu.peak_bytes(lambda i=i: i.call(inputs)) for i in workload.implementations()[:2]}
    logits = 64 * 70_000 * 4
    assert peaks["ours"] < 1.1 * logits
    assert peaks["eager"] >= 2 * logits


def test_quantiles_are_in_order():
    times = device.quantiles([5e-6, 1e-6, 2e-6, 3e-6, 4e-6, 6e-6])
    assert times == pytest.approx((3.5, 2.0, 5.0))


def test_repeat_waits_outside_of_the_clock():
    calls = []
    times = device.repeat(lambda: calls.append("call"), 3, 0.0, after=lambda: calls.append("after"))
    assert calls == ["call", "after"] * 3
    assert len(times) == 3


def test_wall_time_is_do_bench_in_microseconds():
    cuda, _ = fake_device()
    assert cuda.wall(lambda: None) == (2000.0, 1000.0, 4000.0)


def test_device_time_is_that_of_one_call_of_a_graph_of_many():
    cuda, fake = fake_device()
    captured = []

    def make_calls():
        assert fake.log[-1] == "on side stream"
        return [lambda n=n: captured.append(n) if fake.capturing else None for n in range(4)]

    assert cuda.device_time(make_calls) == pytest.approx(1000 * REPLAY_MS / 4)
    assert captured == [0, 1, 2, 3]


def test_inputs_rotate_until_they_exceed_the_cache():
    cuda, _ = fake_device()
    assert cuda.sets_of_inputs(10 * MB) == 10
    assert cuda.sets_of_inputs(30 * MB) == 4
    assert cuda.sets_of_inputs(10**10) == 1
    assert cuda.sets_of_inputs(1) == 64


def test_peak_memory_on_cuda_is_above_what_lay_there():
    cuda, fake = fake_device()
    assert cuda.peak_bytes(lambda: fake.log.append("call")) == 750
    assert fake.log == ["synchronize", "reset peak", "call", "synchronize"]


def test_host_time_does_not_wait_for_the_device():
    cuda, fake = fake_device()
    calls = []
    times = cuda.host(lambda: calls.append(len(fake.log)))
    assert len(calls) == 60
    assert calls[:10] == [0] * 10  # warm-up
    assert calls[11] - calls[10] == 1  # one wait after each
    assert times.p20 <= times.p50 <= times.p80


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize(
    "workload", [EStep(500, 2), Heads(64, 16, 3), LogProbs(16, 8, 40)], ids=lambda w: w.op
)
def test_a_measurement_on_cuda(workload, direction):
    cuda, fake = fake_device()
    cuda.sets_of_inputs = lambda nbytes: 3 if nbytes == workload.floor(direction).bytes else 1
    for implementation in workload.implementations()[:2]:
        row = measure(cuda, workload, implementation, direction)
        assert (row.wall_us, row.wall_p20_us, row.wall_p80_us) == (2000.0, 1000.0, 4000.0)
        assert row.device_us == pytest.approx(1000 * REPLAY_MS / 3)
        assert row.peak_bytes == 750
        assert row.floor_bytes == workload.floor(direction).bytes
        assert row.note == ""
    assert "capture" in fake.log


def test_what_no_graph_can_record_keeps_its_wall_time():
    cuda, _ = fake_device(fail_capture=True)
    workload = GAE(2, 8, 1)
    ours, loop = workload.implementations()[:2]
    row = measure(cuda, workload, ours, "forward")
    assert row.wall_us == 2000.0
    assert row.device_us is None
    assert row.note == "no device time: RuntimeError: operation not permitted when stream is capturing"
    row = measure(cuda, workload, loop, "forward")
    assert (row.device_us, row.note) == (None, "")


def test_what_the_machine_does():
    cuda, _ = fake_device()
    cuda.copy_bytes, cuda.gemm_size = lambda: 4000, lambda dtype: 32
    assert device.copy_bandwidth(cuda) == pytest.approx(2 * 4000 / 2e-3)
    assert device.gemm_rate(cuda, torch.float32) == pytest.approx(2 * 32**3 / 2e-3)
    assert cuda.facts()["device"] == "NVIDIA Fake 100"
    assert cuda.facts()["float32_matmul_precision"] == "highest"


def test_driver_version(tmp_path, monkeypatch):
    stated = tmp_path / "version"
    stated.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC\n")
    monkeypatch.setattr(device, "Path", lambda path: stated)
    assert device.driver_version() == "570.124.06"
    stated.unlink()
    assert device.driver_version() == "unknown"


def test_do_bench_stands_in_for_tritons_signature():
    import inspect

    testing = pytest.importorskip("triton.testing")
    wanted = set(inspect.signature(do_bench).parameters) - {"call"}
    assert wanted <= set(inspect.signature(testing.do_bench).parameters)
