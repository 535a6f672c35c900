"""Mistakes in flags, their values, YAML and recipes: exit code 2, one line, nothing trained or written."""

import subprocess
import sys

import pytest
from cli_files import contents

from torchrl_maxmin.cli.main import main


def test_unknown_verb(refused):
    verbs = "demo, sft, reward, ppo, evaluate, diagnose, data, plan, report, env, recipes, completion"
    assert f"no verb 'xyz'; choose one of {verbs}" in refused("xyz")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evalute"], "no verb 'evalute'; did you mean evaluate?"),
        (["rewards"], "did you mean reward?"),
        (["--versoin"], "did you mean --version?"),
        (["recipe"], "did you mean recipes?"),
        (["sft", "--output-dir", "x"], "unknown flag --output-dir; did you mean --output_dir?"),
        (["sft", "--lora-r=3"], "unknown flag --lora-r; did you mean --lora_r?"),
        (["demo", "--seed", "3"], "unknown flag --seed; did you mean --seeds?"),
        (["plan", "--model", "m"], "unknown flag --model; see torchrl-maxmin plan --help"),
        (["plan", "--num_group", "2"], "did you mean --num_groups?"),
        (["plan", "--stage", "dpo"], "missing --model_name_or_path"),
        (
            ["plan", "--model_name_or_path", "m", "--stage", "dpo"],
            "--stage 'dpo' is none of ppo, sft, reward",
        ),
        (["data"], "required: action, dataset_name"),
        (["data", "check"], "required: dataset_name"),
        (
            ["data", "check", "p.jsonl", "--user_colum", "u"],
            "unknown flag --user_colum; did you mean --user_column?",
        ),
        (["data", "check", "p.jsonl", "--max_pairs", "many"], "invalid int value: 'many'"),
        (["data", "check", "pairs.jsonl", "--max_length", "0"], "--max_length must be at least 1"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["report", "--folder", "x"], "see torchrl-maxmin report --help"),
        (["env", "torch"], "unrecognized arguments: torch"),
        (["env", "--json"], "unknown flag --json; see torchrl-maxmin env --help"),
        (["recipes", "mv", "x"], "recipes takes ls, or cp NAME [FILE], not 'mv'"),
        (["recipes", "cp"], "needs the name of a recipe"),
        (["recipes", "cp", "enviroment"], "no recipe 'enviroment'; did you mean environment?"),
        (["recipes", "cp", "environment", "pairs.jsonl"], "pairs.jsonl is there already"),
        (["recipes", "cp", "environment", "no/x.yaml"], "there is no folder no; make it"),
        (["completion"], "required: shell"),
        (["completion", "csh"], "choose from"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_no_verb_takes(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize(
    "verb", ["demo", "sft", "reward", "ppo", "ppo in an environment", "evaluate", "diagnose"]
)
def test_unknown_flag(refused, stage, verb):
    assert "unknown flag --output_dri; did you mean --output_dir?" in refused(*stage(verb, output_dri="out"))
    line = refused(*stage(verb, zzz=1))
    assert f"unknown flag --zzz; see torchrl-maxmin {verb.split()[0]} --help" in line


def test_part_of_a_flag_is_an_unknown_flag(refused, stage):
    assert "did you mean --max_steps?" in refused(*stage("sft", max_step=3))


def test_missing_flags(refused, stage):
    assert "missing --model_name_or_path, --dataset_name, --output_dir; see" in refused("sft")
    assert "missing --judge; see" in refused(*stage("evaluate", judge=None))
    assert "required: folder" in refused("report")
    assert "--max_steps needs a value" in refused(*stage("sft"), "--max_steps")


def test_words_that_belong_to_no_flag(refused, stage):
    assert "'3' belongs to no flag" in refused(*stage("sft"), "3")
    assert "choose from" in refused("data", "chekc", "pairs.jsonl")


@pytest.mark.parametrize(
    ("verb", "name", "value", "message"),
    [
        ("sft", "max_steps", "many", "--max_steps takes int, not 'many'"),
        ("sft", "max_steps", "1.5", "--max_steps takes int, not '1.5'"),
        ("sft", "learning_rate", "fast", "--learning_rate takes float, not 'fast'"),
        ("sft", "max_steps", "0", "--max_steps must be at least 1, or -1 to train --num_train_epochs"),
        (
            "sft",
            "per_device_train_batch_size",
            "0",
            "--per_device_train_batch_size must be at least 1; it is 0",
        ),
        ("sft", "learning_rate", ".nan", "--learning_rate must be a finite number; it is nan"),
        ("sft", "lr_scheduler_type", "linaer", "none of linear, cosine"),
        ("sft", "seed", "-1", "--seed must be between 0 and 4294967295; it is -1"),
        ("demo", "seeds", "one", "--seeds takes int, not 'one'"),
        ("demo", "num_users", "few", "--num_users takes int, not 'few'"),
        ("reward", "num_groups", "two", "--num_groups is a positive number or auto, not 'two'"),
        ("reward", "num_groups", "0", "--num_groups is a positive number or auto"),
        ("demo", "num_groups", "two", "--num_groups is a positive number or auto"),
        ("reward", "assignment", "medium", "none of soft, hard"),
        ("reward", "adapters", "shared", "--adapters goes with --use_peft"),
        ("reward", "num_rounds", "0", "--num_rounds must be at least 1"),
        ("reward", "heldout_fraction", "1.5", "--heldout_fraction must be at least 0 and below 1"),
        ("ppo", "objective", "max", "none of min_of_means, mean_of_prompt_mins"),
        ("ppo", "num_iterations", "0", "--num_iterations must be at least 1"),
        ("ppo", "reward_funcs", "nowhere:f", "no reward function 'nowhere:f': write module:function"),
        ("ppo", "reward_funcs", "json:nothing", "write module:function"),
        ("ppo", "reward_funcs", "nowhere.json", "no world file"),
        ("ppo", "tau", "0", "--tau must be positive"),
        ("ppo", "report_to", "file", "none of csv, tensorboard, wandb, mlflow, trackio"),
        ("ppo", "cliprange", "1.5", "--cliprange must be above 0 and at most 1; it is 1.5"),
        ("ppo", "gamma", "1.1", "--gamma must be between 0 and 1"),
        ("ppo", "save_steps", "-1", "--save_steps must not be negative"),
        ("ppo in an environment", "env_id", "fish-wood", "unknown environment 'fish-wood'; batched here: fi"),
        ("ppo in an environment", "env_id", "nowhere:f", "cannot import the environment factory nowhere:f"),
        ("ppo in an environment", "env_id", "math:floor", "math:floor has no option num_envs, seed"),
        ("ppo in an environment", "env_id", "json:dumps", "json:dumps needs the option obj, which was not"),
        (
            "ppo in an environment",
            "env_options",
            '{"depth": 3}',
            "gridworld has no option depth; it has size",
        ),
        (
            "ppo in an environment",
            "env_options",
            '{"seed": 3}',
            "must not hold seed, which has a flag: --see",
        ),
        ("ppo in an environment", "env_options", "depth", "--env_options takes dict, not 'depth'"),
        ("ppo in an environment", "num_envs", "7", "96 steps do not divide among 7 copies"),
        ("ppo in an environment", "num_envs", "many", "--num_envs takes int, not 'many'"),
        ("ppo in an environment", "shares", "[1, 2, 3]", "--shares has 3 numbers, the reward 2 groups"),
        ("ppo in an environment", "shares", "[0, 0]", "--shares must not be negative and not all 0"),
        ("ppo in an environment", "total_frames", "95", "must be at least --frames_per_batch"),
        ("ppo in an environment", "objective", "max", "none of min_of_means, mean_of_mins"),
        ("ppo in an environment", "env_backend", "jax", "none of auto, batched, gym"),
        ("ppo in an environment", "hidden_sizes", "[0]", "--hidden_sizes must be at least 1 each"),
        ("ppo in an environment", "dataset_name", "pairs.jsonl", "unknown flag --dataset_name; see"),
        ("evaluate", "num_samples", "0", "--num_samples must be at least 1"),
        ("evaluate", "certificate_samples", "6", "a positive multiple of 4"),
        ("evaluate", "beta", "0", "--beta must be positive"),
        ("evaluate", "beta", "0.1", "--beta needs --reward_model_path"),
        ("evaluate", "certify", "best", "--certify needs --reward_model_path"),
        ("evaluate", "reward_bound", "2", "--reward_bound needs --reward_model_path"),
        ("evaluate", "reward_bound", "0", "--reward_bound must be positive"),
        ("evaluate", "judge", "nowhere:f", "no reward function"),
        ("evaluate", "judge", "http://localhost:1/v1", "needs --judge_model, and --judge_criteria"),
        ("diagnose", "num_groups", "two", "--num_groups is a positive number or auto, not 'two'"),
        ("diagnose", "num_groups", "4", "--num_groups 4 is more than the 3 users"),
        ("diagnose", "num_jackknife", "1", "--num_jackknife must be 0 or at least 2"),
        ("diagnose", "dataset_name", "nowhere.npz", "there is no such file"),
        ("demo", "world", "1:1", "unknown world '1:1'; choose one of 10:1, 80:20"),
        ("demo", "policies", "best", "--policies knows single, maxmin, oracle, not 'best'"),
        ("demo", "seeds", "-1", "none below 0"),
        ("demo", "num_users", "1", "--num_users must be at least 2"),
        ("demo", "pairs_per_user", "0", "--pairs_per_user must be at least 1"),
        ("demo", "num_workers", "-1", "--num_workers must be at least 0"),
        ("demo", "recipe", "nowhere.yaml", "no recipe file 'nowhere.yaml'"),
        ("demo", "report_to", "tensorbord", "none of csv, tensorboard, wandb, mlflow, trackio"),
        ("sft", "report_to", "tensorbord", "none of csv, tensorboard, wandb, mlflow, trackio"),
        ("reward", "report_to", "tensorbord", "none of csv, tensorboard, wandb, mlflow, trackio"),
    ],
)
def test_wrong_values(refused, stage, verb, name, value, message):
    assert message in refused(*stage(verb, **{name: value}))


def test_a_logger_whose_package_is_missing(refused, stage, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.core.settings.find_spec", lambda package: None)
    for verb in ("sft", "reward", "ppo", "ppo in an environment", "demo"):
        assert refused(*stage(verb, report_to="wandb")).endswith("needs its package: pip install wandb")


def test_an_environment_that_never_ends(refused, stage, here, capsys):
    """A factory beside the command is found; the folder that was made stays empty."""
    (here / "factory_beside.py").write_text(
        "from torchrl_maxmin.envs import TabularEnv, VectorMDP\n"
        "def make(num_envs, seed):\n"
        "    return TabularEnv(VectorMDP.random(3, 2, 2), num_envs, seed=seed)\n"
    )
    (here / "out").mkdir()
    (here / "__pycache__").mkdir()
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        for scale in ("0", "1"):
            words = stage("ppo in an environment", env_id="factory_beside:make", utility_scale=scale)
            assert "did not end in 120 steps; cut episodes by --max_episode_steps" in refused(*words)
    finally:
        sys.dont_write_bytecode = before
    assert main([str(word) for word in words] + ["--max_episode_steps", "5", "--eval_episodes", "8"]) == 0
    assert capsys.readouterr().out == "ppo done: out\n"


def test_a_reward_that_turns_nan(here, stage, capsys, monkeypatch):
    """No mistake on the command line, but a line all the same: it names the batch that was saved."""
    (here / "rewards_that_turn.py").write_text(
        "calls = []\n"
        "def score(prompts, completions):\n"
        "    calls.append(len(completions))\n"
        "    bad = len(calls) > 2  # after the first question and the calibration\n"
        "    return [float('nan') if bad else float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(here)
    small = {"rollout_batch_size": 4, "response_length": 4, "calibration": "sft_mean"}
    words = stage("ppo", reward_funcs="rewards_that_turn:score", **small)
    assert main([str(word) for word in words]) == 1
    saved = here / "out" / "nonfinite_batch.safetensors"
    assert saved.is_file()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "torchrl-maxmin ppo: error: a reward is nan; "
        "the batch that gave it is in out/nonfinite_batch.safetensors"
    )


def test_lists_that_repeat_or_lack_something(refused, stage, tiny_model):
    assert "distinct" in refused(*stage("demo"), "--seeds", "0", "0")
    assert "one or more" in refused(*stage("demo"), "--seeds")
    assert "twice" in refused(*stage("demo"), "--policies", "maxmin", "maxmin")
    line = refused(*stage("evaluate", policies=f"maxmin={tiny_model}"))
    assert "--policies needs sft=folder" in line
    assert "'sft' has no folder" in refused(*stage("evaluate", policies="sft"))
    assert "a policy to compare with sft" in refused(*stage("evaluate", policies=f"sft={tiny_model}"))
    assert "a policy to compare with sft" in refused(*stage("demo"), "--policies")
    line = refused(*stage("evaluate", certify="best", reward_model_path=tiny_model))
    assert line.endswith("--certify 'best' is none of --policies: sft, maxmin")
    same = [f"sft={tiny_model}", f"sft={tiny_model}"]
    assert "twice" in refused(*stage("evaluate", policies=None), "--policies", *same)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: many\n", "--max_steps takes int, not 'many'"),
        ("max_stepz: 3\n", "unknown key 'max_stepz'; did you mean max_steps?"),
        ("seed: null\n", "--seed needs a value"),
        ("dataset_split: 10:1\n", "--dataset_split takes str, not '601' (in YAML, put it in quotes)"),
        ("- 1\n", "--config must be a YAML file"),
        ("", "--config must be a YAML file"),
        ("max_steps: [\n", "flow node"),
    ],
)
def test_mistakes_in_a_config_file(refused, stage, here, text, message):
    (here / "odd.yaml").write_text(text)
    assert message in refused(*stage("sft", config="odd.yaml"))


def test_no_config_file(refused, stage):
    assert "nowhere.yaml" in refused(*stage("sft", config="nowhere.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppo: {num_iterations: many}\n", "section ppo: num_iterations takes int, not 'many'"),
        (
            "ppo: {num_iteration: 3}\n",
            "section ppo: unknown key 'num_iteration'; did you mean num_iterations?",
        ),
        ("ppo: {num_iterations: 0}\n", "--num_iterations must be at least 1"),
        ("reward: {num_rounds: 0}\n", "--num_rounds must be at least 1"),
        ("evaluate: {certificate_samples: 3}\n", "multiple of 4"),
        ("world: {num_prompts: 0}\n", "section world: every size must be at least 1"),
        ("sft: {seed: 3}\n", "section sft: 'seed' is set by the demo; remove it"),
        ("pppo: {tau: 1}\n", "has a section 'pppo'; it may have world, sft, reward, ppo, evaluate"),
        ("- 1\n", "must hold sections"),
        ("ppo: 3\n", "must hold sections"),
        ("ppo: [\n", "is no YAML"),
    ],
)
def test_mistakes_in_a_recipe(refused, stage, here, text, message):
    (here / "odd.yaml").write_text(text)
    assert message in refused(*stage("demo", recipe="odd.yaml"))


def test_report_of_nothing(refused, here):
    missing = "no summary.json in nowhere; give the output folder of demo, evaluate, diagnose or reward"
    assert missing in refused("report", "nowhere")
    (here / "reward").mkdir()
    (here / "reward" / "summary.json").write_text('{"num_groups": 2}')
    assert "reward holds no results by group; give the folder of demo" in refused("report", "reward")


@pytest.mark.parametrize(
    "content",
    [b'{"policies": {"maxmin": {}}', b'{"policies": {"maxmin": {}}}', b"\xff{}", b"[]", b'{"proof_gaps": 3}'],
    ids=["cut", "lacks figures", "no text", "a list", "a number"],
)
def test_report_of_a_damaged_summary(refused, here, content):
    """What a flipped bit or a full disk leaves is said in a line, and the other files stay."""
    (here / "results").mkdir()
    (here / "results" / "summary.json").write_bytes(content)
    assert "results/summary.json is not what was written there" in refused("report", "results")
    assert [path.name for path in (here / "results").iterdir()] == ["summary.json"]


def test_a_damaged_record_is_named(here):
    from torchrl_maxmin.core.errors import UserError
    from torchrl_maxmin.evaluation.results import SeedResult

    (here / "result").mkdir()
    for name in ("arrays.npz", "result.json"):
        (here / "result" / name).write_text('{"groups": ')
    with pytest.raises(UserError, match=r"result\.json is not what was written there"):
        SeedResult.load(here / "result")


def test_settings_that_are_no_text(refused, here):
    (here / "settings.yaml").write_bytes(b"seed: \xe5\n")
    said = refused("ppo", "--config", "settings.yaml", "--output_dir", "out")
    assert "settings.yaml is no text in UTF-8" in said
    assert "recipe settings.yaml is no YAML" in refused("demo", "--recipe", "settings.yaml")


# -- through the shell -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("reward", "--num_groups", "4"), "more than the 3 users"),
        (("reward", "--nun_groups", "2"), "did you mean --num_groups?"),
        (("reward", "--output_dir", "."), "is not empty"),
    ],
)
def test_console_entry(here, tiny_model, words, message):
    before = contents(here)
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", "pairs.jsonl", "--output_dir", "out"]
    command = [sys.executable, "-m", "torchrl_maxmin", words[0], *flags, *words[1:]]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert message in run.stderr
    assert contents(here) == before
    assert not (here / "out").exists()
