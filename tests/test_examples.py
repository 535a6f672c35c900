"""Every example runs as its first lines say, and stays short enough to be copied."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
#: steps that are one rollout or a few
FRAMES = {"fishwood": 12_800, "fruit_tree": 3_584, "gridworld": 3_072}


def test_there_are_some():
    assert {"fishwood", "fruit_tree", "gridworld", "ppo_maxmin", "ppo_plain"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, monkeypatch, capsys):
    frames = str(FRAMES.get(name, 6_144))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--total_frames", frames])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 120
    assert f"python examples/{name}.py" in text.split('"""')[1]
