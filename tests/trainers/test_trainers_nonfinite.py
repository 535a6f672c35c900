"""A stage whose numbers run away stops with the batch that did it, and saves no such weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers_runs import EnvPPORun, PPORun

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.trainers.env_ppo import load_env_policy
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.trainers.sft import SFTConfig, run_sft
from torchrl_maxmin.world import sample_reviews


@pytest.fixture
def texts(tmp_path):
    rows = [{"prompt": prompt, "completion": rest} for prompt, rest in sample_reviews(24, 0)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    reviews = [f"{prompt} {rest}" for prompt, rest in sample_reviews(24, 0)]
    rows = [
        {"prompt": "", "chosen": a, "rejected": b, "user_id": i // 3}
        for i, (a, b) in enumerate(zip(reviews[::2], reviews[1::2], strict=True))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def assert_nothing_saved(folder):
    assert not list(Path(folder).glob("model*"))
    assert not (Path(folder) / "summary.json").exists()
    assert not list(Path(folder).glob("checkpoint-*"))


def test_sft_stops_where_its_loss_is_none(tiny_model, texts, tmp_path):
    folder = tmp_path / "sft"
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "device": "cpu"}
    config = SFTConfig(tiny_model, texts, str(folder), learning_rate=1e30, **settings)
    with pytest.raises(FloatingPointError, match=r"the sft loss .*is nan; the batch that gave it is in"):
        run_sft(config)
    batch = load_file(folder / "nonfinite_batch.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape
    assert len(batch["input_ids"]) == 8
    assert_nothing_saved(folder)


def test_sft_saves_no_weights_that_its_last_step_ruined(tiny_model, texts, tmp_path):
    folder = tmp_path / "sft"
    config = SFTConfig(tiny_model, texts, str(folder), max_steps=1, learning_rate=1e39, device="cpu")
    with pytest.raises(FloatingPointError, match=r"weights of the model are NaN or infinite"):
        run_sft(config)
    assert_nothing_saved(folder)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"steps_per_round": 4}, "the reward loss or its gradient is nan"),
        ({"steps_per_round": 1}, "the log-likelihood of a user is not finite|weights of the reward model"),
    ],
)
def test_the_reward_stage_stops(tiny_model, pairs, tmp_path, rates, message):
    folder = tmp_path / "reward"
    settings = {"num_groups": "1", "num_rounds": 2, "heldout_fraction": 0.0, "calibration": "none"}
    settings |= {"learning_rate": 1e36, "head_learning_rate": 1e36, "device": "cpu"}
    config = RewardConfig(tiny_model, pairs, str(folder), **(settings | rates))
    with pytest.raises(FloatingPointError, match=message) as raised:
        run_reward(config)
    if "the batch" in str(raised.value):
        batch = load_file(folder / "nonfinite_batch.safetensors")
        assert batch["chosen_tokens"].shape == batch["rejected_mask"].shape
        assert len(batch["choices"]) == len(batch["chosen_tokens"])
    assert_nothing_saved(folder)


@pytest.mark.parametrize("kind", ["language", "environment"])
def test_ppo_stops_and_keeps_no_ruined_checkpoint(make_config, make_env_config, kind):
    make, run = (make_config, PPORun) if kind == "language" else (make_env_config, EnvPPORun)
    # with the loss's own step the first to ruin them
    trainer = run(make(save_steps=1, learning_rate=1e30, num_ppo_epochs=3, max_grad_norm=float("inf")))
    with pytest.raises((FloatingPointError, ValueError)) as raised:
        trainer.train()
    assert isinstance(raised.value, FloatingPointError), raised.value
    assert not (trainer.folder / "model.safetensors").exists()
    assert not (trainer.folder / "policy.safetensors").exists()
    for checkpoint in trainer.folder.glob("checkpoint-*"):
        pytest.fail(f"{checkpoint} was written")


def test_weights_that_turn_nan_after_the_last_loss_are_not_saved(make_env_config):
    trainer = EnvPPORun(make_env_config(save_steps=1))
    update = trainer.learner.update

    def ruin(rows):
        losses = update(rows)
        with torch.no_grad():
            next(trainer.policy.parameters()).view(-1)[0] = float("nan")
        return losses

    trainer.learner.update = ruin
    with pytest.raises(FloatingPointError, match="weights of the networks are NaN or infinite"):
        trainer.train()
    assert not list(trainer.folder.glob("checkpoint-*"))


def test_a_policy_of_an_environment_that_holds_nan_is_refused(make_env_config):
    trainer = EnvPPORun(make_env_config(total_frames=64)).train()
    path = trainer.folder / "policy.safetensors"
    state = load_file(path)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, path)
    with pytest.raises(UserError, match="hold NaN or infinity"):
        load_env_policy(trainer.folder)
