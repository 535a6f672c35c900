"""The benchmarks of kills, damage and shared folders run, and find nothing where little is tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FEW = {
    "kills.py": ["--verbs", "environment", "--kills", "2", "--chosen", "2"],
    "damage.py": ["--cases", "resume environment", "prompts", "--count", "6"],
    "run_folders.py": ["--verbs", "environment", "--pairs", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", FEW)
def test_a_few_faults_leave_nothing_behind(tmp_path, script):
    out = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), *FEW[script], "--output", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads(out.read_text())["results"]
    assert results
    assert all(result["missed"] == [] for result in results.values())
