"""A run in an environment that stops and goes on is the run that never stopped; crashes lose no state."""

import json

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from trainers_runs import EnvPPORun

from torchrl_maxmin.core.checkpoint import find_checkpoint
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers import env_ppo

GYM = {
    "env_id": "fishwood-v0",
    "env_backend": "gym",
    "num_envs": 2,
    "frames_per_batch": 20,
    "total_frames": 80,
    "max_episode_steps": 6,
    "eval_episodes": 2,
}
KINDS = {
    "batched": {"tau": 0.5},
    "cut": {"max_episode_steps": 3, "adversary": "hard_min", "entropy_coeff": 0.0, "gamma": 0.9},
    "time limit": {"env_id": "fishwood-v0", "env_options": {"horizon": 5}, "welfare": "utilitarian"},
    "mean of mins": {"objective": "mean_of_mins", "max_episode_steps": 9, "cliprange_value": 0.2},
    "numbers": {"env_id": "trainers_envs:dial", "adversary": "exponentiated_gradient"},
    "gym": GYM,
}


@pytest.fixture(params=KINDS)
def settings(request):
    if request.param == "gym":
        pytest.importorskip("mo_gymnasium")
    return KINDS[request.param]


def trained(config):
    trainer = EnvPPORun(config)
    trainer.train()
    return trainer


def everything(trainer):
    """All that a run leaves behind, as comparable values; the clock apart."""
    tensors = {f"file/{n}": v for n, v in load_file(trainer.folder / "policy.safetensors").items()}
    tensors |= {f"critic/{n}": v for n, v in trainer.critic.state_dict().items()}
    tensors |= {f"adversary/{n}": v for n, v in trainer.adversary.state_dict().items()}
    for i, state in trainer.learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{n}": torch.as_tensor(v) for n, v in state.items()}
    summary = json.loads((trainer.folder / "summary.json").read_text())
    clock = ("wall_seconds", "frames_per_second")
    texts = [
        (trainer.folder / "metrics.jsonl").read_text(),
        json.dumps({name: value for name, value in summary.items() if name not in clock}),
    ]
    return tensors, texts


def assert_same(one, other):
    (tensors, texts), (again, texts_again) = everything(one), everything(other)
    assert set(tensors) == set(again)
    for name, value in tensors.items():
        assert torch.equal(again[name], value), name
    assert texts == texts_again


def test_the_seed_decides_everything(make_env_config, settings):
    runs = [trained(make_env_config(name, **settings, seed=s)) for name, s in (("a", 3), ("b", 3), ("c", 4))]
    assert_same(*runs[:2])
    tensors, texts = everything(runs[2])
    assert texts != everything(runs[0])[1]
    assert any(not torch.equal(value, everything(runs[0])[0][name]) for name, value in tensors.items())


def test_seed_and_iteration_decide_the_episodes(make_env_config):
    looks = []
    for name, seed, iteration in (("a", 1, 0), ("b", 1, 0), ("c", 1, 1), ("d", 2, 0), ("e", 2, 1)):
        trainer = EnvPPORun(make_env_config(name, seed=seed))
        trainer.rollouts.start_episodes(iteration)
        looks.append(tuple(trainer.env.reset()["state"].flatten().tolist()))
    assert looks[0] == looks[1]
    assert len(set(looks)) == 4


def test_four_iterations_equal_two_and_two(make_env_config, settings):
    whole = trained(make_env_config("whole", **settings, save_steps=2))
    stopped = trained(make_env_config("parts", **settings, save_steps=2, stop_at_iteration=2))
    assert [p.name for p in stopped.folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (stopped.folder / "policy.safetensors").exists()
    assert not (stopped.folder / "summary.json").exists()
    assert len(read_metrics(stopped.folder)) == 2
    torch.manual_seed(4321)  # what happens in between must not matter
    resumed = trained(make_env_config("parts", **settings, save_steps=2, resume_from_checkpoint="last"))
    assert resumed.start == 2
    assert resumed.utility_scale == whole.utility_scale
    assert_same(whole, resumed)
    assert [row["step"] for row in read_metrics(whole.folder)] == [0, 1, 2, 3]


def test_a_checkpoint_starts_episodes_anew_and_restarts_nothing_else(make_env_config):
    """The same as without, where rollouts are whole episodes."""
    settings = {"env_id": "trainers_envs:arms", "num_envs": 16, "frames_per_batch": 16, "total_frames": 64}
    lines = [
        (trained(make_env_config(name, **settings, save_steps=steps)).folder / "metrics.jsonl").read_text()
        for name, steps in (("without", 0), ("with", 1))
    ]
    assert lines[0] == lines[1]


def test_the_scale_of_a_resumed_run_is_the_first_policy_s(make_env_config):
    first = trained(make_env_config("run", stop_at_iteration=1))
    resumed = EnvPPORun(make_env_config("run", resume_from_checkpoint="last", utility_scale=99.0))
    assert resumed.utility_scale == first.utility_scale != 99.0
    assert resumed.adversary.scale == first.utility_scale


def test_metrics_past_the_checkpoint_are_dropped_on_resume(make_env_config):
    whole = trained(make_env_config("run", save_steps=1))
    lines = (whole.folder / "metrics.jsonl").read_text()
    resumed = trained(make_env_config("run", save_steps=1, resume_from_checkpoint="checkpoint-3"))
    assert resumed.start == 3
    assert (whole.folder / "metrics.jsonl").read_text() == lines


def crash_on(monkeypatch, name):
    """``save_file`` dies half way in the file of this name."""
    save = safetensors.torch.save_file

    def crashing(tensors, path):
        if name in str(path):
            path.write_bytes(b"half a fi")
            raise OSError("No space left on device")
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", crashing)
    monkeypatch.setattr(env_ppo, "save_file", crashing)


def test_a_crash_while_writing_a_checkpoint_leaves_the_older_ones(make_env_config, monkeypatch):
    trainer = EnvPPORun(make_env_config("run", save_steps=1))
    crash_on(monkeypatch, "checkpoint-3")
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert find_checkpoint(trainer.folder, "last")["iteration"] == 2
    assert sorted(p.name for p in trainer.folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    resumed = trained(make_env_config("run", save_steps=1, resume_from_checkpoint="last"))
    assert_same(trained(make_env_config("whole", save_steps=1)), resumed)


def test_a_crash_while_writing_the_policy_leaves_none(make_env_config, monkeypatch):
    trainer = EnvPPORun(make_env_config("run", save_steps=3))
    crash_on(monkeypatch, "policy.safetensors")
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert not (trainer.folder / "policy.safetensors").exists()
    resumed = trained(make_env_config("run", save_steps=3, resume_from_checkpoint="last"))
    assert_same(trained(make_env_config("whole", save_steps=3)), resumed)
    assert not list(resumed.folder.glob(".*"))


def test_checkpoints_that_do_not_fit(make_env_config):
    trained(make_env_config("run", stop_at_iteration=1))
    for changes in ({"hidden_sizes": [9]}, {"env_id": "trainers_envs:arms"}, {"objective": "mean_of_mins"}):
        with pytest.raises(
            UserError, match=r"checkpoint is of other settings.*resume with those of .*config"
        ):
            EnvPPORun(make_env_config("run", resume_from_checkpoint="last", **changes))
    with pytest.raises(UserError, match="at iteration 1 already; raise --stop_at_iteration, or give 0"):
        EnvPPORun(make_env_config("run", stop_at_iteration=1, resume_from_checkpoint="last"))
