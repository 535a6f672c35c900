"""Several processes train what one trains: the same batches, losses, weights and parameters."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import WAIT_S, assert_same_parameters, free_port, on_ranks, saved_parameters
from trainers_runs import PPORun, small_config

from torchrl_maxmin.core.distributed import process_group, share_of_rows
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.objectives import MaxMinPPOLoss
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.trainers.lm_ppo import run_ppo
from torchrl_maxmin.trainers.ppo_config import PPOConfig

#: on any processor; a test that is marked slow has the bar of 1e-5 for every element
BAR = 1e-4

#: 63 rows on 2 ranks, in micro-batches that do not go round
UNEVEN = {
    "rollout_batch_size": 63,
    "mini_batch_size": 16,
    "per_device_train_batch_size": 3,
    "num_ppo_epochs": 1,
    "learning_rate": 3e-4,
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 100,
    "entropy_coeff": 0.01,
    "scoring_batch_size": 7,
    "generation_batch_size": 5,
    "reward_funcs": ["trainers_rewards:brevity", "trainers_rewards:sparse_letters"],
}
CASES = {
    "uneven": UNEVEN,
    "grpo": {
        "advantage": "grpo",
        "num_generations": 3,
        "rollout_batch_size": 9,
        "top_k": 20,
        "temperature": 0.8,
    },
    "prompts": {"objective": "mean_of_prompt_mins", "num_generations": 4, "calibration": "win_rate"},
    "heads": {"critic": "heads", "gradient_checkpointing": True},
}
LORA = {"use_peft": True, "lora_r": 4}
ADAPTERS = {
    # rewards on the policy's trunk, by adapters of their own
    "adapters": {**LORA, "gradient_checkpointing": True, "reward_model_path": "rewards", "reward_funcs": []},
    "adapter alone": {**LORA, "critic": "full", "merge_adapter": False},
}
COPIES_ALONE = {
    "certificate": {"gap_steps": 2, "certificate_prompts": 16, "certificate_samples": 4, "num_iterations": 2},
}


def train_all(configs):
    for values in configs:
        run_ppo(PPOConfig(**values))


def train_with_little_memory(values):
    """Let the second of two processes fail once, at its second part; returns the rows of its parts."""
    rows, losses = [], MaxMinPPOLoss.losses_by_network

    def fail(loss, part):
        rows.append(len(part))
        if int(os.environ["RANK"]) == 1 and len(rows) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(loss, part)

    MaxMinPPOLoss.losses_by_network = fail
    run_ppo(PPOConfig(**values))
    MaxMinPPOLoss.losses_by_network = losses
    return rows


def run_on_ranks(world, mode, make_config, cases, **settings):
    """Run cases one after another; returns their folders."""
    configs = {
        name: make_config(f"{mode}-{world}/{name}", distributed=mode, **(case | settings))
        for name, case in cases.items()
    }
    on_ranks(world, train_all, [dataclasses.asdict(config) for config in configs.values()])
    return {name: Path(config.output_dir) for name, config in configs.items()}


def assert_same_run(found, expected, bar=BAR):
    (saved,) = expected.glob("*model.safetensors")  # or the adapter's
    assert_same_parameters(found / saved.name, saved, bar)
    for row, wanted in zip(read_metrics(found), read_metrics(expected), strict=True):
        # a share of the variance of a KL that is nothing but rounding at first
        assert row.pop("val/explained_var/kl", 0) == pytest.approx(
            wanted.pop("val/explained_var/kl", 0), abs=0.05
        )
        assert row == pytest.approx(wanted, abs=bar, rel=bar), found.name


@pytest.fixture(scope="module")
def make_shared_config(tiny_model, prompt_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    mixture = RewardMixture.from_backbone(tiny_model, 2, use_peft=True, lora_r=2)
    with torch.no_grad():
        for parameter in mixture.trunk_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mixture.save_pretrained(root / "rewards")

    def make(name, **settings):
        if "reward_model_path" in settings:
            settings["reward_model_path"] = str(root / settings["reward_model_path"])
        # prompts and samples do not go round on 2 ranks
        base = {"calibration_prompts": 11, "calibration_samples": 3, "num_iterations": 3}
        return small_config(tiny_model, prompt_file, root / name, **(base | settings))

    return make


@pytest.fixture(scope="module")
def on_one(make_shared_config):
    """The runs of a single process."""
    return run_on_ranks(1, "ddp", make_shared_config, CASES | ADAPTERS | COPIES_ALONE)


def test_two_copies_train_what_one_trains(on_one, make_shared_config):
    cases = CASES | ADAPTERS | COPIES_ALONE
    for name, folder in run_on_ranks(2, "ddp", make_shared_config, cases).items():
        assert_same_run(folder, on_one[name])


def test_a_process_that_wants_memory_halves_its_parts_alone(on_one, make_shared_config):
    config = make_shared_config("little", distributed="ddp", save_steps=3, **UNEVEN)
    one, other = on_ranks(2, train_with_little_memory, dataclasses.asdict(config))
    assert one[:3] == [3, 3, 2]
    assert other[:6] == [3, 3, 2, 2, 2, 2]
    assert len(other) > len(one)
    assert_same_run(Path(config.output_dir), on_one["uneven"])


def test_two_parts_train_what_one_trains(on_one, make_shared_config):
    for name, folder in run_on_ranks(2, "fsdp2", make_shared_config, CASES | ADAPTERS).items():
        assert_same_run(folder, on_one[name])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "lora"), [("ddp", {}), ("fsdp2", {}), ("fsdp2", LORA)])
def test_twenty_iterations_agree_in_every_element(make_shared_config, mode, lora):
    twenty = {f"twenty-{len(lora)}": {"num_iterations": 20, **lora}}
    (one,) = run_on_ranks(1, mode, make_shared_config, twenty).values()
    (two,) = run_on_ranks(2, mode, make_shared_config, twenty).values()
    assert_same_run(two, one, 1e-5)
    assert_same_parameters(two / "model.safetensors", one / "model.safetensors", 1e-5, elementwise=True)


HALF = {
    "autocast": {"bf16": True, "num_iterations": 1},
    "weights": {"dtype": "bfloat16", "num_iterations": 1, "gradient_checkpointing": True},
}


def test_parts_compute_in_half_precision(make_shared_config):
    expected = run_on_ranks(1, "ddp", make_shared_config, HALF)
    for name, folder in run_on_ranks(2, "fsdp2", make_shared_config, HALF).items():
        (row,), (wanted,) = read_metrics(folder), read_metrics(expected[name])
        for metrics in (row, wanted):
            for key in [key for key in metrics if key.startswith("val/explained_var")]:
                del metrics[key]
        assert row == pytest.approx(wanted, abs=0.05, rel=0.02), name
        one, other = (saved_parameters(path / "model.safetensors") for path in (folder, expected[name]))
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, atol=0.02, rtol=0.02)


def share_held(named):
    """How much of some parameters this process holds."""
    parameters = [p for _, p in named]
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters)
    return held / sum(p.numel() for p in parameters)


def look_at_first_rollout(values):
    """The first rollout's weights, what this process's own rows say, and how much of the policy it holds."""
    config = PPOConfig(**values)
    with process_group(config.distributed):
        run = PPORun(config)
        batch = run.first_batch()
        index, real = share_of_rows(len(batch))
        own = batch["next", "group_reward"][index[real]].mean(0)
        named = list(run.policy.model.named_parameters())
        adapters = [(name, p) for name, p in named if ".lora_" in name]
        trunk = [(name, p) for name, p in named if ".lora_" not in name and not (adapters and "wte" in name)]
        return {
            "prompts": batch["prompt_index"].tolist(),
            "actions": batch["action"].tolist(),
            "own_worst": int(own.argmin()),
            "weights": batch["group_weights"][0].tolist(),
            "held": share_held(trunk),
            "adapters": share_held(adapters) if adapters else None,
        }


@pytest.mark.parametrize(("mode", "lora"), [("ddp", {}), ("fsdp2", {}), ("fsdp2", LORA)])
def test_a_minimum_of_each_process_would_train_two_groups(make_shared_config, tmp_path, mode, lora):
    """One process answers the short prompts, the other the long ones; a group is well off at one kind."""
    order = torch.randperm(
        8, generator=torch.Generator().manual_seed(0)
    ).tolist()  # of the first epoch of seed 0
    short, long = "the film", "the film that was shown to everybody in the evening"
    prompts = {place: (short if i < 4 else long) + f" {i} ." for i, place in enumerate(order)}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompts[i]}) + "\n" for i in range(8)))
    config = make_shared_config(
        f"worst-{mode}{len(lora)}",
        distributed=mode,
        **lora,
        dataset_name=str(path),
        reward_funcs=["trainers_rewards:for_long_prompts", "trainers_rewards:for_short_prompts"],
        calibration="none",
        adversary="hard_min",
        missing_eos_penalty=0.0,
    )
    one, other = on_ranks(2, look_at_first_rollout, dataclasses.asdict(config))
    assert one["prompts"] == other["prompts"] == order
    assert one["actions"] == other["actions"]
    assert (one["own_worst"], other["own_worst"]) == (0, 1)
    assert one["weights"] == other["weights"] == [1.0, 0.0]
    assert one["held"] == pytest.approx(1.0 if mode == "ddp" else 0.5, abs=0.01)
    assert one["adapters"] == (1.0 if lora else None)


@pytest.mark.parametrize(
    ("mode", "lora"), [("ddp", {}), ("fsdp2", {}), ("fsdp2", {**LORA, "critic": "full"})]
)
def test_a_run_goes_on_with_any_number_of_processes(make_shared_config, mode, lora):
    settings = {"num_iterations": 4, "kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 100} | lora
    (whole,) = run_on_ranks(2, mode, make_shared_config, {f"whole-{len(lora)}": settings}).values()
    for world in (2, 1):
        name = f"stopped-{world}-{len(lora)}"
        stopped = make_shared_config(f"{mode}/{name}", distributed=mode, **settings, stop_at_iteration=2)
        on_ranks(2, train_all, [dataclasses.asdict(stopped)])
        assert not (Path(stopped.output_dir) / "model.safetensors").exists()
        checkpoint = Path(stopped.output_dir) / "checkpoint-2"
        assert len(list(checkpoint.glob("shards/*.safetensors"))) == (2 if mode == "fsdp2" else 0)
        goes_on = dataclasses.replace(stopped, stop_at_iteration=0, resume_from_checkpoint="last")
        on_ranks(world, train_all, [dataclasses.asdict(goes_on)])
        resumed = Path(goes_on.output_dir)
        if world == 2:
            assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
            assert (resumed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
        assert_same_run(resumed, whole)


def refuse(values):
    with pytest.raises(UserError) as caught:
        run_ppo(PPOConfig(**values))
    return str(caught.value)


def test_what_does_not_go_together_is_one_line(make_shared_config, monkeypatch):
    config = make_shared_config("refused", distributed="ddp")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert "torchrun --nproc_per_node N -m torchrl_maxmin" in refuse(vars(config))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give --distributed ddp or fsdp2" in refuse(vars(config) | {"distributed": "none"})
    assert "none of none, ddp, fsdp2" in refuse(vars(config) | {"distributed": "dp"})
    assert not Path(config.output_dir).exists()


def test_a_mistake_of_the_main_process_is_that_of_all(make_shared_config):
    config = make_shared_config("used", distributed="ddp")
    Path(config.output_dir).mkdir(parents=True)
    (Path(config.output_dir) / "notes.txt").write_text("mine")
    messages = on_ranks(2, refuse, dataclasses.asdict(config))
    assert [message.count("is not empty") for message in messages] == [1, 1]


def test_a_sharded_checkpoint_is_not_for_one_process_by_itself(make_shared_config):
    settings = {"num_iterations": 2, "stop_at_iteration": 1}
    config = make_shared_config("shards", distributed="fsdp2", **settings)
    on_ranks(2, train_all, [dataclasses.asdict(config)])
    alone = vars(config) | {"distributed": "none", "stop_at_iteration": 0, "resume_from_checkpoint": "last"}
    assert "written by --distributed fsdp2" in refuse(alone)


def train_again(values):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    run_ppo(PPOConfig(**values))


def test_a_run_that_failed_at_either_end_is_started_again(make_shared_config):
    """Before its first checkpoint, with files in its folder; behind its last one, with no policy saved."""
    config = make_shared_config("again", distributed="ddp", num_iterations=2, save_steps=2)
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("half a li")
    on_ranks(2, train_again, dataclasses.asdict(config))
    policy, metrics = folder / "model.safetensors", (folder / "metrics.jsonl").read_text()
    first = policy.read_bytes()
    policy.unlink()
    on_ranks(2, train_again, dataclasses.asdict(config))
    assert policy.read_bytes() == first
    assert (folder / "metrics.jsonl").read_text() == metrics
    assert len(metrics.splitlines()) == 2


def deadly_run(make_shared_config, name, settings):
    """The config, flags and environment of a run whose second process dies at its seventh call."""
    functions = ["trainers_rewards:brevity", "trainers_rewards:deadly"]
    killed = make_shared_config(name, distributed="ddp", **settings, reward_funcs=functions)
    given = dataclasses.asdict(killed).items()
    flags = [f"--{name}={value}" for name, value in given if _is_given(name, value)]
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    return killed, [*flags, f"--reward_funcs={json.dumps(functions)}"], environment


def test_a_process_whose_other_is_killed_says_so_in_one_line(make_shared_config):
    """Without a launcher, which may end it before it can."""
    settings = {"num_iterations": 5, "num_ppo_epochs": 1, "save_steps": 2}
    _, flags, environment = deadly_run(make_shared_config, "left", settings)
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "torchrl_maxmin", "ppo", *flags]
    first, second = (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": "0"},
        )
        for rank in ("0", "1")
    )  # fmt: skip
    second.communicate(timeout=WAIT_S)
    assert second.returncode == -signal.SIGKILL
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    ours = [line for line in errors.splitlines() if line.startswith("torchrl-maxmin")]
    assert len(ours) == 1
    assert "rank 0 ends since another process" in ours[0]


def test_a_killed_process_ends_the_others_and_torchrun_goes_on(make_shared_config):
    """The others say so in one line; the run started again ends as one that nobody killed."""
    settings = {"num_iterations": 5, "num_ppo_epochs": 1, "save_steps": 2}
    killed, flags, environment = deadly_run(make_shared_config, "killed", settings)
    (whole,) = run_on_ranks(2, "ddp", make_shared_config, {"unkilled": settings}).values()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"),
        *(f"--master_port={free_port()}", "-m", "torchrl_maxmin", "ppo"),
        *flags,
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT_S)
    assert run.returncode == 0, run.stderr
    ours = [line for line in run.stderr.splitlines() if line.startswith("torchrl-maxmin")]
    assert ours == [line for line in ours if "rank 0 ends since another process" in line]
    assert len(ours) <= 1  # torchrun may end it before it can say so
    assert run.stdout.count("ppo done") == 1
    killed_folder = Path(killed.output_dir)
    assert (killed_folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (killed_folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def _is_given(name, value):
    return value not in (None, [], "") and value != getattr(PPOConfig, name, None) and name != "reward_funcs"
