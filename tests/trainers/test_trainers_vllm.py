"""A policy run with vLLM itself; in an environment of its own, by `make test-vllm`."""

import os

import pytest
from trainers_runs import PPORun

from torchrl_maxmin.core.run import read_metrics

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a fixed size also makes no trial run


def test_three_iterations_on_the_embedded_world(make_model, make_config):
    model = make_model("vllm", n_embd=64)  # heads of 32, the least that vLLM has kernels for without a GPU
    settings = {"rollout_engine": "vllm", "num_iterations": 3, "calibration": "sft_mean"}
    run = PPORun(make_config(model_name_or_path=model, **settings)).train()
    rows = read_metrics(run.folder)
    assert len(rows) == run.rollouts.collector.policy.version == 3
    assert all(row["rollout/log_prob_mismatch_max"] < 1e-3 for row in rows)
    assert len({row["objective/kl"] for row in rows}) == 3
    assert (run.folder / "model.safetensors").is_file()
