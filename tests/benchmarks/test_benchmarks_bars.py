"""Bars on made rows."""

import pytest
from kernel_bench.bars import Rows, judge
from kernel_bench.measure import Machine, Row, best_time, compare

MACHINE = Machine(copy=1e12, gemm={"float32": 1e13, "bfloat16": 1e14})


def row(op, size, implementation="ours", direction="forward", dtype="float32", **values):
    return Row(op, size, dtype, direction, implementation, **values)


def outcomes(kind, rows):
    compare(rows, MACHINE)
    return {v.text: (v.value, v.outcome) for v in judge(kind, rows) if v.outcome != "not measured"}


def test_nothing_measured_is_no_pass():
    for kind in ("cpu", "cuda"):
        verdicts = judge(kind, [])
        assert verdicts
        assert {v.outcome for v in verdicts} == {"not measured"}
        assert len({v.text for v in verdicts}) == len(verdicts)


def test_speedups_on_a_cpu():
    rows = [
        row("em", "P=1e6 K=4", wall_us=10.0),
        row("em", "P=1e6 K=4", "eager", wall_us=20.0),
        row("em", "P=1e7 K=4", wall_us=100.0),
        row("em", "P=1e7 K=4", "eager", wall_us=99.0),
        row("gae", "B=64 T=512 K=4", wall_us=10.0),
        row("gae", "B=64 T=512 K=4", "torchrl vec", wall_us=49.0),
    ]
    assert outcomes("cpu", rows) == {
        "E-step 1e6 pairs: eager / ours": (2.0, "pass"),
        "E-step 1e7 pairs: eager / ours": (0.99, "miss"),
        "GAE [64, 512, 4]: TorchRL vectorised / ours": (4.9, "miss"),
    }


def test_memory_leaves_out_the_gradient_that_both_return():
    gradient = 50257 * 8 * 4
    size = "N=512 H=8 V=50257"
    rows = [
        row("log_probs", size, direction="both", wall_us=11.0, peak_bytes=gradient + 300),
        row("log_probs", size, "eager", "both", wall_us=10.0, peak_bytes=gradient + 1000),
    ]
    assert outcomes("cpu", rows) == {
        "log-probs: peak beyond inputs and lm_head's gradient, ours / eager": (0.3, "pass"),
        "log-probs both: ours / eager": (1.1, "pass"),
    }


def test_shares_and_skew_on_a_gpu():
    size = "P=5e7 K=4"  # scaled down to fit
    rows = [
        row(
            "em", size, wall_us=99.0, device_us=10.0, floor_bytes=8_200_000, floor_flops=1, peak_bytes=80_000
        ),
        row("em", size, "eager", wall_us=60.0, device_us=25.0),
        row("em", size, "torch.compile default", wall_us=60.0, device_us=13.0),
        row("em", size, "torch.compile max-autotune-no-cudagraphs", wall_us=60.0, device_us=11.0),
        row("em", f"{size} skew=0.1", wall_us=99.0, device_us=11.0, floor_bytes=8_000_000, floor_flops=1),
    ]
    found = outcomes("cuda", rows)
    assert {text: outcome for text, (_, outcome) in found.items()} == {
        "E-step K=4 float32: share of copy bandwidth": "pass",
        "E-step K=4 float32: eager / ours": "miss",
        "E-step K=4 float32: fastest torch.compile / ours": "miss",
        "E-step K=4 float32: peak over the bytes of inputs and outputs": "pass",
        "E-step, one user with a tenth of the pairs / none": "pass",
    }
    assert found["E-step K=4 float32: share of copy bandwidth"][0] == pytest.approx(0.82)
    assert found["E-step K=4 float32: fastest torch.compile / ours"][0] == pytest.approx(1.1)
    assert found["E-step, one user with a tenth of the pairs / none"][0] == pytest.approx(1.1)


def test_torchrl_is_compared_by_wall_time():
    rows = [
        row("gae", "B=512 T=1024 K=1", wall_us=30.0, device_us=5.0),
        row("gae", "B=512 T=1024 K=1", "torchrl vec", wall_us=600.0),
    ]
    found = outcomes("cuda", rows)
    assert found["GAE [512, 1024, 1]: TorchRL vectorised / ours, wall"] == (20.0, "pass")
    assert found["GAE [512, 1024, 1]: microseconds on the device"] == (5.0, "pass")
    assert rows[1].ratio_to_ours == 20.0


def test_a_failed_measurement_is_not_measured():
    rows = [
        row("em", "P=1e6 K=4", wall_us=10.0),
        row("em", "P=1e6 K=4", "eager", note="failed: out of memory"),
    ]
    assert outcomes("cpu", rows) == {}
    assert best_time(rows[1]) is None


def test_different_sizes_are_not_compared():
    rows = [row("em", "P=1e8 K=4", wall_us=1.0, floor_bytes=2), row("em", "P=5e7 K=4", "eager", wall_us=9.0)]
    assert Rows(rows).speedup("em", "forward", "eager", K=4) is None


def test_calls_on_tiny_inputs():
    rows = [Row("vector_gae", "", "float32", "host", "ours", wall_us=251.0)]
    assert outcomes("cuda", rows) == {"vector_gae: microseconds a call on tiny inputs": (251.0, "miss")}


def test_shares_and_ratios():
    ours = row("heads", "N=1 H=1 K=1", wall_us=5.0, device_us=2.0, floor_bytes=10**6, floor_flops=10**7)
    theirs = row("heads", "N=1 H=1 K=1", "eager", wall_us=4.0, floor_bytes=10**6, floor_flops=10**7)
    compare([ours, theirs], MACHINE)
    assert ours.share_of_copy == pytest.approx(0.5)
    assert ours.share_of_gemm == pytest.approx(0.5)
    assert theirs.share_of_copy == pytest.approx(0.25)
    assert theirs.ratio_to_ours == pytest.approx(0.8)  # wall against wall
