"""Every example runs as its first lines say, and stays short enough to be copied."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchrl_maxmin.cli.parsing import parse_config
from torchrl_maxmin.trainers import ppo_settings
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


def test_the_ray_job_fits_its_cluster(monkeypatch):
    """Flags that the stage has, and GPUs for the trainer and every worker."""
    monkeypatch.setattr(ppo_settings, "require_ray", lambda: None)
    script = (CLUSTER / "ray_job.sh").read_text()
    subprocess.run(["bash", "-n", "-c", script], check=True)
    verb, flags = stage_of(script)
    config = parse_config(verb, "", PPOConfig, flags)
    config.check()
    spec = yaml.safe_load((CLUSTER / "ray_job.yaml").read_text())["spec"]
    assert shlex.split(spec["entrypoint"]) == ["bash", "/shared/ray_job.sh"]
    submit = next(line for line in script.splitlines() if "ray job submit" in line)
    assert submit.endswith(f"--entrypoint-num-gpus {spec['entrypointNumGpus']} -- {spec['entrypoint']}")
    cluster = spec["rayClusterSpec"]
    groups = [(1, cluster["headGroupSpec"]), *((one["replicas"], one) for one in cluster["workerGroupSpecs"])]
    gpus = 0
    for replicas, group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        gpus += replicas * container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == spec["entrypointNumGpus"] + config.rollout_workers * config.rollout_worker_gpus
