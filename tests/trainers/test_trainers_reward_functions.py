"""Reward functions and monitors that fail in the middle of a run: what is kept, and what goes on."""

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import trainers_rewards
from ranks import on_ranks
from trainers_runs import PPORun, small_config

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.monitors import HarmlessMonitor
from torchrl_maxmin.trainers.ppo_config import PPOConfig

TROUBLE = "trainers_rewards:trouble"
REWARDS = {"reward_funcs": [TROUBLE, "trainers_rewards:letters"]}
#: the first call is a question, the second the calibration; this is the third rollout
AT = 5
KINDS = {
    "raises": r"call 5: the reward function Trouble fails on .* with ValueError: no such thing\\x1b\[2J; ",
    "exits": r"call 5: the reward function Trouble fails on .* with SystemExit: 3",
    "hangs": r"call 5: .*Trouble gives no answer within 0\.3 s; mend it, or raise --reward_timeout",
    "narrows": r"call 5: .*Trouble gives numbers of shape \[7\] for 8 responses",
    "widens": r"call 5: .*Trouble gave 1 number\(s\) a response at first, and gives 2 now",
    "speaks": r"call 5: .*Trouble gives no numbers \(could not convert",
    "undefined": r"a reward is nan; the batch that gave it is in \S+nonfinite_batch.safetensors",
    "overflows": r"a reward is nan; the batch that gave it is in \S+nonfinite_batch.safetensors",
}


@pytest.fixture(autouse=True)
def trouble():
    trainers_rewards.trouble.start()
    yield trainers_rewards.trouble
    trainers_rewards.trouble.start()


@pytest.fixture(scope="module")
def whole(tiny_model, prompt_file, tmp_path_factory):
    trainers_rewards.trouble.start()
    folder = tmp_path_factory.mktemp("reward_functions") / "whole"
    return PPORun(small_config(tiny_model, prompt_file, folder, **REWARDS)).train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_fails_leaves_a_checkpoint_that_ends_alike(make_config, whole, trouble, kind):
    trouble.start(kind, AT)
    limit = {"reward_timeout": 0.3} if kind == "hangs" else {}
    run = PPORun(make_config("parts", **REWARDS, **limit))
    line = KINDS[kind] + r".*; all updates are in \S+/checkpoint-2: --resume_from_checkpoint last goes on"
    with pytest.raises((EngineError, FloatingPointError), match=line) as caught:
        run.train()
    assert str(caught.value).isprintable()
    assert len(read_metrics(run.folder)) == 2
    trouble.start()
    resumed = PPORun(make_config("parts", resume_from_checkpoint="last", **REWARDS))
    assert resumed.start == 2
    resumed.train()
    for name in ("metrics.jsonl", "summary.json", "model.safetensors"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes(), name


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_function_that_fails_before_the_first_update(make_config, trouble, at):
    """There is nothing to save yet: one line says what and where."""
    trouble.start("raises", at)
    kind = UserError if at < 3 else EngineError
    config = make_config("parts", **REWARDS)
    with pytest.raises(kind, match=f"^call {at}: the reward function Trouble fails"):
        PPORun(config).train()


def test_the_command_ends_in_one_line(make_config, trouble, capsys):
    config = make_config("run", **REWARDS)
    flags = ("model_name_or_path", "dataset_name", "output_dir", "num_iterations", "rollout_batch_size")
    flags += ("mini_batch_size", "response_length", "calibration_prompts", "device")
    arguments = [word for name in flags for word in (f"--{name}", str(getattr(config, name)))]
    trouble.start("hangs", AT)
    assert main(["ppo", *arguments, "--reward_funcs", *config.reward_funcs, "--reward_timeout", "0.3"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("torchrl-maxmin ppo: error: call 5: the reward function Trouble gives no answer")
    assert last.endswith("--resume_from_checkpoint last goes on from there")


def fail_at_one(values, resumed):
    """Train by processes of which the second one's function fails; returns the error, and go on."""
    trouble = trainers_rewards.trouble
    trouble.start("raises", AT if os.environ["RANK"] == "1" else 0)
    with pytest.raises(EngineError) as caught:
        run_ppo(PPOConfig(**values))
    trouble.start()
    run_ppo(PPOConfig(**resumed))
    return str(caught.value)


def test_what_one_of_the_processes_meets_ends_all(make_config):
    settings = {"distributed": "ddp", **REWARDS}
    going_on = {"resume_from_checkpoint": "last"}
    configs = [asdict(make_config("ranks", **settings, **more)) for more in ({}, going_on)]
    one, other = on_ranks(2, fail_at_one, *configs)
    assert one == other
    assert "call 5: the reward function Trouble fails" in one
    assert re.search(r"/checkpoint-[12]: --resume_from_checkpoint last", one)
    folder = Path(configs[0]["output_dir"])
    assert len(read_metrics(folder)) == 4
    assert (folder / "model.safetensors").is_file()


# -- monitors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_monitor_that_fails_is_left_out(make_config, trouble, capsys, kind):
    """The first call is a question; this is the second rollout."""
    trouble.start(kind, 3)
    limit = {"reward_timeout": 0.3} if kind == "hangs" else {}
    monitors = [TROUBLE, "trainers_rewards:both"]
    run = PPORun(make_config("watched", num_iterations=4, monitor_funcs=monitors, **limit)).train()
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("warning: a monitor fails at iteration 2, and its metrics are left out: call 3: ") == 1
    assert ("it is not called again" in error) == (kind == "hangs")
    names = [{name for name in row if name.startswith("monitor/")} for row in read_metrics(run.folder)]
    others = {"monitor/1/mean", "monitor/2/mean"}
    every = others | {"monitor/0/mean"}
    assert names == [every, others, *([others] * 2 if kind == "hangs" else [every] * 2)]
    assert trouble.calls == (3 if kind == "hangs" else 5)


def test_any_monitor_is_said_once(capsys):
    answers = [{"a": 1.0}, {"a": float("nan"), "b": 2.0}, None, {"a": float("inf")}, {"b": 3.0}]
    monitor = HarmlessMonitor(lambda iteration, batch, metrics: answers[iteration])
    assert [monitor(k, None, {}) for k in range(6)] == [{"a": 1.0}, {"b": 2.0}, {}, {}, {"b": 3.0}, {}]
    assert capsys.readouterr().err.count("warning") == 1


def test_a_group_without_rewards_in_a_batch_is_no_failure(make_config, trouble, capsys, monkeypatch):
    monkeypatch.setattr(trainers_rewards, "silent", lambda p, c: [[1.0, None] for _ in c], raising=False)
    run = PPORun(make_config(num_iterations=1, monitor_funcs=["trainers_rewards:silent"])).train()
    (row,) = read_metrics(run.folder)
    assert {name for name in row if name.startswith("monitor/")} == {"monitor/0/mean"}
    assert "warning" not in capsys.readouterr().err
