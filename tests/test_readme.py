"""What the README tells a reader to run is run, word for word."""

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_maxmin.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

TINY_RECIPE = """
world: {num_texts: 200, num_prompts: 80, num_test_prompts: 12}
sft: {max_steps: 4, per_device_train_batch_size: 16, learning_rate: 5.0e-3, max_length: 64}
reward: {num_rounds: 2, steps_per_round: 3, per_device_train_batch_size: 16, learning_rate: 1.0e-3}
ppo: {num_iterations: 2, rollout_batch_size: 16, num_ppo_epochs: 1, mini_batch_size: 8,
      calibration_prompts: 16, response_length: 24, max_prompt_length: 16}
evaluate: {num_samples: 2, response_length: 24, max_prompt_length: 16,
           certificate_prompts: 4, certificate_samples: 8}
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:30])
def test_python_block_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_first_block_names_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = blocks("bash")[0].split("\n")[:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)


def test_by_hand_block_runs_after_a_demo(tmp_path, monkeypatch):
    """The demo's own files, at a small size, then every line of the block and the diagnosis in a shell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    arguments = ["--recipe", "recipe.yaml", "--num_users", "24", "--pairs_per_user", "6", "--num_groups", "2"]
    assert main(["demo", *arguments, "--policies", "single", "maxmin"]) == 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -euo pipefail\n" + blocks("bash")[1] + blocks("bash")[2]
    run = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "group" not in (tmp_path / "pairs.jsonl").read_text()
    by_hand = (tmp_path / "mine/maxmin/model.safetensors").read_bytes()
    assert by_hand == (tmp_path / "runs/demo/seed-0/maxmin/model.safetensors").read_bytes()
    assert (tmp_path / "mine/results/report.md").is_file()
    assert (tmp_path / "mine/results/figures/win_rates.png").is_file()
    assert "# What one reward costs these users" in (tmp_path / "mine/diagnosis/report.md").read_text()


def test_diff_is_what_stands_between_the_two_examples():
    plain, maxmin = (
        text[text.index("import argparse") :].splitlines()
        for text in ((ROOT / f"examples/ppo_{name}.py").read_text() for name in ("plain", "maxmin"))
    )
    lines = difflib.unified_diff(plain, maxmin, n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    assert blocks("diff")[0].splitlines() == changed


def test_environment_block_trains(tmp_path, monkeypatch):
    """The command as it stands, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    words = re.sub("--total_frames [0-9]+", "--total_frames 12288", blocks("bash")[3]).split()
    assert words[:3] == ["torchrl-maxmin", "ppo", "--env_id"]
    assert main(words[1:]) == 0
    assert json.loads((tmp_path / "runs/tree/summary.json").read_text())["certificate"]["value"] > 0


@pytest.mark.parametrize("target", re.findall(r"make ([a-z-]+)", README))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_results_are_those_of_summary_json():
    """The table prints ``low`` and ``high``, the interval to read."""
    summary = json.loads((ROOT / "reproductions/demo-10-1/summary.json").read_text())
    rows = re.findall(
        r"^\| \**([\w ]*?)\** \| (\d\.\d+ \[.*?\]) \| (\d\.\d+ \[.*?\]) \| (.*) \|$", README, re.MULTILINE
    )
    names = {"single reward": "single", "MaxMin": "maxmin", "MaxMin on the true utilities": "oracle"}
    assert {name for name, *_ in rows} == set(names)
    for name, *cells, totals in rows:
        policy = summary["policies"][names[name]]
        keys = ("worst_group_win_rate", "average_over_groups", "average_over_people")
        assert totals.replace("*", "").split(" | ") == [f"{policy[key]:.3f}" for key in keys]
        rates = policy["win_rate_vs_sft"]
        for cell, group in zip(cells, summary["groups"], strict=True):
            rate = rates[group["name"]]
            assert cell == f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            assert rate["method"].startswith("t")


def test_what_it_costs_is_that_of_summary_json():
    compared = json.loads((ROOT / "reproductions/demo-10-1/summary.json").read_text())["comparison"]
    text = " ".join(README.split())
    for key, words in (
        ("majority_relative_change", "the majority's win rate falls by"),
        ("average_over_people_relative_change", "the average over people by"),
    ):
        ends = compared[f"{key}_interval"]
        numbers = f"{-compared[key]:.0%} [{-ends['high']:.0%}, {-ends['low']:.0%}]"
        assert f"{words} {numbers}" in text
    people = compared["people"]
    assert f"{people['lose']:.0%} of the people are in the group that loses, {people['gain']:.0%}" in text
