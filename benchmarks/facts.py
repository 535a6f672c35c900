"""What benchmarks of whole processes share: the machine, prompts, peaks, medians with intervals, results.

Nothing here imports transformers, which would take the script ``kernels.py`` beside this file for the package
of that name; what does runs in processes of its own, from ``contestants/``.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel_bench.device import cpu_name
from kernel_bench.report import commit, folder_name, version

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONTESTANTS = HERE / "contestants"
PACKAGES = ("torch", "transformers", "peft", "tensordict", "torchrl")


def facts(*packages: str, threads: int | None = None) -> dict[str, Any]:
    """What a reader must know to repeat a run: processor, versions, commit."""
    versions = {name: version(name) for name in (*PACKAGES, *packages)}
    here = {"processor": cpu_name(), "cores": os.cpu_count(), "threads": threads}
    return here | {"python": platform.python_version(), **versions, "commit": commit()}


def results_file(name: str) -> Path:
    """``results/PROCESSOR/name``, its folder made."""
    folder = HERE / "results" / folder_name(cpu_name(), False, [])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def write(path: Path, content: dict[str, Any]) -> None:
    """Write json."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def child_environment(root: Path = ROOT, threads: int | None = None, **more: str) -> dict[str, str]:
    """The environment of a process that runs the package of a checkout, and finds the rewards."""
    paths = [*map(str, (root / "kernels", root, CONTESTANTS)), os.environ.get("PYTHONPATH", "")]
    quiet = {"TORCHRL_MAXMIN_QUIET": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return os.environ | quiet | more | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def peak_of(command: Sequence[str], root: Path = ROOT, threads: int | None = None) -> tuple[float, str]:
    """Run a command in a process of its own; returns its peak in bytes, and what it wrote.

    Raises:
        RuntimeError: with the end of its output, where it fails.
    """
    with subprocess.Popen(
        [sys.executable, "-B", *command],
        env=child_environment(root, threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=root,
        text=True,
    ) as child:
        output = child.stdout.read() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(output[-2000:])
    return usage.ru_maxrss * 1024.0, output


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    found: list[str] = []
    for name, value in flags.items():
        found += (
            [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value).lower()]
        )
    return found


def prompts(count: int = 64) -> list[str]:
    """Texts that are all different."""
    topics = ["the sea", "my old house", "a long film", "winter", "the new school", "bread", "a quiet town"]
    pairs = [(topics[i % 7], topics[(3 * i + 2) % 7]) for i in range(count)]
    return [f"Review {i}: I thought about {one} and {two}, and" for i, (one, two) in enumerate(pairs)]


def write_prompts(path: Path, count: int = 64) -> None:
    """Write prompts as the package reads them."""
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(count)))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """The median, with the interval between two order statistics that needs no distribution.

    Returns:
        ``median``, ``low``, ``high``, and ``confidence``, which the interval has: at least what was asked
        for, or less where all values together give less.

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        {'median': 3.5, 'low': 1.0, 'high': 6.0, 'confidence': 0.96875}
    """
    ordered, n = sorted(values), len(values)
    outside, drop = 2 * 0.5**n, 0  # the probability that the median is beyond the ends
    while drop + 1 < n / 2:
        wider = outside + 2 * math.comb(n, drop + 1) * 0.5**n
        if wider > 1 - confidence:
            break
        outside, drop = wider, drop + 1
    ends = {"low": ordered[drop], "high": ordered[-1 - drop]}
    return {"median": statistics.median(values), **ends, "confidence": 1 - outside}
