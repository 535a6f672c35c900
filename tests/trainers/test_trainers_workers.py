"""Policy runs whose rollouts workers sample: what they write, how they go on, and what ends them."""

import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainers_rewards
from trainers_runs import EnvPPORun, PPORun, small_config

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rollouts.ray_workers import ray_session, require_ray
from torchrl_maxmin.trainers import env_ppo, lm_ppo, ppo_settings
from torchrl_maxmin.trainers.env_ppo import make_env_sampler
from torchrl_maxmin.trainers.lm_workers import make_language_sampler


class LocalWorkers:
    """Samplers in this process, which work when they are asked."""

    def __init__(self, config, lost_at=(), make_sampler=make_language_sampler):
        self.samplers = [make_sampler(config) for _ in range(config.rollout_workers)]
        self.size, self.restarts, self.closed = len(self.samplers), 0, False
        self.requests, self.lost_at = 0, lost_at

    def ask(self, version, weights, tasks):
        self.requests += 1
        if self.requests in self.lost_at:
            return None
        answers = []
        with torch.random.fork_rng():  # as in a process of its own
            for sampler, task in zip(self.samplers, tasks, strict=True):
                sampler.load(weights)
                answers.append(sampler.sample(task))
        return answers

    def answers(self, request):
        if request is None:
            raise EngineError("rollout worker 1 of 2 is lost for good (ActorDiedError)")
        return request

    def close(self):
        self.closed = True


@pytest.fixture
def start(monkeypatch, make_config):
    """Build a run whose workers are in this process."""
    monkeypatch.setattr(ppo_settings, "require_ray", lambda: None)

    def build(name, lost_at=(), **settings):
        monkeypatch.setattr(lm_ppo, "start_workers", lambda config: LocalWorkers(config, lost_at))
        return PPORun(make_config(name, **({"rollout_workers": 2} | settings)))

    return build


def rows_of(run):
    """The metrics of a run, but for its seconds."""
    return [{k: v for k, v in row.items() if k != "rollout/wait_seconds"} for row in read_metrics(run.folder)]


def same_weights(one, other):
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_goes_on_as_if_it_had_not_stopped(start, staleness):
    settings = {"max_staleness": staleness, "save_steps": 2}
    whole = start("whole", **settings).train()
    start("parts", stop_at_iteration=2, **settings).train()
    parts = start("parts", resume_from_checkpoint="last", **settings).train()
    assert parts.start == 2
    assert rows_of(parts) == rows_of(whole)
    assert same_weights(parts, whole)
    assert [row["rollout/staleness"] for row in rows_of(whole)] == (
        [0] * 4 if staleness == 0 else [0, 1, 1, 1]
    )
    assert whole.rollouts.workers.closed


def test_a_lost_worker_ends_the_run_with_a_checkpoint(start):
    whole = start("whole").train()
    lost = start("lost", lost_at=[4])
    with pytest.raises(EngineError, match=r"lost for good.*checkpoint-3.*--resume_from_checkpoint last"):
        lost.train()
    assert lost.rollouts.workers.closed
    assert [path.name for path in lost.folder.glob("checkpoint-*")] == ["checkpoint-3"]
    again = start("lost", resume_from_checkpoint="last").train()
    assert rows_of(again) == rows_of(whole)
    assert same_weights(again, whole)


@pytest.mark.parametrize("staleness", [0, 1])
def test_responses_that_a_function_failed_on_are_not_lost(start, staleness):
    """With staleness nobody has the weights any more that they are by."""
    trouble = trainers_rewards.trouble
    settings = {"max_staleness": staleness, "reward_funcs": ["trainers_rewards:trouble"]}
    trouble.start()
    whole = start("whole", **settings).train()
    trouble.start("raises", 5)  # a question, the calibration, and three rollouts
    with pytest.raises(EngineError, match=r"call 5: .* all updates are in \S+/checkpoint-2"):
        start("parts", **settings).train()
    trouble.start()
    parts = start("parts", resume_from_checkpoint="last", **settings).train()
    assert rows_of(parts) == rows_of(whole)
    assert same_weights(parts, whole)


def test_nothing_is_written_of_a_run_that_has_not_begun(start):
    run = start("lost", lost_at=[1])
    with pytest.raises(EngineError, match=r"lost for good \(ActorDiedError\)$"):
        run.train()
    assert not [*run.folder.glob("checkpoint-*")]


def test_a_stale_rollout_is_scored_again_where_weights_are_truncated(start):
    run = start("stale", max_staleness=1, importance_sampling_cap=1.5, learning_rate=1e-2).train()
    apart = [row["rollout/log_prob_mismatch_max"] for row in rows_of(run)]
    assert apart[0] < 1e-4
    assert min(apart[1:]) > 1e-3


def flags_of(config):
    """What the command line takes for a config."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) not in (None, [], "", field.default)
    }
    return [f"--{name}={json.dumps(v) if isinstance(v, list) else v}" for name, v in given.items()]


def test_a_worker_that_is_killed_changes_nothing(start, make_config):
    """A whole run by the command line with two processes of Ray, one of which dies at work."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'torchrl-maxmin[ray]'")
    settings = {"max_staleness": 1, "save_steps": 2, "num_iterations": 6}
    whole = start("whole", **settings).train()
    functions = ["trainers_rewards:brevity", "trainers_rewards:murderous"]
    config = make_config("killed", rollout_workers=2, reward_funcs=functions, **settings)
    command = [sys.executable, "-m", "torchrl_maxmin", "ppo", *flags_of(config)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if "Ray does not start here" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    folder = Path(config.output_dir)
    assert (folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 4, 6)}
    rows = read_metrics(folder)
    assert rows[-1]["rollout/worker_restarts"] == 1
    for row, wanted in zip(rows, rows_of(whole), strict=True):
        del row["rollout/wait_seconds"], row["rollout/worker_restarts"], wanted["rollout/worker_restarts"]
        assert row == wanted
    assert re.search("rollout worker [12] of 2 was lost; another one took its place", run.stderr)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_staleness": 1}, "--max_staleness is of workers that sample: it needs --rollout_workers"),
        ({"ray_address": "auto"}, "--ray_address is of workers"),
        ({"rollout_worker_gpus": 0.5}, "--rollout_worker_gpus is of workers"),
        ({"rollout_workers": 2, "max_staleness": 2}, "--max_staleness must be between 0 and 1"),
        ({"rollout_workers": -1}, "--rollout_workers must not be negative"),
        ({"rollout_workers": 9}, "--rollout_workers are more than the responses"),
        ({"rollout_workers": 2, "distributed": "ddp"}, "--rollout_workers sample for one trainer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_config, monkeypatch, settings, words):
    monkeypatch.setattr(ppo_settings, "require_ray", lambda: None)
    with pytest.raises(UserError, match=words):
        make_config(**settings).check()


@pytest.fixture
def start_env(monkeypatch, make_env_config):
    """Build a run in an environment whose workers are in this process."""
    monkeypatch.setattr(ppo_settings, "require_ray", lambda: None)

    def build(name, lost_at=(), **settings):
        def workers(config):
            return LocalWorkers(config, lost_at, make_env_sampler)

        monkeypatch.setattr(env_ppo, "start_workers", workers)
        settings = {
            "rollout_workers": 2,
            "num_envs": 20,
            "frames_per_batch": 80,
            "total_frames": 320,
        } | settings
        return EnvPPORun(make_env_config(name, **settings))

    return build


def test_the_number_of_workers_changes_no_run_in_an_environment(start_env):
    runs = [start_env(f"run-{size}", rollout_workers=size).train() for size in (1, 2, 3)]
    assert all(rows_of(run) == rows_of(runs[0]) for run in runs)
    assert all(same_weights(run, runs[0]) for run in runs)
    (summary, *others) = [json.loads((run.folder / "summary.json").read_text()) for run in runs]
    assert all(other["sampled"] == summary["sampled"] for other in others)
    assert runs[0].rollouts.workers.closed


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_in_an_environment_goes_on_as_if_it_had_not_stopped(start_env, staleness):
    settings = {"max_staleness": staleness, "save_steps": 2}
    whole = start_env("whole", **settings).train()
    start_env("parts", stop_at_iteration=2, **settings).train()
    parts = start_env("parts", resume_from_checkpoint="last", **settings).train()
    assert rows_of(parts) == rows_of(whole)
    assert same_weights(parts, whole)
    assert [row["rollout/staleness"] for row in rows_of(whole)] == (
        [0] * 4 if staleness == 0 else [0, 1, 1, 1]
    )


def test_a_worker_that_is_lost_for_good_leaves_a_checkpoint_of_an_environment(start_env):
    lost = start_env("lost", lost_at=[4])
    with pytest.raises(EngineError, match=r"lost for good.*checkpoint-3.*--resume_from_checkpoint last"):
        lost.train()
    start_env("lost", resume_from_checkpoint="last").train()
    assert len(read_metrics(lost.folder)) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout_workers": 2}, "--rollout_workers 2 move 8 copies each at least: raise --num_envs to 16"),
        ({"rollout_workers": 1, "distributed": "ddp"}, "--rollout_workers sample for one trainer"),
        ({"max_staleness": 1}, "it needs --rollout_workers"),
    ],
)
def test_workers_that_an_environment_cannot_have_are_refused(make_env_config, monkeypatch, settings, words):
    monkeypatch.setattr(ppo_settings, "require_ray", lambda: None)
    with pytest.raises(UserError, match=words):
        make_env_config(**settings).check()


def test_without_ray_one_line_says_what_to_install(tiny_model, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchrl_maxmin.rollouts.ray_workers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        require_ray()
    config = small_config(tiny_model, prompt_file, tmp_path / "run")
    code = main(
        [
            *("ppo", "--model_name_or_path", tiny_model, "--dataset_name", prompt_file),
            *("--reward_funcs", *config.reward_funcs, "--output_dir", str(tmp_path / "run")),
            *("--rollout_workers", "2"),
        ]
    )
    assert code == 2
    assert capsys.readouterr().err.splitlines() == [
        "torchrl-maxmin ppo: error: --rollout_workers needs Ray: pip install 'torchrl-maxmin[ray]'"
    ]
    assert not (tmp_path / "run").exists()


def test_without_workers_ray_is_not_imported(monkeypatch):
    known = builtins.__import__

    def refuse(name, *rest, **options):
        assert name != "ray"
        return known(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with ray_session(0):
        assert "ray" not in sys.modules


def test_a_run_that_fails_leaves_one_line(monkeypatch, capsys, tiny_model, prompt_file, tmp_path):
    def fail(config):
        raise EngineError("rollout worker 2 of 2 is lost for good; checkpoint-3 has what was done")

    monkeypatch.setattr(lm_ppo, "run_ppo", fail)
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", prompt_file, "--output_dir", str(tmp_path)]
    assert main(["ppo", *flags]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "torchrl-maxmin ppo: error: rollout worker 2 of 2 is lost for good; checkpoint-3 has what was done"
    ]


def test_the_config_that_is_written_names_the_workers(start):
    run = start("run", num_iterations=1)
    assert "rollout_workers: 2" in (run.folder / "config.yaml").read_text()
    assert json.loads(json.dumps(run.config.max_staleness)) == 0
