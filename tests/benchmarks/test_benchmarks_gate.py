"""The gate holds for the kernels, and for nothing that differs from them."""

import math

import maxmin_kernels
import pytest
import torch
from benchmarks_fakes import fake_device
from kernel_bench import gate
from kernel_bench.device import Cpu
from kernel_bench.gate import checks as checking
from kernel_bench.gate import large, product
from kernel_bench.gate import log_probs as log_probs_gate
from kernel_bench.workloads import GAE, EStep, Heads, LogProbs, TokenGAE

TIMED = [
    EStep(3000, 3),
    EStep(3000, 4, torch.bfloat16, skew=0.1),
    Heads(40, 32, 5, torch.bfloat16),
    GAE(3, 40, 2),
    TokenGAE(3, 40, 2),
    LogProbs(30, 16, 90),
]
SMALL = {"em": TIMED[0], "heads": TIMED[2], "gae": TIMED[3], "token_gae": TIMED[4], "log_probs": TIMED[5]}
OPS = tuple(SMALL)


def failing(cpu, op):
    checks = gate.TIMED[op](cpu, SMALL[op])
    return {
        check.name.removeprefix(f"{op} {SMALL[op].size} ").split(" ", 1)[1]
        for check in checks
        if not check.ok
    }


def test_the_kernels_pass(cpu):
    checks = [check for case in gate.run_gate(cpu, OPS, TIMED) for check in case]
    assert [check for check in checks if not check.ok] == []
    ops = {check.name.split()[0] for check in checks}
    assert ops == {*OPS, "min"}
    summary = gate.worst_by_op(checks)
    assert sum(facts["checks"] for facts in summary.values()) == len(checks)
    for facts in summary.values():
        assert facts["error"] <= facts["bar"]


@pytest.fixture
def whole_gate():
    """A CPU with the full gate, not the quick one."""
    return Cpu(threads=1)


def test_every_branch_is_reached_on_every_device(whole_gate):
    names = [f"{op} {job.args[1:]}" for op, job in gate.jobs(whole_gate, ())]
    for op in ("em", "heads", "gae", "token_gae"):
        for groups in (1, 2, 4, 5, 8, 17):
            for dtype in ("float32", "bfloat16"):
                assert any(n.startswith(f"{op} ({groups}, torch.{dtype}") for n in names)
    for margin in (7.0, 20.0, 1e4):
        for dtype in ("float32", "bfloat16", "float16"):
            assert f"em (4, torch.{dtype}, {margin})" in names


def test_the_calls_of_the_product_are_among_the_cases(whole_gate, cpu):
    for device in (whole_gate, cpu):
        cases = {(op, job.func.__name__) for op, job in gate.jobs(device, ())}
        assert cases >= {
            ("em", "margins_battery"),
            ("heads", "masked_heads_battery"),
            ("gae", "masked_gae_battery"),
            *((op, "mixed_battery") for op in ("heads", "log_probs")),
            *((op, "surroundings_battery") for op in ("em", "heads", "gae", "log_probs")),
            *((op, "large_battery") for op in ("em", "heads", "gae")),
        }
    many = {(op, job.args[1]) for op, job in gate.jobs(whole_gate, ()) if 70 in job.args}
    assert many == {("em", 70), ("heads", 70), ("gae", 70)}


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("em", lambda device: product.margins_battery(device, 8, torch.bfloat16)),
        ("heads", lambda device: product.masked_heads_battery(device, 8, torch.bfloat16)),
        ("gae", lambda device: product.masked_gae_battery(device, 4, torch.bfloat16)),
        ("em", lambda device: gate.em_battery(device, 70, torch.float32, 1.0)),
        ("gae", lambda device: gate.gae_battery(device, 70, torch.float32)),
    ],
    ids=["margins", "masked heads", "masked gae", "em K=70", "gae K=70"],
)
def test_the_kernels_pass_the_cases_of_the_whole_gate(whole_gate, op, case):
    checks = list(case(whole_gate))
    assert len(checks) > 2
    assert [check for check in checks if not check.ok] == []


def wrong_names(checks):
    return [check.name for check in checks if not check.ok]


def test_masks_that_are_left_out(cpu, monkeypatch):
    """Every mask left out is noticed, and so is a sum over padding."""
    heads, gae = maxmin_kernels.reward_heads_min, maxmin_kernels.vector_gae

    def without(function, name):
        return lambda *args, **options: function(*args, **{k: v for k, v in options.items() if k != name})

    for name in ("head_mask", "row_mask"):
        monkeypatch.setattr(maxmin_kernels, "reward_heads_min", without(heads, name))
        assert wrong_names(product.masked_heads_battery(cpu, 5, torch.float32))
    monkeypatch.setattr(maxmin_kernels, "vector_gae", without(gae, "mask"))
    assert len(wrong_names(product.masked_gae_battery(cpu, 3, torch.float32))) > 4


def test_a_wrong_mass(cpu, monkeypatch):
    changed(monkeypatch, "em_responsibilities", lambda out: (*out[:2], out[2] * 1.0001))
    assert wrong_names(product.margins_battery(cpu, 3, torch.float32)) == ["em margins K=3 float32 mass"]


def test_what_follows_autocast_and_should_not(cpu, monkeypatch):
    right = maxmin_kernels.reward_heads_min

    def follows(hidden, *args):
        low = torch.is_autocast_enabled("cpu")
        return right(hidden.bfloat16().float() if low else hidden, *args)

    monkeypatch.setattr(maxmin_kernels, "reward_heads_min", follows)
    (name,) = wrong_names(product.surroundings_battery(cpu, "heads"))
    assert name.startswith("heads under autocast")


def test_widening_that_rounds_the_heads(cpu, monkeypatch):
    right = maxmin_kernels.reward_heads_min
    low = lambda hidden, weight: right(hidden, weight.bfloat16())  # noqa: E731
    monkeypatch.setattr(maxmin_kernels, "reward_heads_min", low)
    assert "heads mixed output 0" in wrong_names(product.mixed_battery(cpu, "heads"))


def test_offsets_that_wrap_around(cpu, monkeypatch):
    changed(monkeypatch, "vector_gae", lambda out: tuple(x.flip(0) for x in out))
    assert len(wrong_names(large.large_battery(cpu, "gae"))) == 2


def test_beyond_32_bit_offsets_where_there_is_memory(monkeypatch):
    cuda, _ = fake_device()
    cuda.type, cuda.quick, cuda.free_bytes = "cuda", False, lambda: 80 * 2**30
    seen = []
    monkeypatch.setitem(large.CASES, "gae", lambda device, elements: seen.append(elements) or iter(()))
    list(large.large_battery(cuda, "gae"))
    cuda.free_bytes = lambda: 10**9
    list(large.large_battery(cuda, "gae"))
    assert seen[0] > 2**31
    assert seen[1] < 2**12


def test_only_what_is_asked_for_is_checked(cpu):
    checks = [check for case in gate.run_gate(cpu, ("gae",), TIMED[:1]) for check in case]
    assert {check.name.split()[0] for check in checks} == {"gae"}


def changed(monkeypatch, op, change):
    """Replace an operator by one whose outputs go through ``change``."""
    right = getattr(maxmin_kernels, op)
    monkeypatch.setattr(maxmin_kernels, op, lambda *args, **options: change(right(*args, **options)))


def test_wrong_responsibilities(cpu, monkeypatch):
    changed(monkeypatch, "em_responsibilities", lambda out: (out[0] + 1e-4, out[1]))
    assert failing(cpu, "em") == {"responsibilities"}


def test_wrong_gradient_of_the_log_likelihood(cpu, monkeypatch):
    # The right value with a hundredth of a percent too large a gradient.
    changed(
        monkeypatch,
        "em_responsibilities",
        lambda out: (out[0], out[1].detach() + 1.0001 * (out[1] - out[1].detach())),
    )
    assert failing(cpu, "em") == {"gradient 0", "gradient 1"}


def test_a_wrong_last_user_of_many(cpu, monkeypatch):
    def spoil(out):
        return torch.cat([out[0][:-1], out[0][-1:].flip(-1)]), out[1]

    changed(monkeypatch, "em_responsibilities", spoil)
    checks = gate.TIMED["em"](cpu, EStep(300_000, 3))
    assert [check.name for check in checks if not check.ok] == ["em P=300000 K=3 float32 responsibilities"]


def test_the_mean_instead_of_the_minimum(cpu, monkeypatch):
    changed(monkeypatch, "reward_heads_min", lambda out: (out[0], out[0].mean(-1), *out[2:]))
    assert "output 1" in failing(cpu, "heads")


def test_the_largest_head_as_the_minimum(cpu, monkeypatch):
    changed(monkeypatch, "reward_heads_min", lambda out: (out[0], out[0].amax(-1), out[0].argmax(-1), out[3]))
    assert "argmin above the minimum" in failing(cpu, "heads")


def test_float_rounding_of_rewards_passes_and_bfloat16_rounding_of_float32_does_not(cpu, monkeypatch):
    changed(monkeypatch, "vector_gae", lambda out: (out[0] * (1 + 2e-7), out[1]))
    assert failing(cpu, "gae") == set()
    changed(monkeypatch, "vector_gae", lambda out: (out[0].bfloat16().float(), out[1]))
    assert failing(cpu, "gae") == {"output 0"}


def test_a_missing_temperature(cpu, monkeypatch):
    right = maxmin_kernels.token_log_probs
    monkeypatch.setattr(
        maxmin_kernels, "token_log_probs", lambda *args, temperature, **options: right(*args, **options)
    )
    wrong = [check.name for check in log_probs_gate.log_probs_battery(cpu, torch.float32) if not check.ok]
    assert len(wrong) == 4


def test_a_wrong_mean_of_the_advantages(cpu, monkeypatch):
    scale = torch.tensor([1.0, 1.0001, 1.0])
    changed(monkeypatch, "token_gae", lambda out: (*out[:3], out[3] * scale))
    assert failing(cpu, "token_gae") == {"output 4"}


def test_runs_that_differ_in_one_bit(cpu, monkeypatch):
    calls = []

    def unsteady(out):
        calls.append(1)
        values = out[0].clone()
        values[0, 0, 0] = torch.nextafter(values[0, 0, 0], torch.tensor(100.0 * (-1) ** len(calls)))
        return values, out[1]

    changed(monkeypatch, "vector_gae", unsteady)
    check = next(c for c in gate.gae_battery(cpu, 2, torch.float32) if "differ" in c.name)
    assert check.error > 0
    assert not check.ok


def test_not_a_number_fails():
    assert not checking.Check("x", math.nan, 1.0).ok
    assert math.isnan(checking.rms(torch.tensor([math.nan]), torch.tensor([1.0])))
    checks = [
        checking.Check("a", 0.5, 1.0),
        checking.Check("b", math.nan, 1.0),
        checking.Check("c", 2.0, 1.0),
    ]
    assert gate.closest(checks).name == "b"


def test_what_raises_is_a_failed_check(cpu, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(maxmin_kernels, "vector_gae", refuse)
    checks = [check for case in gate.run_gate(cpu, ("gae",), TIMED[3:4]) for check in case]
    assert len(checks) == 6
    assert all("raised RuntimeError: no kernel image" in c.name and not c.ok for c in checks)


@pytest.mark.parametrize(
    ("error", "elements", "bar"),
    [(1e-4, 2**14, 2e-4 + 2**-14), (0.0, 4, 2**-8), (1.0, 2**14, 8e-3), (math.nan, 9, 8e-3)],
)
def test_low_precision_may_err_twice_as_much_as_eager_pytorch(error, elements, bar):
    assert checking.low_bar(torch.bfloat16, error, elements) == pytest.approx(bar)


def test_low_precision_is_held_against_eager_pytorch_in_the_same_dtype(cpu):
    """A function that rounds thrice is within the absolute bar, and not within twice of who rounds once."""
    inputs = [checking.normal(cpu, 0, 4000).bfloat16()]

    def once(x):
        return (x * 1.37,)

    def coarse(x):
        return (x.float() * 1.37 * (1 + 6e-3),)

    value, _ = checking.compare("x", coarse, once, inputs)
    assert checking.EXACT < value.error < checking.LOW[torch.bfloat16]
    assert value.bar < checking.LOW[torch.bfloat16]
    assert not value.ok
    assert next(iter(checking.compare("x", once, once, inputs))).ok
