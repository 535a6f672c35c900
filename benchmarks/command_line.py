"""CPU time of what a user types before any work: help of every verb, the version, a look at 100 pairs.

    python benchmarks/command_line.py             # prints, and writes results/PROCESSOR/command_line.json

Each is a whole process, user and system time of it and its children, median of the repeats. A missed bar is
exit status 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from facts import child_environment, facts, results_file, write

from torchrl_maxmin.cli.main import OTHERS, STAGES

#: CPU seconds
BARS = {"help": 0.5, "data check": 1.5}


def cpu_seconds(words: list[str]) -> float:
    """CPU seconds of a command, whose exit must be 0."""
    command = [sys.executable, "-m", "torchrl_maxmin", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, env=child_environment(), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    rows = folder / "pairs.jsonl"
    pairs = (
        {"prompt": f"p{i % 20}", "chosen": f"good {i}", "rejected": f"bad {i}", "user_id": f"u{i % 7}"}
        for i in range(100)
    )
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    forms = [[verb] for verb in [*STAGES, *OTHERS]] + [["ppo", "--env_id", "gridworld"]]
    helps = {" ".join([*form, "--help"]): [*form, "--help"] for form in forms}
    whole = {f"{verb} --help-all": [verb, "--help-all"] for verb in STAGES}
    others = {"usage": [], "--version": ["--version"], "recipes": ["recipes"]}
    return helps | whole | others | {"data check, 100 pairs": ["data", "check", str(rows)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="json file (default: in results/PROCESSOR/)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        timed = {
            name: [cpu_seconds(words) for _ in range(given.repeats)]
            for name, words in commands(Path(folder)).items()
        }
    medians = {name: round(statistics.median(seconds), 3) for name, seconds in timed.items()}
    missed = 0
    for name, median in medians.items():
        bar = BARS["data check" if name.startswith("data check,") else "help"]
        missed += median > bar
        print(f"{name:<28}{median:6.3f} s of at most {bar} s{'' if median <= bar else '   MISSED'}")
    content = {"environment": facts("datasets", "jsonargparse"), "repeats": given.repeats, "bars": BARS}
    write(given.output or results_file("command_line.json"), content | {"median_cpu_seconds": medians})
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
