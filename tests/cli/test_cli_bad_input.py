"""Mistakes of the user's: exit code 2, one line that names cause and fix, nothing trained or written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.preferences.world import World

PAIR = {"prompt": "the film", "chosen": "was great .", "rejected": "was dull .", "user_id": "ann"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a few good files in it."""
    monkeypatch.chdir(tmp_path)
    users = [{**PAIR, "user_id": user} for user in ("ann", "ann", "bob", "bob", "eve", "eve")]
    write_rows(tmp_path / "pairs.jsonl", users)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "the film"}, {"prompt": "a story"}])
    World.preset("10:1").save(tmp_path / "world.json")
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail; returns its one line."""

    def run(*words):
        before = contents(here), set(here.rglob("*"))
        assert main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(f"torchrl-maxmin {words[0]}: error: ")
        assert (contents(here), set(here.rglob("*"))) == before
        return lines[0]

    return run


@pytest.fixture
def stage(tiny_model):
    """Flags with which each stage would run."""

    def flags(verb, **changes):
        common = {"model_name_or_path": tiny_model, "output_dir": "out"}
        base = {
            "sft": {**common, "dataset_name": "pairs.jsonl"},
            "reward": {**common, "dataset_name": "pairs.jsonl", "num_groups": 2},
            "ppo": {**common, "dataset_name": "prompts.jsonl", "reward_funcs": "world.json"},
            "evaluate": {
                "policies": f"[sft={tiny_model}, maxmin={tiny_model}]",
                "dataset_name": "prompts.jsonl",
                "output_dir": "out",
                "judge": "world.json",
            },
            "diagnose": {**common, "dataset_name": "pairs.jsonl", "num_groups": 2},
            "demo": {"output_dir": "out"},
            "ppo in an environment": {
                "env_id": "gridworld",
                "output_dir": "out",
                "num_envs": 8,
                "frames_per_batch": 96,
                "total_frames": 192,
                "device": "cpu",
            },
        }[verb]
        given = {name: value for name, value in (base | changes).items() if value is not None}
        return [verb.split()[0], *(part for name, value in given.items() for part in (f"--{name}", value))]

    return flags


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_pairs_without_a_column(refused, stage, here, column):
    row = {name: value for name, value in PAIR.items() if name != column}
    write_rows(here / "odd.jsonl", [row, row])
    line = refused(*stage("reward", dataset_name="odd.jsonl"))
    assert f"needs the column(s) {column}; found" in line
    assert "Rename" in line


def test_pairs_without_a_user(refused, stage, here):
    write_rows(here / "odd.jsonl", [{name: PAIR[name] for name in ("prompt", "chosen", "rejected")}])
    assert "--user_column" in refused(*stage("reward", dataset_name="odd.jsonl"))
    assert "--user_column" in refused("data", "check", "odd.jsonl")
    assert "column(s) who" in refused(*stage("reward", user_column="who"))


@pytest.mark.parametrize("verb", ["ppo", "evaluate"])
def test_prompts_without_a_prompt(refused, stage, here, verb):
    write_rows(here / "odd.jsonl", [{"text": "the film"}])
    assert "needs the column(s) prompt; found text" in refused(*stage(verb, dataset_name="odd.jsonl"))


@pytest.mark.parametrize(
    ("verb", "message"), [("reward", "no rows"), ("ppo", "no prompts"), ("evaluate", "no prompts")]
)
def test_no_rows(refused, stage, here, verb, message):
    (here / "empty.jsonl").write_text("")
    assert message in refused(*stage(verb, dataset_name="empty.jsonl"))


def test_texts_of_no_known_form(refused, stage):
    line = refused(*stage("sft", dataset_name="prompts.jsonl"))
    assert "prompt and completion, or text" in line
    assert "found prompt" in line


@pytest.mark.parametrize("groups", ["2", "auto"])
def test_one_user(refused, stage, here, groups):
    write_rows(here / "one.jsonl", [PAIR, PAIR])
    line = refused(*stage("reward", dataset_name="one.jsonl", num_groups=groups))
    assert "one user" in line
    assert "--num_groups 1" in line
    assert "check --user_column" in refused(*stage("diagnose", dataset_name="one.jsonl", num_groups=groups))


def test_chosen_equal_to_rejected(refused, stage, here):
    write_rows(here / "same.jsonl", [PAIR, {**PAIR, "rejected": PAIR["chosen"]}])
    line = refused(*stage("reward", dataset_name="same.jsonl"))
    assert "row 1: chosen equals rejected" in line
    assert "drop" in line


def test_more_groups_than_users(refused, stage):
    line = refused(*stage("reward", num_groups=4))
    assert "--num_groups 4 is more than the 3 users" in line
    assert "at most 3" in line
    assert "at most 9" in refused(*stage("demo", num_groups=10, num_users=9))


# -- models and folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo", "diagnose"])
def test_model_folder_that_does_not_exist(refused, stage, here, verb):
    line = refused(*stage(verb, model_name_or_path=here / "nowhere"))
    assert "nowhere" in line
    assert "check --model_name_or_path" in line


def test_other_models_that_do_not_exist(refused, stage, here, tiny_model):
    away = here / "nowhere"
    assert "nowhere" in refused(*stage("evaluate", policies=f"[sft={away}, maxmin={tiny_model}]"))
    assert "nowhere" in refused(*stage("evaluate", reward_model_path=away))
    assert "nowhere" in refused(*stage("ppo", reward_funcs=None, reward_model_path=away))
    (here / "hollow").mkdir()
    assert "without config.json" in refused(*stage("sft", model_name_or_path="hollow"))
    assert "without config.json" in refused(*stage("evaluate", judge="hollow"))


@pytest.mark.parametrize(
    "verb", ["sft", "reward", "ppo", "ppo in an environment", "evaluate", "diagnose", "demo"]
)
def test_output_folder_that_is_not_empty(refused, stage, here, verb):
    (here / "out").mkdir()
    (here / "out" / "precious.txt").write_text("mine")
    line = refused(*stage(verb))
    assert "output folder out is not empty" in line
    assert "--output_dir" in line


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo", "evaluate"])
@pytest.mark.parametrize(
    ("file", "keep", "message"),
    [
        ("config.json", 0.5, "cannot read the config of damaged (OSError: "),
        ("tokenizer.json", None, "cannot read the tokenizer of damaged (ValueError: "),
        ("tokenizer.json", 0.5, "cannot read the tokenizer of damaged (JSONDecodeError: "),
        ("model.safetensors", None, "cannot read the model of damaged (OSError: "),
        ("model.safetensors", 0.5, "cannot read the model of damaged (SafetensorError: "),
    ],
)
def test_a_model_folder_that_is_damaged(here, stage, capsys, tiny_model, verb, file, keep, message):
    """As after a download that broke off."""
    path = Path(shutil.copytree(tiny_model, here / "damaged")) / file
    content = path.read_bytes()
    path.unlink()
    if keep:
        path.write_bytes(content[: int(keep * len(content))])
    name = "policies" if verb == "evaluate" else "model_name_or_path"
    given = f"[sft=damaged, maxmin={tiny_model}]" if verb == "evaluate" else "damaged"
    assert main([str(word) for word in stage(verb, **{name: given})]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.endswith("if files are missing or damaged, save or download it again")
    assert not list((here / "out").glob("*"))


def test_output_folder_that_is_a_file(refused, stage, here):
    (here / "out").write_text("mine")
    assert "output folder out" in refused(*stage("sft"))


def test_a_checkpoint_that_is_damaged(refused, stage, here):
    (here / "out" / "checkpoint-1").mkdir(parents=True)
    for content in (b"", b"PK\x03\x04half", b"\x80garbage"):
        (here / "out" / "checkpoint-1" / "state.pt").write_bytes(content)
        line = refused(*stage("ppo", resume_from_checkpoint="last"))
        assert "checkpoint-1/state.pt is damaged and cannot be read" in line


def test_no_checkpoint_to_resume(refused, stage, here):
    line = refused(*stage("ppo", resume_from_checkpoint="last"))
    assert "no checkpoint in out" in line
    assert "without --resume_from_checkpoint" in line
    assert "no checkpoint at" in refused(*stage("ppo", resume_from_checkpoint="checkpoint-7"))
    assert "no checkpoint in out" in refused(*stage("ppo in an environment", resume_from_checkpoint="last"))


def test_cuda_without_a_gpu(refused, stage, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for verb in ("sft", "reward", "ppo", "ppo in an environment", "evaluate", "diagnose", "demo"):
        assert "--device cpu" in refused(*stage(verb, device="cuda"))
    assert "give cpu, cuda" in refused(*stage("sft", device="abacus"))


def test_without_transformers(refused, stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for verb in ("sft", "demo"):
        line = refused(*stage(verb))
        assert "transformers" in line
        assert "pip install 'torchrl-maxmin[llm]'" in line


# -- flags -----------------------------------------------------------------------------------------


def test_unknown_verb(refused):
    assert "choose one of demo, sft, reward, ppo, evaluate, diagnose, data, report, env" in refused("trane")


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
        ("reward", "adapters", "shared", "--adapters and --lora_target_modules go with --use_peft true"),
        ("reward", "num_rounds", "0", "--num_rounds must be at least 1"),
        ("reward", "heldout_fraction", "1.5", "--heldout_fraction must be at least 0 and below 1"),
        ("ppo", "objective", "max", "none of min_of_means, mean_of_prompt_mins"),
        ("ppo", "num_iterations", "0", "--num_iterations must be at least 1"),
        ("ppo", "reward_funcs", "nowhere:f", "no reward function 'nowhere:f': write module:function"),
        ("ppo", "reward_funcs", "json:nothing", "write module:function"),
        ("ppo", "reward_funcs", "nowhere.json", "no world file"),
        ("ppo", "tau", "0", "--tau must be positive"),
        ("ppo", "report_to", "file", "none of csv, tensorboard, wandb, mlflow"),
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
    ],
)
def test_wrong_values(refused, stage, verb, name, value, message):
    assert message in refused(*stage(verb, **{name: value}))


def test_a_logger_whose_package_is_missing(refused, stage, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.trainers.ppo_settings.find_spec", lambda package: None)
    for verb in ("ppo", "ppo in an environment"):
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
    saved = here / "out" / "nonfinite_batch.pt"
    assert saved.is_file()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "torchrl-maxmin ppo: error: a reward is nan; the batch that gave it is in out/nonfinite_batch.pt"
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
    assert "no summary.json in nowhere; give the output folder of demo, evaluate or diagnose" in refused(
        "report", "nowhere"
    )
    (here / "reward").mkdir()
    (here / "reward" / "summary.json").write_text('{"num_groups": 2}')
    assert "reward holds no results by group; give the folder of demo" in refused("report", "reward")


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
