"""A policy run with vLLM itself; in an environment of its own, by `make test-vllm`."""

import json
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
    settings |= {name: getattr(config, name) for name in names}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "torchrl_maxmin", "ppo", *words, "--reward_funcs", *config.reward_funcs],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_a_checkpoint_and_another_goes_on(model, make_config, tmp_path):
    log, iterations = tmp_path / "server.log", 40
    whole, parts = (make_config(name, model_name_or_path=model, num_iterations=iterations) for name in "ab")
    with vllm_serve(model, log) as (address, server):
        run = start_ppo(whole, address)
        words = run.communicate()[0]
        assert run.returncode == 0, words
        run = start_ppo(parts, address)
        metrics = Path(parts.output_dir) / "metrics.jsonl"
        while run.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            time.sleep(0.01)
        os.killpg(server.pid, signal.SIGKILL)
        words = run.communicate()[0].strip().splitlines()
    done = len(read_metrics(parts.output_dir))
    assert run.returncode == 1
    assert 5 <= done < iterations
    assert "error: the vLLM server at" in words[-1]
    assert words[-1].endswith(f"checkpoint-{done}: --resume_from_checkpoint last goes on from there")
    with vllm_serve(model, log) as (address, _):
        run = start_ppo(parts, address, resume_from_checkpoint="last")
        words = run.communicate()[0]
        assert run.returncode == 0, words
    mine, others = (read_metrics(config.output_dir) for config in (whole, parts))
    assert len(mine) == len(others) == iterations
    for row, other in zip(mine, others, strict=True):
        assert row["rollout/log_prob_mismatch_max"] < 1e-3
        for name in ("objective/welfare", "objective/kl", "maxmin/weights/0"):
            assert other[name] == pytest.approx(row[name], abs=1e-3), json.dumps(other)
