"""A quick run from the command line to the files, and what it does when something is missing or wrong."""

import csv
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import kernel_bench.measure as measure_module
import maxmin_kernels
import pytest
import torch
from kernel_bench import baselines, report
from kernel_bench.measure import Row, run
from kernel_bench.workloads import GAE, EStep, Heads, Implementation, LogProbs, TokenGAE

ROOT = Path(__file__).parents[2]
QUICK = ["--device", "cpu", "--quick", "--threads", "1"]


def test_a_quick_run_writes_its_files(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(baselines.LIBRARIES, "torchrl", False)
    assert script.main([*QUICK, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-quick")

    stated = json.loads((folder / "environment.json").read_text())
    assert stated["torch"] == torch.__version__
    assert stated["threads"] == 1
    assert stated["copy_bytes_per_second"] > 1e8
    assert stated["gemm_flops_per_second"]["float32"] > 1e8
    assert set(stated["gate"]) == {"em", "heads", "min", "gae", "token_gae", "log_probs"}
    assert "torchrl is not installed" in stated["left out"]

    with (folder / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = {(r["op"], r["direction"], r["implementation"]) for r in rows if r["wall_us"]}
    for op in ("em", "heads", "log_probs"):
        for direction in ("forward", "backward", "both"):
            assert {(op, direction, "ours"), (op, direction, "eager")} <= measured
    assert {
        ("gae", "forward", "ours"),
        ("token_gae", "forward", "eager"),
        ("heads", "both", "eager, K linears"),
    } <= measured
    assert {r["op"] for r in rows if r["direction"] == "host"} == {
        "em_responsibilities",
        "reward_heads_min",
        "min_over_heads",
        "vector_gae",
        "token_gae",
        "token_log_probs",
    }
    for r in rows:
        assert r["note"] == ""
        assert float(r["wall_p20_us"]) <= float(r["wall_us"]) <= float(r["wall_p80_us"])
        if r["direction"] != "host":
            moved = float(r["floor_bytes"]) / (float(r["wall_us"]) / 1e6)
            assert float(r["share_of_copy"]) == pytest.approx(
                moved / stated["copy_bytes_per_second"], rel=1e-3
            )
            assert int(r["peak_bytes"]) > 0
    assert (folder / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    assert "[1/" in printed
    assert "not measured" in printed

    (folder / "kernels.png").unlink()
    assert script.main(["--plot-only", "--output", str(tmp_path)]) == 0
    assert (folder / "kernels.png").exists()
    capsys.readouterr()
    assert script.main(["--markdown", "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| op | size | dtype |" in table
    assert "| E-step 1e6 pairs: eager / ours |" in table


def test_a_wrong_kernel_stops_the_run_before_timing(script, tmp_path, capsys, monkeypatch):
    right = maxmin_kernels.vector_gae

    def wrong(*args, **options):
        advantage, target = right(*args, **options)
        return advantage * 1.001, target

    monkeypatch.setattr(maxmin_kernels, "vector_gae", wrong)
    assert script.main([*QUICK, "--only", "gae", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG gae" in printed
    assert "nothing is timed" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_gate_alone(script, tmp_path, capsys):
    assert script.main([*QUICK, "--only", "log_probs", "--gate-only", "--output", str(tmp_path)]) == 0
    assert "checks hold" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--markdown", "--output", "."]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "no results in .\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_one_folder_a_device(tmp_path):
    assert report.folder_name("NVIDIA H200 (SXM)", False, []) == "nvidia-h200-sxm"
    assert report.folder_name("AMD EPYC", True, ["em", "gae"]) == "amd-epyc-em-gae-quick"
    (tmp_path / "environment.json").write_text(json.dumps({"device": "A-1"}))
    report.check_folder(tmp_path, "A-1")
    with pytest.raises(FileExistsError, match="results of A-1, not of A 1"):
        report.check_folder(tmp_path, "A 1")


def test_the_csv_comes_back_as_it_was(tmp_path):
    rows = [
        Row(
            "em", "P=1e6 K=4", "float32", "forward", "ours", 1.5, 1.0, 2.0, 1.25, 10**9, 7, 8, 0.5, 0.25, 1.0
        ),
        Row("em", "P=1e6 K=4", "float32", "forward", "eager", note="failed: out of memory, or so"),
    ]
    report.write_csv(tmp_path, rows)
    assert report.read_csv(tmp_path) == rows


class Small(EStep):
    """An E-step with baselines that fail in every way."""

    def implementations(self):
        ours = super().implementations()[0]

        def broken(inputs):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

        def wrong(inputs):
            resp, likelihood = ours.call(inputs)
            return resp, 1.1 * likelihood

        return [
            ours,
            Implementation("broken", broken),
            Implementation("wrong", wrong),
            Implementation("absent", broken, library="liger_kernel"),
            Implementation("late", ours.call, compile_mode="default"),
            Implementation("unwanted", ours.call, compile_mode="max-autotune-no-cudagraphs"),
        ]


def test_what_fails_is_told_and_the_rest_is_measured(cpu, monkeypatch):
    monkeypatch.setitem(measure_module.LIBRARIES, "liger_kernel", False)
    lines = []
    rows = list(run(cpu, [Small(300, 2)], ("default",), -1.0, lines.append))
    notes = {(r.implementation, r.direction): r.note for r in rows}
    assert notes[("ours", "forward")] == ""
    for direction in ("forward", "backward", "both"):
        assert notes[("broken", direction)] == "failed: out of memory"
        assert notes[("wrong", direction)] == "failed: ArithmeticError: output 1 differs from ours by 1.0e-01"
        assert notes[("late", direction)] == "skipped: time budget spent"
    assert {r.implementation for r in rows} == {"ours", "broken", "wrong", "late"}
    assert len(lines) == len(rows)
    assert "[2/4] em P=300 K=2 float32 forward broken: failed: out of memory" in lines


def test_compiled_baselines_are_traced_and_measured(cpu, monkeypatch):
    compile_for = functools.partial(torch.compile, backend="aot_eager")  # inductor takes half a minute
    monkeypatch.setattr(torch, "compile", lambda call, dynamic, mode: compile_for(call, dynamic=dynamic))
    rows = list(run(cpu, [Heads(32, 16, 3)], ("default",), math.inf, lambda line: None))
    compiled = [r for r in rows if r.implementation == "torch.compile default"]
    assert len(compiled) == 3
    assert all(r.note == "" and r.wall_us for r in compiled)


@pytest.mark.parametrize(
    "workload",
    [EStep(900, 3, skew=0.1), Heads(33, 16, 5), GAE(3, 20, 2), TokenGAE(3, 20, 2), LogProbs(9, 8, 40)],
    ids=lambda w: w.op,
)
def test_every_baseline_that_is_here_computes_the_same(cpu, workload):
    for implementation in workload.implementations():
        if measure_module.is_wanted(implementation, ()):
            measure_module.compare_with_ours(cpu, workload, implementation)


def test_workloads_shrink_until_they_fit(script, cpu, monkeypatch):
    args = script.parse(["--device", "cpu", "--only", "em"])
    monkeypatch.setattr(cpu, "free_bytes", lambda: 2 * EStep(10**6, 4).working_bytes())
    sizes = [w.size for w in script.chosen_workloads(args, cpu)]
    assert sizes == ["P=1e6 K=4", "P=1.25e6 K=4"]
