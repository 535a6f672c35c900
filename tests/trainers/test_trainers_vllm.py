"""A policy run with vLLM itself; in an environment of its own, by `make test-vllm`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from trainers_runs import PPORun

from torchrl_maxmin.core.run import read_metrics

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a fixed size also makes no trial run

HERE = Path(__file__).parent


@pytest.fixture
def model(make_model):
    return make_model("vllm", n_embd=64)  # heads of 32, the least that vLLM has kernels for without a GPU


def test_three_iterations_on_the_embedded_world(model, make_config):
    settings = {"rollout_engine": "vllm", "num_iterations": 3, "calibration": "sft_mean"}
    run = PPORun(make_config(model_name_or_path=model, **settings)).train()
    rows = read_metrics(run.folder)
    assert len(rows) == run.rollouts.collector.policy.version == 3
    assert all(row["rollout/log_prob_mismatch_max"] < 1e-3 for row in rows)
    assert len({row["objective/kl"] for row in rows}) == 3
    assert (run.folder / "model.safetensors").is_file()


def environment():
    paths = [
        str(HERE),
        str(HERE.parents[1] / "kernels"),
        str(HERE.parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


@contextmanager
def vllm_serve(model, log):
    """The address of a server, and its process, which leads a group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` of vllm-cpu looks for the version of a package named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--enable-scale-out"]
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    command += ["--worker-extension-cls", "torchrl_maxmin.rollouts.vllm_worker.PolicyWeights"]
    with log.open("a") as output:
        server = subprocess.Popen(
            command,
            env=environment() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.5)
        yield address, server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def start_ppo(config, address, **more):
    """The command line of a run, as a process."""
    settings = {"vllm_server_base_url": address, "rollout_engine": "vllm", **more}
    names = ("model_name_or_path", "dataset_name", "output_dir", "rollout_batch_size", "mini_batch_size")
    names += ("response_length", "calibration_prompts", "num_iterations", "learning_rate", "device")
    names += ("calibration",)
    settings |= {name: getattr(config, name) for name in names}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "torchrl_maxmin", "ppo", *words, "--reward_funcs", *config.reward_funcs],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed(run, kill, metrics, rows):
    """Kill once a run has so many more rows; returns its last line."""
    before = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    while run.poll() is None and not (
        metrics.is_file() and len(metrics.read_text().splitlines()) >= before + rows
    ):
        time.sleep(0.01)
    kill()
    words = run.communicate()[0].strip().splitlines()
    assert run.returncode == 1, words
    return words[-1]


def kill_core(server):
    """Kill the process in which a server's engine runs, and not the one that answers."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    (core,) = (pid for pid in children if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(int(core), signal.SIGKILL)


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_a_checkpoint_and_another_goes_on(model, make_config, tmp_path):
    log, iterations = tmp_path / "server.log", 60
    settings = {"model_name_or_path": model, "num_iterations": iterations, "calibration": "sft_mean"}
    whole, parts = (make_config(name, **settings) for name in ("whole", "parts"))
    metrics = Path(parts.output_dir) / "metrics.jsonl"
    with vllm_serve(model, log) as (address, server):
        run = start_ppo(whole, address)
        words = run.communicate()[0]
        assert run.returncode == 0, words
        run = start_ppo(parts, address)
        lines = [killed(run, lambda: kill_core(server), metrics, 5)]
    done = [len(read_metrics(parts.output_dir))]
    with vllm_serve(model, log) as (address, server):
        run = start_ppo(parts, address, resume_from_checkpoint="last")
        lines.append(killed(run, lambda: os.killpg(server.pid, signal.SIGKILL), metrics, 5))
    done.append(len(read_metrics(parts.output_dir)))
    for line, last in zip(lines, done, strict=True):
        assert "torchrl-maxmin ppo: error: the" in line
        assert line.endswith(f"checkpoint-{last}: --resume_from_checkpoint last goes on from there")
    assert 5 <= done[0] < done[1] < iterations
    with vllm_serve(model, log) as (address, _):
        run = start_ppo(parts, address, resume_from_checkpoint="last")
        words = run.communicate()[0]
        assert run.returncode == 0, words
    mine, others = (read_metrics(config.output_dir) for config in (whole, parts))
    assert len(mine) == len(others) == iterations
    for row, other in zip(mine, others, strict=True):
        assert row["rollout/log_prob_mismatch_max"] < 1e-3
        for name in ("objective/welfare", "objective/kl", "maxmin/weights/0"):
            assert other[name] == pytest.approx(row[name], abs=1e-3), name
