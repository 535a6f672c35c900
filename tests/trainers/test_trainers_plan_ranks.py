"""What processes of this machine are measured to do beside each other."""

import json

import pytest
import torch

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.trainers import plan_ranks


def test_a_plan_of_processes_measures_them_and_their_link(tiny_model, tmp_path, capsys):
    flags = ["--model_name_or_path", str(tiny_model), "--num_groups", "2", "--response_length", "4"]
    flags += ["--max_prompt_length", "4", "--calibration_prompts", "2", "--device", "cpu", "--gpus", "2"]
    assert main(["plan", *flags, "--output_dir", str(tmp_path / "plan")]) == 0
    assert "us a message (measured, too)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "plan" / "summary.json").read_text())
    network, settings = summary["rates"]["network"], summary["settings"]
    assert network["measured"]
    assert network["bandwidth"] > 1e6
    assert 0 < network["latency"] < 1
    assert settings["network_gb_per_s"] == pytest.approx(network["bandwidth"] / 1e9)
    assert summary["rates"]["device"].startswith("CPU")


def test_a_process_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(plan_ranks, "__name__", "torchrl_maxmin.no_such_module")
    with pytest.raises(UserError, match=r"cannot be measured at once .*no_such_module.*; give --gpus 1"):
        plan_ranks.measure_ranks(2, (torch.float32,))


@pytest.mark.parametrize(("small", "large", "expected"), [(1e-4, 1.1e-3, 1e-3), (1e-3, 1e-3, 0.5e-3)])
def test_a_link_has_a_bandwidth_whatever_the_noise(small, large, expected, monkeypatch):
    monkeypatch.setattr(plan_ranks, "_sum_seconds", lambda elements: small if elements == 1 else large)
    link = plan_ranks._measure_link(2)
    assert link.bandwidth == pytest.approx(2**20 / expected)
    assert link.latency == pytest.approx(small / 2)
