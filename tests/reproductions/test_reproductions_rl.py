"""The experiments of reproductions/rl, shortened, from training to the tables and the picture."""

import csv
import subprocess
import sys

import pytest
from scripts import REPRODUCTIONS

FOLDER = REPRODUCTIONS / "rl"


def run(tmp_path, *names):
    command = [sys.executable, FOLDER / "run.py", *names, "--frames", "3072"]
    command += ["--runs", tmp_path / "runs", "--output", tmp_path / "out"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "names",
    [
        ["gridworld", "deliveries-10-1"],
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
)
def test_runs_become_tables_and_a_picture_and_stay(tmp_path, names):
    done = run(tmp_path, *names)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert names == [] or [row["experiment"] for row in rows] == names
    for row in rows:
        grid = row["experiment"].startswith(("gridworld", "deliveries"))
        assert (row["visits_both"] != "") == grid
        if row["max_min"]:
            assert float(row["worst_group"]) <= float(row["max_min"]) + 1e-6
    text = (tmp_path / "out/results.md").read_text()
    assert "10 random tabular processes" in text
    assert {"gridworld.png", "gridworld.svg", "gridworld.csv"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    summary = tmp_path / "runs/gridworld/seed-0/summary.json"
    before = summary.stat().st_mtime_ns
    assert run(tmp_path, "gridworld").returncode == 0
    assert summary.stat().st_mtime_ns == before


def test_an_unknown_name(tmp_path):
    done = run(tmp_path, "gridword")
    assert done.returncode == 2
    assert "no experiment gridword" in done.stderr
    assert "Traceback" not in done.stderr
