"""Every example runs as its first lines say, and stays short enough to be copied."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchrl_maxmin.cli.parsing import parse_config
from torchrl_maxmin.trainers.ppo_config import PPOConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
CLUSTER = EXAMPLES / "cluster"
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


def stage_of(text):
    """The verb and the flags behind ``-m torchrl_maxmin``, as bash would hand them over."""
    verb, *flags = shlex.split(text.split("-m torchrl_maxmin", 1)[1].replace("\\\n", " "))
    values = {"$OUTPUT": "runs/ppo"}
    return verb, [values.get(word, word) for word in flags if word != "${RESUME[@]}"]


def test_cluster_scripts_start_the_same_run():
    """Flags that the stage has, settings that it takes, in text that bash and Kubernetes can read."""
    slurm = (CLUSTER / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", "-c", slurm], check=True)
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert stage_of(slurm) == stage_of(script)
    verb, flags = stage_of(script)
    config = parse_config(verb, "", PPOConfig, flags)
    config.check()
    # the first pod's name, which torchrun meets at
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in script
    nodes, gpus = job["spec"]["completions"], pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["parallelism"] == nodes
    assert f"--nnodes {nodes} --nproc_per_node {gpus} " in script
    assert f"#SBATCH --nodes={nodes}" in slurm
    assert f"#SBATCH --gpus-per-node={gpus}" in slurm
