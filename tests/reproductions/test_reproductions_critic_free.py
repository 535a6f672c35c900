"""The experiment without a critic: one budget for all, paired ratios, and all of it in small."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script

from torchrl_maxmin.evaluation.results import SeedResult

run = load_script("critic_free/run.py")


@pytest.mark.parametrize("sizes", [run.FULL, run.SMOKE], ids=["full", "smoke"])
def test_policies_differ_by_their_advantage_alone(tmp_path, sizes):
    plan = run.Plan()
    for seed in (0, 1):
        run.plan_seed(plan, sizes, tmp_path / f"seed-{seed}", seed)
    steps = {name: task.config for name, task in plan.tasks.items()}
    assert len({step.folder for step in steps.values()}) == len(steps) == 2 * (3 + len(run.POLICIES))
    for seed in (0, 1):
        configs = {policy: vars(steps[f"seed {seed}/{policy}"].config) for policy in run.POLICIES}
        free = {"output_dir", "num_generations", "advantage"}
        shared = [{k: v for k, v in config.items() if k not in free} for config in configs.values()]
        assert all(config == shared[0] for config in shared)
        assert shared[0]["seed"] == seed
        assert [c["advantage"] for c in configs.values()] == ["gae", "gae", "rloo", "grpo"]
        assert [c["num_generations"] for c in configs.values()] == [1, 4, 4, 4]


def made_results(num_seeds=3, num_prompts=60):
    """Records where rloo wins more for the worst group, and critic_4 is the critic."""
    shift = {
        "critic": [2.0, 0.5],
        "critic_4": [2.0, 0.5],
        "rloo": [1.0, 0.9],
        "grpo": [0.0, 3.0],
        "sft": [0, 0],
    }
    results = []
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(num_prompts, 2, 2))
        utilities = {name: noise + value for name, value in shift.items() if name != "sft"}
        utilities["sft"] = rng.normal(size=(num_prompts, 2, 2))
        kl = {name: np.ones((num_prompts, 2)) for name in utilities}
        results.append(SeedResult(seed, ["many", "few"], [0.9, 0.1], utilities, kl=kl))
    return results


def test_tables_hold_worst_groups_and_paired_ratios(tmp_path):
    results = made_results()
    seconds = {f"seed {s}/{policy}": 10.0 + s for s in range(3) for policy in run.POLICIES}
    path = run.write_results(results, seconds, tmp_path / "out")
    with (tmp_path / "out/results.csv").open(newline="") as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    rates = {p: np.mean([r.win_matrix(p, "sft").mean(0) for r in results], axis=0) for p in run.POLICIES}
    for policy, row in rows.items():
        assert float(row["worst group"]) == pytest.approx(rates[policy].min(), abs=1e-5)
        assert float(row["many"]) == pytest.approx(rates[policy][0], abs=1e-5)
        assert float(row["ratio"]) == pytest.approx(rates[policy].min() / rates["critic"].min(), rel=1e-5)
        assert float(row["ratio low"]) <= float(row["ratio"]) <= float(row["ratio high"])
        assert row["seconds"] == "11"
    assert rows["critic_4"]["ratio low"] == rows["critic_4"]["ratio high"] == "1"
    assert float(rows["rloo"]["ratio low"]) > 1 > float(rows["grpo"]["ratio high"])
    with (tmp_path / "out/per_seed.csv").open(newline="") as file:
        by_seed = list(csv.DictReader(file))
    assert [row["seed"] for row in by_seed] == ["0", "1", "2"]
    worst = results[1].win_matrix("rloo", "sft").mean(0).min()
    assert float(by_seed[1]["rloo"]) == pytest.approx(worst, abs=1e-5)
    text = path.read_text()
    assert f"| rloo | {rates['rloo'][0]:.3f} [" in text
    assert "seeds 0, 1, 2" in text


@pytest.mark.slow
def test_the_whole_in_small_and_again_without_work(tmp_path):
    script = str(Path(run.__file__))
    command = [sys.executable, script, "--smoke", "--seeds", "0", "--runs_dir", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        results = tmp_path / "runs" / "results"
        assert done.stdout.splitlines()[-1] == f"critic_free done: {results / 'results.md'}"
        marks = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("done.json")}
        assert len(marks) == 3 + len(run.POLICIES)
    assert {path: path.stat().st_mtime_ns for path in marks} == marks
