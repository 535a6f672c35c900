"""A run that stops and goes on is the run that never stopped; a crash loses no checkpoint."""

import json
import shutil

import pytest
import torch
from trainers_runs import PPORun

from torchrl_maxmin.core import checkpoint as checkpoint_module
from torchrl_maxmin.core import run as run_module
from torchrl_maxmin.core.checkpoint import find_checkpoint, save_checkpoint
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.objectives import MaxMinPPOLoss


def trained(config):
    trainer = PPORun(config)
    trainer.train()
    return trainer


def everything(trainer):
    """All that a run leaves behind, as comparable values."""
    tensors = {f"policy/{n}": v for n, v in trainer.policy.state_dict().items()}
    tensors |= {f"critic/{n}": v for n, v in trainer.critic.state_dict().items()}
    tensors |= {f"adversary/{n}": v for n, v in trainer.adversary.state_dict().items()}
    for i, state in trainer.learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{n}": torch.as_tensor(v) for n, v in state.items()}
    texts = {name: (trainer.folder / name).read_text() for name in ("metrics.jsonl", "summary.json")}
    return tensors, texts


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100, "tau": 0.5},
        {"objective": "mean_of_mins", "mini_batch_size": 3, "entropy_coeff": 0.01},
        {"adversary": "exponentiated_gradient", "calibration": "win_rate", "temperature": 0.8},
        {"use_peft": True, "lora_r": 4, "gradient_checkpointing": True, "learning_rate": 1e-3},
        {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "critic": "heads", "dtype": "bfloat16"},
        {"dtype": "bfloat16", "optim": "adafactor", "per_device_train_batch_size": 3},
    ],
)
def test_four_iterations_equal_two_and_two(make_config, settings):
    whole = trained(make_config("whole", **settings))
    stopped = trained(make_config("parts", **settings, stop_at_iteration=2))
    assert [p.name for p in stopped.folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (stopped.folder / "model.safetensors").exists()
    assert len(read_metrics(stopped.folder)) == 2
    torch.manual_seed(4321)  # what happens in between must not matter
    resumed = trained(make_config("parts", **settings, resume_from_checkpoint="last"))
    assert resumed.start == 2
    tensors, texts = everything(whole)
    again, texts_again = everything(resumed)
    assert set(tensors) == set(again)
    for name, value in tensors.items():
        assert torch.equal(again[name], value), name
    assert texts_again == texts
    assert (whole.folder / "model.safetensors").read_bytes() == (
        resumed.folder / "model.safetensors"
    ).read_bytes()
    rows = read_metrics(whole.folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    if "kl_target" in settings:
        assert len({row["objective/kl_coef"] for row in rows}) == 4


def test_micro_batches_that_memory_halved_stay_so(make_config, monkeypatch, capsys):
    losses = MaxMinPPOLoss.losses_by_network

    def fail(loss, part):
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(loss, part)

    monkeypatch.setattr(MaxMinPPOLoss, "losses_by_network", fail)
    whole = trained(make_config("whole", num_iterations=2))
    trained(make_config("parts", num_iterations=2, stop_at_iteration=1))
    assert capsys.readouterr().err.count("the update goes on with 2, as by --per_device") == 2
    resumed = trained(make_config("parts", num_iterations=2, resume_from_checkpoint="last"))
    assert "memory" not in capsys.readouterr().err
    assert resumed.learner.micro_batch.size == 2
    assert everything(resumed)[1] == everything(whole)[1]


def test_metrics_past_the_checkpoint_are_dropped_on_resume(make_config):
    whole = trained(make_config("run", save_steps=2))
    names = sorted(p.name for p in whole.folder.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
    lines = (whole.folder / "metrics.jsonl").read_text()
    resumed = trained(make_config("run", resume_from_checkpoint="checkpoint-2"))
    assert resumed.start == 2
    assert (whole.folder / "metrics.jsonl").read_text() == lines


def test_a_crash_while_writing_leaves_older_checkpoints(make_config, monkeypatch):
    config = make_config("run", save_steps=1)
    trainer = PPORun(config)
    whole_save, done = checkpoint_module.save_state, []

    def crash_on_third(folder, state):
        if len(done) == 2:
            (folder / "state.json").write_bytes(b"half a checkp")
            raise OSError("No space left on device")
        done.append(folder)
        whole_save(folder, state)

    monkeypatch.setattr(checkpoint_module, "save_state", crash_on_third)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert find_checkpoint(trainer.folder, "last")["iteration"] == 2
    assert sorted(p.name for p in trainer.folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    resumed = trained(make_config("run", resume_from_checkpoint="last"))
    whole = trained(make_config("whole"))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], value), name
    assert (resumed.folder / "metrics.jsonl").read_text() == (whole.folder / "metrics.jsonl").read_text()


def test_a_checkpoint_is_replaced_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"value": 1})
    save_checkpoint(tmp_path, 1, {"value": 2})
    assert find_checkpoint(tmp_path, "last") == {"value": 2}
    save_checkpoint(tmp_path, 10, {"value": 10})
    save_checkpoint(tmp_path, 9, {"value": 9})
    assert find_checkpoint(tmp_path, "last") == {"value": 10}  # by number, not by name or time
    assert find_checkpoint(tmp_path, "checkpoint-9") == {"value": 9}
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-1")) == {"value": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-9"]


def test_another_calibration_is_not_resumed_with(make_config):
    trained(make_config("run", calibration="sft_mean", stop_at_iteration=1))
    with pytest.raises(UserError, match="resume with --calibration sft_mean, or start another run for none"):
        PPORun(make_config("run", calibration="none", resume_from_checkpoint="last"))


def test_missing_checkpoints(make_config, tmp_path):
    assert find_checkpoint(tmp_path, "last") is None
    with pytest.raises(UserError, match=r"no checkpoint at .*checkpoint-7"):
        find_checkpoint(tmp_path, "checkpoint-7")
    trained(make_config("run", num_iterations=2, stop_at_iteration=1))
    with pytest.raises(UserError, match="at iteration 1 already; raise --stop_at_iteration, or give 0"):
        PPORun(make_config("run", num_iterations=2, stop_at_iteration=1, resume_from_checkpoint="last"))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    run_module.write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        run_module.write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}


def test_the_latest_checkpoints_stay(make_config):
    trainer = trained(make_config("run", save_steps=1, save_total_limit=2))
    assert sorted(p.name for p in trainer.folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "hole", "gone"])
def test_damage_is_named_and_the_checkpoint_before_is_used(make_config, capsys, name, damage):
    whole = trained(make_config("run", save_steps=1))
    lines = (whole.folder / "metrics.jsonl").read_text()
    path = whole.folder / "checkpoint-3" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flip":
        content[middle] ^= 4
    elif damage == "cut":
        del content[middle:]
    elif damage == "hole":
        content[middle : middle + 64] = bytes(64)
    path.unlink() if damage == "gone" else path.write_bytes(bytes(content))
    shutil.rmtree(whole.folder / "checkpoint-4")
    capsys.readouterr()
    resumed = trained(make_config("run", save_steps=1, resume_from_checkpoint="last"))
    assert resumed.start == 2
    told = capsys.readouterr().err
    assert f"checkpoint-3/{name}" in told or "checkpoint-3/state" in told
    assert "going on from checkpoint-2" in told
    assert (whole.folder / "metrics.jsonl").read_text() == lines
    for parameter, value in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[parameter], value), parameter


def test_the_state_holds_no_pickle(make_config):
    trainer = trained(make_config("run", save_steps=2))
    for path in trainer.folder.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"), path
