"""What a plan and the page on scaling say that a round of EM sends, against what two processes send."""

import dataclasses
import json
import math

import pytest
from ranks import count_calls, on_ranks

from torchrl_maxmin.trainers.plan import PlanConfig
from torchrl_maxmin.trainers.plan_phases import stage_phases
from torchrl_maxmin.trainers.plan_traces import Planner
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.world.world import sample_reviews

USERS, PAIRS, GROUPS, STEPS = 5, 23, 3, 2
SETTINGS = {
    "num_groups": GROUPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "scoring_batch_size": 10,
    "max_length": 32,
}
CASES = {
    "copies": {"distributed": "ddp"},
    "adapters": {"distributed": "ddp", "use_peft": True, "lora_r": 4},
    "shards": {"distributed": "fsdp2"},
    "shards and an adapter": {"distributed": "fsdp2", "use_peft": True, "lora_r": 4, "adapters": "shared"},
}


def run(values):
    run_reward(RewardConfig(**values))


@pytest.fixture(scope="module")
def calls(tiny_model, tmp_path_factory):
    """By case what a run of one round sends, and what the second of two rounds does."""
    folder = tmp_path_factory.mktemp("em_messages")
    pairs = folder / "pairs.jsonl"
    with pairs.open("w") as file:
        for row, (prompt, rest) in enumerate(sample_reviews(PAIRS, seed=1)):
            words = f"{prompt} {rest}".split()
            longer, shorter = " ".join(words), " ".join(words[: len(words) // 2])
            chosen, rejected = (longer, shorter) if row % USERS % 2 else (shorter, longer)
            written = {"prompt": "the film", "chosen": chosen, "rejected": rejected, "worker": row % USERS}
            file.write(json.dumps(written) + "\n")
    base = {
        "steps_per_round": STEPS, "num_restarts": 1, "device": "cpu", "calibration": "none",
        "eval_dataset_name": str(pairs), "identifiability": False,
    }  # fmt: skip
    configs = [
        RewardConfig(
            tiny_model, str(pairs), str(folder / f"{name}-{n}"), num_rounds=n, **(base | SETTINGS | case)
        )
        for name, case in CASES.items()
        for n in (1, 2)
    ]
    found, _ = on_ranks(2, count_calls, run, [dataclasses.asdict(config) for config in configs])
    return {
        name: (one, {kind: [b - a for a, b in zip(one[kind], two[kind], strict=True)] for kind in one})
        for name, one, two in zip(CASES, found[::2], found[1::2], strict=True)
    }


def planned(tiny_model, name):
    """Messages of a phase by its name."""
    config = PlanConfig(tiny_model, gpus=2, device="cpu", stage="reward", **(SETTINGS | CASES[name]))
    return {p.name: p.messages for p in stage_phases(config.resolved(), Planner("cpu", None, {}))}


@pytest.mark.parametrize("name", CASES)
def test_a_round_sends_its_steps_and_the_users_log_likelihoods(name, calls, tiny_model):
    phases, (_, second) = planned(tiny_model, name), calls[name]
    share = math.ceil(PAIRS / 2)
    batches = math.ceil(share / (SETTINGS["scoring_batch_size"] // 2))
    expected = {kind: [0.0, 0.0] for kind in second}
    expected["all_reduce"] = [1, 8 * USERS * GROUPS]
    for phase, times in (("update", STEPS), ("score", batches)):
        for message in phases[phase]:
            total = expected[message.kind]
            total[0] += times * message.count
            total[1] += times * message.bytes
    for kind, (count, size) in second.items():
        assert count == expected[kind][0], kind
        assert size == pytest.approx(expected[kind][1], rel=0.02), kind  # shards are padded


def test_no_pair_is_gathered_but_the_margins_of_those_held_out(calls):
    first, _ = calls["copies"]
    assert first["all_gather"] == (1, math.ceil(PAIRS / 2) * 2 * GROUPS * 4)
