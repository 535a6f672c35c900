"""Results as files and tables: one folder a device with ``kernels.csv`` and ``environment.json``."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .bars import Verdict, judge
from .baselines import LIBRARIES
from .device import Device
from .measure import Machine, Row

CSV, ENVIRONMENT, PLOT = "kernels.csv", "environment.json", "kernels.png"


def commit() -> str:
    """Return the commit, marked if tracked files differ from it; ``COMMIT`` says it where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def version(package: str) -> str:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(device: Device) -> dict[str, Any]:
    """Return what a reader must know to repeat the run."""
    return {
        **device.facts(),
        "type": device.type,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "left out": [f"{name} is not installed" for name, there in LIBRARIES.items() if not there],
    }


def folder_name(device: str, quick: bool, only: Sequence[str]) -> str:
    """Return the device's name in lower case and dashes; a partial run is a folder of its own."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "device"
    return "-".join([slug, *only, *(["quick"] if quick else [])])


def check_folder(folder: Path, device: str) -> None:
    """Raise if the folder holds the results of another device.

    Raises:
        FileExistsError: If it does.
    """
    if (folder / ENVIRONMENT).exists():
        other = read_environment(folder)["device"]
        if other != device:
            raise FileExistsError(
                f"{folder} holds results of {other}, not of {device}; give another --output."
            )


def write_csv(folder: Path, rows: Sequence[Row]) -> None:
    """Write one line a measurement."""
    names = [field.name for field in dataclasses.fields(Row)]
    with (folder / CSV).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in vars(row).items()})


def read_csv(folder: Path) -> list[Row]:
    """Read back what :func:`write_csv` wrote."""
    kinds = typing.get_type_hints(Row)
    rows = []
    with (folder / CSV).open(newline="") as file:
        for record in csv.DictReader(file):
            rows.append(Row(**{name: _parse(kinds[name], text) for name, text in record.items()}))
    return rows


def _parse(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    number = int if kind == int | None else float
    return number(text) if text else None


def write_environment(folder: Path, stated: dict[str, Any], machine: Machine, gate: dict[str, Any]) -> None:
    """Write the machine, what it was measured to do, and the gate's outcome."""
    rates = {"copy_bytes_per_second": machine.copy, "gemm_flops_per_second": machine.gemm}
    (folder / ENVIRONMENT).write_text(json.dumps({**stated, **rates, "gate": gate}, indent=2) + "\n")


def read_environment(folder: Path) -> dict[str, Any]:
    """Read back what :func:`write_environment` wrote."""
    return json.loads((folder / ENVIRONMENT).read_text())


# ---------------------------------------------------------------- tables

HEADER = (
    "op",
    "size",
    "dtype",
    "direction",
    "implementation",
    "wall",
    "device",
    "peak",
    "of copy",
    "of GEMM",
    "x ours",
)
BARS_HEADER = ("bar", "measured", "wanted", "outcome")


def duration(us: float | None) -> str:
    """Return a time in the unit that suits it."""
    if us is None:
        return ""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            return f"{us / factor:.3g} {unit}"
    return f"{us:.3g} us"


def megabytes(nbytes: int | None) -> str:
    """Return bytes in megabytes."""
    return "" if nbytes is None else f"{nbytes / 1e6:.3g} MB"


def flop_rate(rate: float) -> str:
    """Return operations per second in the unit that suits it."""
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "" if share is None else f"{100 * share:.0f}%"


def cells(row: Row) -> tuple[str, ...]:
    """Return a measurement as text, a missing one with its reason."""
    measured = (
        duration(row.wall_us) or row.note,
        duration(row.device_us),
        megabytes(row.peak_bytes),
        percent(row.share_of_copy),
        percent(row.share_of_gemm),
        "" if row.ratio_to_ours is None else f"{row.ratio_to_ours:.2f}",
    )
    return (row.op, row.size, row.dtype, row.direction, row.implementation, *measured)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of one workload and direction together, in the order of their first measurement."""
    rows = list(rows)
    groups = list(dict.fromkeys((r.op, r.size, r.dtype, r.direction) for r in rows))
    return sorted(rows, key=lambda r: groups.index((r.op, r.size, r.dtype, r.direction)))


def verdict_cells(verdict: Verdict) -> tuple[str, ...]:
    """Return a bar as text."""
    value = "" if verdict.value is None else f"{verdict.value:.3g}"
    return (verdict.text, value, f"{verdict.relation} {verdict.limit:g}", verdict.outcome)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print with rich if it is installed, else in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
        print(title)
        for line in (header, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    # A log file has no width of its own: do not cut its lines at 80 columns.
    console = Console()
    console.width = max(console.width, 170)
    console.print(table, markup=False)


def print_results(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Print all measurements and all bars."""
    print_table("Kernels", HEADER, [cells(row) for row in in_order(rows)])
    print_table("Bars", BARS_HEADER, [verdict_cells(v) for v in verdicts])


def markdown_report(folder: Path) -> str:
    """Return the Markdown tables of a folder: what ran where, measurements, bars."""
    stated, rows = read_environment(folder), read_csv(folder)
    threads = f", {stated['threads']} threads" if "threads" in stated else f", driver {stated['driver']}"
    gemm = ", ".join(f"{flop_rate(rate)} {dtype}" for dtype, rate in stated["gemm_flops_per_second"].items())
    about = (
        f"{stated['device']}{threads}, torch {stated['torch']}, triton {stated['triton']}, "
        f"Python {stated['python']}, commit {stated['commit']}; measured: copy "
        f"{stated['copy_bytes_per_second'] / 1e9:.4g} GB/s, matrix product {gemm}."
    )
    measured = markdown(HEADER, [cells(row) for row in in_order(rows)])
    bars = markdown(BARS_HEADER, [verdict_cells(verdict) for verdict in judge(stated["type"], rows)])
    return "\n\n".join([about, measured, bars])
