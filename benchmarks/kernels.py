"""Microbenchmarks of the kernels: right first, then fast, against what one would write without them.

    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --device cpu --only em gae --quick
    python benchmarks/kernels.py --only log_probs --chunk 256 512 1024 2048 4096
    python benchmarks/kernels.py --markdown        # tables of all results that are there
    python benchmarks/kernels.py --plot-only       # their pictures

Every operator, dtype and size is held against float64 before anything is timed; if one is wrong, the exit
status is 1 and nothing is timed. Timings are no tests: a missed bar is printed and changes nothing. Results
go to one folder a device under --output.
"""

import argparse
import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_bench import bars, report
from kernel_bench.device import Device, copy_bandwidth, gemm_rate, make_device
from kernel_bench.gate import Check, closest, run_gate, worst_by_op
from kernel_bench.host import host_rows
from kernel_bench.measure import Machine, Row, compare, run
from kernel_bench.sizes import cpu_workloads, cuda_workloads
from kernel_bench.workloads import AUTOTUNED, DEFAULT, LogProbs, Workload, dtype_name

RESULTS = Path(__file__).parent / "results"
OPS = ("em", "heads", "gae", "token_gae", "log_probs")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--only", nargs="+", choices=OPS, default=[], help="operators, all by default")
    add("--quick", action="store_true", help="small sizes: shows that everything runs")
    add("--threads", type=int, default=2, help="CPU threads")
    add(
        "--compile",
        choices=("none", "default", "autotune"),
        help="torch.compile baselines: none for --quick, default on a CPU, autotune (both modes) on a GPU",
    )
    add(
        "--budget",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="compiled baselines that have not begun by then, counted from the start, are skipped",
    )
    add("--chunk", nargs="+", type=int, default=[], metavar="N", help="log-probs with N tokens a chunk, too")
    add("--output", type=Path, default=RESULTS)
    add("--gate-only", action="store_true", help="time nothing")
    add("--plot-only", action="store_true", help="draw the pictures of the results that are there")
    add("--markdown", action="store_true", help="print the tables of the results that are there")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device; use --device cpu")
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    if any(size < 1 for size in args.chunk):
        parser.error("--chunk takes tokens, at least 1")
    if args.compile is None:
        args.compile = "none" if args.quick else "autotune" if args.device == "cuda" else "default"
    return args


def chosen_workloads(args: argparse.Namespace, device: Device) -> list[Workload]:
    """Return the sizes of the chosen operators, halved until they fit into memory."""
    sizes = cuda_workloads(args.quick) if args.device == "cuda" else cpu_workloads(args.quick)
    free = 0.8 * device.free_bytes()
    fitting = []
    for workload in sizes:
        if args.only and workload.op not in args.only:
            continue
        if isinstance(workload, LogProbs):
            workload = dataclasses.replace(workload, chunks=tuple(args.chunk))
        while workload.working_bytes() > free and (smaller := workload.smaller()) is not None:
            workload = smaller
        fitting.append(workload)
    return fitting


def pass_gate(device: Device, ops: Sequence[str], workloads: Sequence[Workload]) -> dict[str, Any] | None:
    """Run the equivalence gate; returns its summary, or None after saying what failed."""
    checks: list[Check] = []
    for case in run_gate(device, ops, workloads):
        checks += case
        worst = closest(case)
        print(
            f"gate: {len(case)} checks, closest {worst.name}: {worst.error:.1e} of {worst.bar:.1e}",
            flush=True,
        )
        for check in case:
            if not check.ok:
                print(f"WRONG {check.name}: error {check.error:.2e}, bar {check.bar:.2e}", flush=True)
    summary = worst_by_op(checks)
    for op, facts in summary.items():
        bar = f"{facts['closest']}, {facts['error']:.1e} of {facts['bar']:.1e}"
        print(f"gate: {op}: {facts['checks']} checks, closest to its bar: {bar}")
    wrong = sum(not check.ok for check in checks)
    if wrong:
        print(f"gate: {wrong} of {len(checks)} checks failed, nothing is timed; --only leaves operators out")
        return None
    print(f"gate: all {len(checks)} checks hold", flush=True)
    return summary


def measure_machine(device: Device) -> Machine:
    """Measure what a copy and a matrix product reach, and say it."""
    gemm = {dtype_name(dtype): gemm_rate(device, dtype) for dtype in device.dtypes}
    machine = Machine(copy_bandwidth(device), gemm)
    device.clear()
    rates = ", ".join(f"{dtype} {report.flop_rate(rate)}" for dtype, rate in gemm.items())
    print(f"copy {machine.copy / 1e9:.1f} GB/s; matrix product {rates}", flush=True)
    return machine


def draw(folder: Path) -> None:
    """Draw the picture, if that is possible here."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed; --plot-only draws it later from the CSV")
        return
    from kernel_bench.plot import plot_folder

    print(f"picture: {plot_folder(folder)}")


def benchmark(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    device = make_device(args.device, args.threads, args.quick)
    stated = report.environment(device)
    folder = args.output / report.folder_name(stated["device"], args.quick, args.only)
    report.check_folder(folder, stated["device"])
    for name, value in stated.items():
        print(f"{name}: {value}")
    workloads = chosen_workloads(args, device)
    gate = pass_gate(device, args.only or OPS, workloads)
    if gate is None:
        return 1
    if args.gate_only:
        return 0
    machine = measure_machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    report.write_environment(folder, stated, machine, gate)
    modes = {"none": (), "default": DEFAULT, "autotune": AUTOTUNED}[args.compile]
    rows: list[Row] = list(host_rows(device))
    left = args.budget - (time.perf_counter() - start)
    for row in run(device, workloads, modes, left, lambda line: print(line, flush=True)):
        rows.append(row)
        # A run that is cut off keeps what it has measured.
        compare(rows, machine)
        report.write_csv(folder, rows)
    report.print_results(rows, bars.judge(args.device, rows))
    print(f"results: {folder}")
    draw(folder)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not (args.plot_only or args.markdown):
        return benchmark(args)
    folders = sorted(path.parent for path in args.output.glob(f"*/{report.ENVIRONMENT}"))
    if not folders:
        print(f"no results in {args.output}", file=sys.stderr)
        return 2
    for folder in folders:
        if args.plot_only:
            draw(folder)
        if args.markdown:
            print(report.markdown_report(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
