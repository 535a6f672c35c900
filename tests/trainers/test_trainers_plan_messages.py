"""What a plan says that processes send each other, against what two of them send in an iteration."""

import dataclasses
import json

import pytest
from ranks import count_calls, on_ranks
from trainers_runs import small_config

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.plan import PlanConfig
from torchrl_maxmin.trainers.plan_messages import Link, Messages
from torchrl_maxmin.trainers.plan_phases import stage_phases
from torchrl_maxmin.trainers.plan_traces import Planner
from torchrl_maxmin.trainers.ppo_config import PPOConfig

SETTINGS = {
    "rollout_batch_size": 11,
    "mini_batch_size": 5,
    "per_device_train_batch_size": 2,
    "num_ppo_epochs": 2,
    "response_length": 7,
    "max_prompt_length": 12,
    "scoring_batch_size": 4,
    "generation_batch_size": 3,
    "calibration_prompts": 12,
    "calibration_samples": 4,
    "reward_funcs": ["trainers_rewards:brevity", "trainers_rewards:letters"],
}
CASES = {
    "copies": {"distributed": "ddp"},
    "heads": {"distributed": "ddp", "critic": "heads"},
    "no critic": {"distributed": "ddp", "advantage": "rloo"},
    "adapters": {"distributed": "ddp", "use_peft": True, "lora_r": 4},
    "shards": {"distributed": "fsdp2"},
    "shards and adapters": {"distributed": "fsdp2", "use_peft": True, "lora_r": 4},
    "shards and heads": {"distributed": "fsdp2", "critic": "heads"},
}
QUICK = {"copies", "no critic", "shards and adapters"}


def run(values):
    run_ppo(PPOConfig(**values))


@pytest.fixture(scope="module")
def calls(request, tiny_model, prompt_file, tmp_path_factory):
    """By case what the second of two iterations sends, for all cases that are asked for at once."""
    folder = tmp_path_factory.mktemp("messages")
    here = (item for item in request.session.items if item.path == request.path)
    asked = {item.callspec.params["name"] for item in here if "calls" in item.fixturenames}
    cases = {name: case for name, case in CASES.items() if name in asked}
    configs = [
        dataclasses.asdict(
            small_config(
                tiny_model,
                prompt_file,
                folder / f"{name}-{iterations}",
                num_iterations=iterations,
                num_generations=11 if "advantage" in case else 1,
                **(SETTINGS | case),
            )
        )
        for name, case in cases.items()
        for iterations in (1, 2)
    ]
    found, _ = on_ranks(2, count_calls, run, configs)
    return {
        name: {kind: [b - a for a, b in zip(one[kind], two[kind], strict=True)] for kind in one}
        for name, one, two in zip(cases, found[::2], found[1::2], strict=True)
    }


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_plan_counts_what_an_iteration_sends(name, calls, tiny_model):
    config = PlanConfig(str(tiny_model), num_groups=2, gpus=2, device="cpu", **(SETTINGS | CASES[name]))
    phases = stage_phases(config.resolved(), Planner("cpu", None, {}))
    planned = [message for phase in phases for message in phase.messages]
    for kind, (count, size) in calls[name].items():
        of_kind = [message for message in planned if message.kind == kind]
        assert sum(message.count for message in of_kind) == count, kind
        if size:  # shards are padded, and the number of losses depends on the loss
            assert sum(message.bytes for message in of_kind) == pytest.approx(size, rel=0.02, abs=2048), kind


def test_seconds_are_those_of_a_ring():
    """A sum of 8 GB over 4 processes: each link carries 2 * 3/4 of them, in 2 * 2 turns of latency."""
    link = Link(2e9, 1e-3)
    assert Messages("", "all_reduce", 1, 8e9).seconds(4, link) == pytest.approx(6.0 + 4e-3)
    assert Messages("", "all_gather", 1, 8e9).seconds(4, link) == pytest.approx(3.0 + 2e-3)
    assert Messages("", "broadcast", 3, 8e9).seconds(4, link) == pytest.approx(4.0 + 6e-3)
    assert Messages("", "reduce_scatter", 0, 0).seconds(1000, link) == 0


def test_one_process_sends_nothing_and_more_say_how_much(tiny_model, tmp_path, capsys):
    flags = ["--model_name_or_path", str(tiny_model), "--num_groups", "2", "--response_length", "8"]
    flags += ["--max_prompt_length", "8", "--calibration_prompts", "4", "--output_dir"]
    assert main(["plan", *flags, str(tmp_path / "one")]) == 0
    assert "between processes" not in capsys.readouterr().out
    more = ["--gpus", "8", "--network_gb_per_s", "0.001"]
    assert main(["plan", *flags, str(tmp_path / "eight"), *more]) == 0
    assert "messages, at 0.001 GB/s and 20 us a message (taken, not measured)" in capsys.readouterr().out
    one, eight = (json.loads((tmp_path / n / "summary.json").read_text())["phases"] for n in ("one", "eight"))
    assert not any(phase["messages"] for phase in one.values())
    sent = [message for phase in eight.values() for message in phase["messages"]]
    assert {message["what"] for message in sent} >= {"responses", "rewards", "gradients"}
    update = sum(
        message["bytes"] for message in eight["update"]["messages"] if message["what"] == "gradients"
    )
    assert eight["update"]["seconds"] > 2 * 7 / 8 * update / 1e6
