"""The benchmark of memory over time runs, and its verdict is that of its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory_over_time.py"


def test_an_environment_is_measured(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--iterations", "100", "--kinds", "environment"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--output", str(out)], capture_output=True, text=True, env=environment, check=False
    )
    assert out.is_file(), result.stderr[-2000:]
    row = json.loads(out.read_text())["environment"]
    assert row["iterations"] == 100
    assert row["memory_early_mb"] > 100  # of a process with torch
    assert row["files_early"] >= 3
    flat = row["memory_late_mb"] <= 1.02 * row["memory_early_mb"] and row["files_late"] <= row["files_early"]
    assert row["flat"] == flat
    assert result.returncode == (0 if flat else 1)
