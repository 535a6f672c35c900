"""Mistakes in data, models and folders: exit code 2, one line that names cause and fix, nothing written."""

import shutil
import sys
from pathlib import Path

import pytest
from cli_files import PAIR, write_rows

from torchrl_maxmin.cli.main import main

# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_pairs_without_a_column(refused, stage, here, column):
    row = {name: value for name, value in PAIR.items() if name != column}
    write_rows(here / "odd.jsonl", [row, row])
    line = refused(*stage("reward", dataset_name="odd.jsonl"))
    assert f"needs the column(s) {column}; found" in line
    assert ("Rename" if column == "prompt" else "Say which") in line


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


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo", "evaluate", "diagnose"])
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
    assert line.endswith("save or download it again")
    assert not (here / "out").exists()


def constant(prompts, completions):
    return [1.0] * len(prompts)


@pytest.mark.parametrize("out", ["out", "runs/of/mine"])
@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("ppo", {"response_length": 63}, "more than the model's 64 positions"),
        ("evaluate", {"response_length": 63}, "more than the model's 64 positions"),
        ("sft", {"dataset_name": "long.jsonl"}, "more than the model's 64 positions"),
        (
            "ppo",
            {"reward_funcs": "test_cli_bad_input:constant", "response_length": 4},
            "so they have no scale",
        ),
        (
            "ppo",
            {"welfare": "fixed", "group_weights": "[0.5, 0.25, 0.25]"},
            "--group_weights gives 3 weights",
        ),
    ],
)
def test_a_refusal_late_in_the_checks_leaves_no_folder(refused, stage, here, verb, changes, message, out):
    write_rows(here / "long.jsonl", [{"prompt": "the film " * 40, "completion": "was great ."}])
    assert message in refused(*stage(verb, output_dir=out, device="cpu", **changes))


def test_an_empty_output_folder_of_the_users_own_stays(refused, stage, here):
    (here / "out").mkdir()
    refused(*stage("ppo", response_length=63))
    assert (here / "out").is_dir()


def test_output_folder_that_is_a_file(refused, stage, here):
    (here / "out").write_text("mine")
    assert "output folder out" in refused(*stage("sft"))


def test_a_checkpoint_that_is_damaged(refused, stage, here):
    (here / "out" / "checkpoint-1").mkdir(parents=True)
    (here / "out" / "run.json").write_text("[1]")
    for content in (b"", b"PK\x03\x04half", b"{}"):
        (here / "out" / "run.json").write_bytes(content)
        assert "out/run.json is damaged" in refused(*stage("ppo", resume_from_checkpoint="last"))


def test_no_checkpoint_to_resume(refused, stage, here):
    line = refused(*stage("ppo", resume_from_checkpoint="last"))
    assert "there is no run in out to go on with" in line
    assert "without --resume_from_checkpoint" in line
    for verb in ("sft", "reward", "ppo in an environment", "evaluate", "diagnose", "demo"):
        assert "there is no run in out" in refused(*stage(verb, resume_from_checkpoint="last"))
    assert not (here / "out").exists()


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
