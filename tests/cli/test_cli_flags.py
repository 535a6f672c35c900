"""Flags, YAML and help: one set of keys, flags win, every key explained."""

import dataclasses

import pytest
import yaml
from cli_forms import FORMS, IN_ENV, config_class

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.cli.parsing import config_from_mapping, mentions, parse_config
from torchrl_maxmin.core.run import write_config
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.reward import RewardConfig

REQUIRED = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def parse(form, *words):
    verb, *flags = form.split()
    return parse_config(verb, "", config_class(form), [*flags, *words])


def test_defaults_are_those_of_the_dataclass():
    assert parse("reward", *REQUIRED) == RewardConfig("m", "d", "o")


def test_values_have_the_types_of_their_fields():
    config = parse("reward", *REQUIRED, "--num_groups", "3", "--learning_rate", "1e-3", "--user_column=7")
    assert config == RewardConfig("m", "d", "o", num_groups=3, learning_rate=1e-3, user_column="7")
    assert isinstance(config.num_groups, int)
    assert parse("reward", *REQUIRED, "--num_groups", "auto").num_groups == "auto"
    assert parse("sft", *REQUIRED, "--completion_only_loss", "true").completion_only_loss is True


@pytest.mark.parametrize(
    "words",
    [("--seeds", "0", "1", "2"), ("--seeds=[0, 1, 2]",), ("--seeds", "[0,1,2]"), ("--seeds=0", "1", "2")],
    ids=" ".join,
)
def test_lists_of_numbers(words):
    assert parse("demo", *words, "--num_users", "9").seeds == [0, 1, 2]


def test_lists_of_words():
    assert parse("demo", "--policies", "single").policies == ["single"]
    specs = ["sft=runs/a", "maxmin=runs/b c"]
    words = ["--policies", *specs, "--dataset_name", "d", "--output_dir", "o", "--judge", "j"]
    assert parse("evaluate", *words).policies == specs
    assert parse("ppo", *REQUIRED, "--reward_funcs", "a:f", "7").reward_funcs == ["a:f", "7"]
    assert parse("ppo", *REQUIRED, "--group_weights", "0.25", "0.75").group_weights == [0.25, 0.75]


def test_yaml_holds_the_same_keys(tmp_path):
    keys = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": "o",
        "reward_funcs": ["a:f"],
        "tau": 0.3,
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(keys))
    assert parse("ppo", "--config", str(tmp_path / "ppo.yaml")) == PPOConfig(**keys)


def test_a_rate_without_a_point_is_a_number_in_yaml(tmp_path):
    (tmp_path / "reward.yaml").write_text("learning_rate: 5e-3\n")  # YAML 1.1 alone would read text
    assert parse("reward", *REQUIRED, f"--config={tmp_path}/reward.yaml").learning_rate == 5e-3
    keys = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "learning_rate": "5e-3"}
    assert config_from_mapping(RewardConfig, keys, "here").learning_rate == 5e-3


@pytest.mark.parametrize("config_first", [True, False])
def test_flags_win_over_yaml_wherever_they_stand(tmp_path, config_first):
    (tmp_path / "demo.yaml").write_text("seeds: [1, 2]\nnum_users: 50\nworld: '80:20'\n")
    config, flags = ["--config", str(tmp_path / "demo.yaml")], ["--seeds", "7", "--num_users", "60"]
    given = parse("demo", *(config + flags if config_first else flags + config))
    assert (given.seeds, given.num_users, given.world) == ([7], 60, "80:20")


@pytest.mark.parametrize("verb", FORMS)
def test_a_written_config_reads_back_as_it_was(tmp_path, verb):
    required = {
        "sft": REQUIRED,
        "reward": REQUIRED,
        "diagnose": [*REQUIRED, "--l2", "1e-3"],
        "ppo": [*REQUIRED, "--reward_funcs", "a:f", "--beta", "1e-7"],
        IN_ENV: ["--output_dir", "o", "--env_options", '{"depth": 5}', "--shares", "1", "3", "--tau", "1e-7"],
    }
    words = ["--policies", "sft=a", "--dataset_name", "d", "--output_dir", "o", "--judge", "j"]
    config = parse(
        verb, *(required | {"evaluate": words, "demo": ["--seeds", "3", "--num_groups", "2"]})[verb]
    )
    write_config(tmp_path, config)
    assert parse(verb, "--config", str(tmp_path / "config.yaml")) == config
    moved = parse(verb, "--config", str(tmp_path / "config.yaml"), "--output_dir", "other")
    assert moved == dataclasses.replace(config, output_dir="other")


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("env_id: gridworld\n", True),
        ("tau: 0.3\n'env_id' : gridworld\n", True),
        ('{"env_id": "gridworld", "env_options": {"horizon": 4}}', True),
        ("# env_id: gridworld\ntau: 0.3\n", False),
        ("dataset_name: |\n  x\n  env_id: y\n", False),
        ("reward:\n  env_id: 3\n", False),
        ("- env_id\n", False),
        ("env_id: [\n", False),  # no YAML, which the parser tells
        ("", False),
    ],
)
def test_a_yaml_with_env_id_asks_for_an_environment(tmp_path, text, config):
    (tmp_path / "ppo.yaml").write_text(text)
    for words in (["--config", str(tmp_path / "ppo.yaml")], [f"--config={tmp_path}/ppo.yaml", "--seed", "1"]):
        assert mentions(words, "env_id") is config
    assert not mentions(["--config", str(tmp_path / "nowhere.yaml")], "env_id")


def test_flags_ask_for_an_environment():
    assert mentions(["--seed", "1", "--env_id", "x"], "env_id")
    assert mentions(["--env_id=x"], "env_id")
    assert not mentions(["--env_ids=x", "--dataset_name", "env_id", "--config"], "env_id")


def test_the_environments_form_runs_on_flags_and_yaml(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("torchrl_maxmin.trainers.env_ppo.run_env_ppo", given.append)
    keys = {"env_id": "gridworld", "output_dir": "o", "env_options": {"horizon": 4}, "hidden_sizes": [8]}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(keys))
    assert main(["ppo", "--config", str(tmp_path / "ppo.yaml"), "--seed", "2"]) == 0
    flags = ["--env_options", '{"horizon": 4}', "--hidden_sizes", "8", "--seed", "2", "--output_dir", "o"]
    assert main(["ppo", "--env_id", "gridworld", *flags]) == 0
    assert given == [EnvPPOConfig(**keys, seed=2)] * 2


def test_print_config_is_a_config(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reward", *REQUIRED, "--num_groups", "2", "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "reward.yaml").write_text(capsys.readouterr().out)
    assert parse("reward", "--config", str(tmp_path / "reward.yaml")) == RewardConfig(
        "m", "d", "o", num_groups=2
    )


def test_interrupted(monkeypatch, capsys, tiny_model):
    def stop(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchrl_maxmin.trainers.sft.run_sft", stop)
    assert main(["sft", *REQUIRED]) == 130
    assert capsys.readouterr().err == "torchrl-maxmin sft ends after Ctrl-C\n"
