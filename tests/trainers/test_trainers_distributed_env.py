"""Several processes train in an environment what one trains on the same steps."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from trainers_runs import EnvPPORun

from torchrl_maxmin.core.distributed import process_group
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.env_ppo import load_env_policy, run_env_ppo
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig

#: copies, rows and minibatches that do not go round on 2 ranks
UNEVEN = {
    "num_envs": 7,
    "frames_per_batch": 63,
    "mini_batch_size": 19,
    "per_device_train_batch_size": 4,
    "utility_scale": 1.0,
    "adversary": "hard_min",
}


class Replay:
    """Rollouts that were drawn before."""

    def __init__(self, batches, env):
        self.batches, self.env = batches, env

    def __iter__(self):
        return iter(self.batches)

    def close(self):
        pass


def train_on(configs, steps):
    """Train on given rollouts; returns the parameters."""
    trained = []
    for values in configs:
        config = EnvPPOConfig(**values)
        with process_group(config.distributed):
            run = EnvPPORun(config)
            run.rollouts.close()
            torch.manual_seed(5)  # decides how minibatches are dealt
            run.parts.rollouts = Replay(torch.load(steps, weights_only=False), run.env)
            run.train()
            trained.append([p.tolist() for part in (run.policy, run.critic) for p in part.parameters()])
    return trained


def assert_same_training(make_env_config, tmp_path, iterations, bar, cases, elementwise=False):
    """Train each case on 1 and on 2 ranks, on the steps of a policy that nobody trained."""
    settings = UNEVEN | {"total_frames": iterations * UNEVEN["frames_per_batch"]}
    drawn = EnvPPORun(make_env_config("drawn", **settings))
    steps = tmp_path / "steps.pt"
    torch.save([batch.clone() for batch in itertools.islice(drawn.rollouts, iterations)], steps)
    runs = []
    for world in (1, 2):
        configs = [
            make_env_config(f"{name}-{world}", distributed="ddp", **(settings | case))
            for name, case in cases.items()
        ]
        each = on_ranks(world, train_on, [dataclasses.asdict(config) for config in configs], steps)
        assert all(parameters == each[0] for parameters in each)  # to the bit
        runs.append(list(zip([Path(config.output_dir) for config in configs], each[0], strict=True)))
    for (one, expected), (two, found) in zip(*runs, strict=True):
        assert len(read_metrics(two)) == iterations
        for row, wanted in zip(read_metrics(two), read_metrics(one), strict=True):
            assert row == pytest.approx(wanted, abs=bar, rel=bar), two.name
        for parameter, wanted in zip(found, expected, strict=True):
            apart = (torch.tensor(parameter).double() - torch.tensor(wanted).double()).abs()
            assert (apart.max() if elementwise else apart.square().mean().sqrt()) <= bar, two.name


def test_two_processes_train_what_one_trains_on_the_same_steps(make_env_config, tmp_path):
    cases = {"hard": {}, "clipped": {"cliprange_value": 0.2, "adversary": "entropy_regularized"}}
    assert_same_training(make_env_config, tmp_path, 3, 1e-4, cases)


@pytest.mark.slow
def test_twenty_iterations_agree_in_every_element(make_env_config, tmp_path):
    assert_same_training(make_env_config, tmp_path, 20, 1e-5, {"hard": {}}, elementwise=True)


def look(configs):
    """The first rollout of each run as a process sees it."""
    seen = []
    for values in configs:
        config = EnvPPOConfig(**values)
        with process_group(config.distributed):
            run = EnvPPORun(config)
            batch = run.first_batch()
            seen.append({
                "own": run.env.batch_size[0],
                "scale": run.utility_scale,
                "utilities": batch["group_utilities"][0, 0].tolist(),
                "weights": batch["group_weights"][0, 0].tolist(),
                "advantage": batch["advantage"].squeeze(-1).tolist(),
                "action": batch["action"].tolist(),
                "looks": batch["observation"].tolist(),
                "done": batch["next", "done"].squeeze(-1).tolist(),
                "returns": batch["next", "episode_group_reward"].tolist(),
            })  # fmt: skip
    return seen


def test_every_process_has_the_steps_of_all(make_env_config):
    """Its own copies are others than another's; utilities are means over the episodes of all."""
    sizes = {"uneven": 7, "more processes than copies": 1}
    configs = [
        make_env_config(name, distributed="ddp", **(UNEVEN | {"num_envs": size, "utility_scale": 0.0}))
        for name, size in sizes.items()
    ]
    views = on_ranks(2, look, [dataclasses.asdict(config) for config in configs])
    assert views[0] == views[1]
    for size, view in zip(sizes.values(), views[0], strict=True):
        assert view["own"] == -(-size // 2)
        returns, done = torch.tensor(view["returns"]), torch.tensor(view["done"])
        assert done.shape == (size, 63 // size)
        utilities = returns[done].double().mean(0)
        torch.testing.assert_close(torch.tensor(view["utilities"]).double(), utilities, atol=1e-5, rtol=1e-5)
        assert view["weights"][int(utilities.argmin())] == 1.0
        advantage = torch.tensor(view["advantage"]).double()
        assert float(advantage.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(advantage.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    for name in ("looks", "action"):
        values = views[0][0][name]
        assert len({str(value) for value in values}) > 4  # 7 copies that move alike would be 4 and 3
    halves = [torch.tensor(views[0][0]["looks"][rows]) for rows in (slice(0, 3), slice(4, 7))]
    assert not torch.equal(*halves)


def run_all(configs):
    for values in configs:
        run_env_ppo(EnvPPOConfig(**values))


def test_a_run_goes_on_with_any_number_of_processes(make_env_config):
    settings = UNEVEN | {"total_frames": 4 * 63, "distributed": "ddp", "eval_episodes": 5}
    whole = make_env_config("whole", **settings, save_steps=2)
    stopped = [make_env_config(f"stopped-{world}", **settings, stop_at_iteration=2) for world in (1, 2)]
    on_ranks(2, run_all, [dataclasses.asdict(config) for config in (whole, *stopped)])
    for world, config in zip((1, 2), stopped, strict=True):
        goes_on = dataclasses.replace(config, stop_at_iteration=0, resume_from_checkpoint="last")
        on_ranks(world, run_all, [dataclasses.asdict(goes_on)])
        folder, expected = Path(config.output_dir), Path(whole.output_dir)
        assert len(read_metrics(folder)) == 4
        load_env_policy(folder)
        if world == 2:
            assert (folder / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
            policies = [path / "policy.safetensors" for path in (folder, expected)]
            assert policies[0].read_bytes() == policies[1].read_bytes()


@pytest.mark.parametrize(("mode", "message"), [("fsdp2", "none of none, ddp"), ("ddp", "torchrun")])
def test_what_does_not_go_together_is_one_line(make_env_config, monkeypatch, mode, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        run_env_ppo(make_env_config(distributed=mode))
