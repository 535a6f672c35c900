"""Run the numeric rooms as on other processors: every instruction set that this one has, one thread and two.

    python tests/portable.py [pytest's arguments]

Prints a line a cell as it ends, and where the logs are. Exit status 1 if a cell fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = (
    "kernels",
    "objectives",
    "welfare",
    "modules",
    "rewards",
    "trainers",
    "evaluation",
    "envs",
    "collectors",
)
#: what reads its instruction set from where; ATen's own variable reaches neither MKL's products nor oneDNN's
LEVELS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
THREADS = (1, 2)
# the interpreter and the compiler see nothing of the instruction set
LEFT_OUT = "not interpreter and not builds and not left_on and not compile and not processes"


def capability(settings: dict[str, str]) -> str:
    """The instruction set that torch takes under these variables."""
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    found = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True)
    return found.stdout.strip().lower()


def available() -> list[str]:
    """The levels that this processor has: asked for one that it lacks, torch takes another."""
    return [name for name, settings in LEVELS.items() if capability(settings) == name]


def run_cell(level: str, threads: int, log: Path, arguments: list[str]) -> tuple[int, str]:
    """Run the rooms in one cell; returns pytest's exit status and its last line."""
    settings = LEVELS[level] | {"OMP_NUM_THREADS": str(threads), "TORCHRL_MAXMIN_THREADS": str(threads)}
    rooms = [str(ROOT / "tests" / room) for room in ROOMS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not slow",
        "-k",
        LEFT_OUT,
        "-q",
        "-n",
        "2",
        "--dist",
        "loadfile",
        *rooms,
        *arguments,
    ]
    with log.open("w") as file:
        status = subprocess.run(
            command, env=os.environ | settings, stdout=file, stderr=file, cwd=ROOT
        ).returncode
    lines = log.read_text().splitlines()
    return status, next(
        (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no test"
    )


def main(arguments: list[str]) -> int:
    """Run every cell."""
    folder = ROOT / "build" / "portable"
    folder.mkdir(parents=True, exist_ok=True)
    write = sys.stdout.write
    failed = 0
    write(f"{'instructions':<14}{'threads':<9}{'minutes':<9}result\n")
    for level in available():
        for threads in THREADS:
            start = time.perf_counter()
            status, line = run_cell(level, threads, folder / f"{level}-{threads}.log", arguments)
            failed += status != 0
            line = re.sub(r" in [\d.]+s.*", "", line.strip("= "))
            write(f"{level:<14}{threads:<9}{(time.perf_counter() - start) / 60:<9.1f}{line}\n")
            sys.stdout.flush()
    write(f"{'all cells passed' if not failed else f'{failed} cell(s) failed'}; logs: {folder}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
