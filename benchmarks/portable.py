"""Run the tests of the rooms with arithmetic as other processors would run them.

    python benchmarks/portable.py [--rooms welfare trainers] [--cells avx2-1] [--logs DIR]

A cell is an instruction set that this processor has (PyTorch's kernels, the matrix products of MKL, oneDNN
and OpenBLAS, and NumPy's loops are all held to it) and a number of threads. What a test session found is read
off its own header, so a setting that did not take fails the cell. The exit status is 1 if a cell fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "kernels",
    "objectives",
    "welfare",
    "models",
    "clustering",
    "stats",
    "rewards",
    "trainers",
    "evaluation",
    "envs",
    "collectors",
]
THREADS = (1, 2)
# what is compiled, interpreted or in processes of its own sees nothing of the cell, and takes minutes
LEFT_OUT = "not interpreter and not builds and not left_on and not compile and not processes"
# for every level: PyTorch's name, MKL's, oneDNN's, OpenBLAS's, and which of NumPy's features go
LEVELS = {
    "default": ("DEFAULT", "SSE4_2", "SSE41", "Nehalem", r"."),
    "avx2": ("AVX2", "AVX2", "AVX2", "Haswell", r"512|V4"),
    "avx512": ("AVX512", "AVX512", "AVX512_CORE", "SkylakeX", r"(?!)"),
}
HEADER = re.compile(r"^arithmetic: (\S+), (\d+) threads?, product (\S+)$", re.M)


class Cell(NamedTuple):
    """One way to compute: its name, the number of threads, what PyTorch should say, and the environment."""

    name: str
    threads: int
    capability: str
    environment: dict[str, str]


class Outcome(NamedTuple):
    """What a test session came to; ``product`` tells one way to multiply matrices from another."""

    passed: int
    failed: int
    product: str
    seconds: float
    complaints: list[str]


def cells() -> Iterator[Cell]:
    """Yield every cell that this processor has; one that is none of x86's is taken as it is."""
    import numpy as np
    import torch

    native = torch.backends.cpu.get_cpu_capability()
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    known = [capability for capability, *_ in LEVELS.values()]
    names = list(LEVELS)[: known.index(native) + 1] if native in known else []
    for threads in THREADS:
        counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHRL_MAXMIN_THREADS")
        # waiting threads sleep: where cores are shared, those that spin take them from those that work
        count = {**dict.fromkeys(counts, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}
        if not names:
            yield Cell(f"native-{threads}", threads, native, count)
        for name in names:
            capability, mkl, onednn, openblas, gone = LEVELS[name]
            held = {
                "ATEN_CPU_CAPABILITY": name,
                "MKL_ENABLE_INSTRUCTIONS": mkl,
                "ONEDNN_MAX_CPU_ISA": onednn,
                "OPENBLAS_CORETYPE": openblas,
                "NPY_DISABLE_CPU_FEATURES": " ".join(f for f in features if re.search(gone, f)),
            }
            yield Cell(f"{name}-{threads}", threads, capability, count | held)


def run(cell: Cell, folders: list[str], log: Path, extra: list[str]) -> Outcome:
    """Run one test session, its output into ``log``."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    command += ["-n", "2", "--dist", "loadfile"]
    # the same random examples in every cell: a red one can be run again
    command += ["--hypothesis-seed=0", *folders, *extra]
    start = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, env=os.environ | cell.environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    seconds = time.perf_counter() - start
    text = log.read_text()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", text.strip().split("\n")[-1])}
    header = HEADER.search(text)
    complaints = re.findall(r"^(?:FAILED|ERROR) .*", text, re.M)
    if not header or (header[1], int(header[2])) != (cell.capability, cell.threads):
        found = header[0] if header else "no header"
        complaints.append(f"asked for {cell.capability} and {cell.threads} threads, found {found}")
    if code and not complaints:
        complaints.append(f"pytest ended with status {code}")
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return Outcome(counts.get("passed", 0), failed, header[3] if header else "-", seconds, complaints)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help="folders of tests/, or files")
    parser.add_argument("--cells", nargs="+", help="some of the cells, by name")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "portable")
    given, extra = parser.parse_known_args(arguments)  # the rest is pytest's
    os.environ.pop("ATEN_CPU_CAPABILITY", None)  # it would hide what there is
    every = list(cells())
    names = [cell.name for cell in every]
    if not set(given.cells or names) <= set(names):
        parser.error(f"the cells here are {', '.join(names)}")
    folders = [room if Path(room).exists() else f"tests/{room}" for room in given.rooms]
    given.logs.mkdir(parents=True, exist_ok=True)
    red: dict[str, list[str]] = {}
    print(f"{'cell':<12}{'passed':>8}{'failed':>8}{'seconds':>9}  product", flush=True)
    for cell in every:
        if cell.name not in (given.cells or names):
            continue
        found = run(cell, folders, given.logs / f"{cell.name}.txt", extra)
        print(
            f"{cell.name:<12}{found.passed:>8}{found.failed:>8}{found.seconds:>9.0f}  {found.product}",
            flush=True,
        )
        if found.complaints:
            red[cell.name] = found.complaints
    for name, complaints in red.items():
        for complaint in complaints:
            print(f"{name}: {complaint}")
    print(f"logs: {given.logs}")
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
