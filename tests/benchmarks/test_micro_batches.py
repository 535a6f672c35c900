"""The memory benchmark of micro-batches runs, and a micro-batch needs less than the whole."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "micro_batches.py"


def test_quick_mode_measures_both_sizes():
    command = [sys.executable, str(SCRIPT), "--quick", "--device", "cpu"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    whole, part = (float(line.split()[-1]) for line in result.stdout.splitlines()[-2:])
    assert whole == 1.0
    assert 0 < part < 0.9
