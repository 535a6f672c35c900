"""Three functions do what three verbs do, and what they return shows itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from torchrl_maxmin import api, evaluate, fit_groups, train_policy
from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.world import World

WORDS = ("was good .", "was bad and long .", "was fine .", "was dull .")
PAIRS = [
    {"prompt": "the film", "chosen": chosen, "rejected": rejected, "user_id": f"<b>user {user}"}
    for user in range(6)
    for chosen, rejected in ((WORDS[user % 2], WORDS[2]), (WORDS[3 * (user % 2)], WORDS[1 + user % 2]))
]
PROMPTS = [{"prompt": "the film"}, {"prompt": "a story"}]
FIT = {"num_groups": 2, "num_rounds": 1, "steps_per_round": 1, "num_restarts": 1, "calibration_prompts": 2}
TRAIN = {"num_iterations": 1, "rollout_batch_size": 4, "mini_batch_size": 4, "num_ppo_epochs": 1}
SIZES = {"response_length": 6, "device": "cpu"}


def test_the_package_is_imported_without_torch():
    code = "import sys, torchrl_maxmin; assert 'torch' not in sys.modules; torchrl_maxmin.fit_groups"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_pairs_become_groups_become_a_policy_becomes_results(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    World.preset("10:1").save("world.json")
    groups = fit_groups(tiny_model, PAIRS, **FIT, **SIZES)
    assert groups.num_groups == groups.model.num_groups == 2
    assert set(groups.responsibilities) == {pair["user_id"] for pair in PAIRS}
    policy = train_policy(
        tiny_model, Dataset.from_list(PROMPTS), groups, **TRAIN, calibration_prompts=2, gap_steps=0, **SIZES
    )
    assert len(policy.metrics) == 1
    results = evaluate(
        {"sft": tiny_model, "<i>maxmin": policy}, PROMPTS, "world.json", num_samples=1, **SIZES
    )
    summary = json.loads((tmp_path / "runs/results/summary.json").read_text())
    assert results.summary == summary
    for words in ("average over groups", "average over people", "91% of people"):
        assert words in repr(results)
        assert words in results._repr_html_()
    assert f"{summary['policies']['sft']['average_over_people']:.3f}" in repr(results)
    assert "<i>" not in results._repr_html_()
    assert "&lt;i&gt;maxmin" in results._repr_html_()
    for result, name in ((groups, "Groups"), (policy, "Policy")):
        assert repr(result).splitlines()[0] == f"{name} in {result.folder}"
        assert result._repr_html_().count("<tr>") == 3
        assert repr(type(result).load(result.folder)) == repr(result)


def test_the_folder_is_the_one_that_the_verb_leaves(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    settings = {**FIT, "response_length": 6, "device": "cpu", "calibration": "none"}
    groups = fit_groups(tiny_model, "pairs.jsonl", "by_python", **settings)
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    given = ["--model_name_or_path", tiny_model, "--dataset_name", "pairs.jsonl", "--output_dir", "by_verb"]
    assert main(["reward", *given, *flags]) == 0
    assert groups.folder.name == "by_python"
    for name in ("model.safetensors", "groups.csv"):
        assert (tmp_path / "by_python" / name).read_bytes() == (tmp_path / "by_verb" / name).read_bytes()


def test_an_environment_is_trained_in_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"num_envs": 8, "frames_per_batch": 96, "total_frames": 192, "eval_episodes": 4}
    policy = train_policy(env_id="gridworld", device="cpu", **sizes)
    assert policy.folder == Path("runs/policy")
    assert f"{policy.summary['sampled']['utilities']['0']['mean']:.3f}" in repr(policy)
    with pytest.raises(UserError, match="dataset_name goes with a language model"):
        train_policy(dataset_name="prompts.jsonl", env_id="gridworld")


def test_an_argument_that_no_verb_has_is_named_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="fit_groups has no argument 'num_group'; did you mean num_groups"):
        fit_groups("model", [{"prompt": "a", "chosen": "b", "rejected": "c", "user_id": "d"}], num_group=2)
    with pytest.raises(UserError, match="train_policy needs dataset_name"):
        train_policy("model")
    with pytest.raises(UserError, match="cannot read data from a int"):
        evaluate({"sft": "model"}, 3, "world.json")
    assert list(tmp_path.iterdir()) == []


def test_data_in_memory_keeps_one_file_for_the_same_content(tmp_path):
    first, again = (api._data(rows, tmp_path / "out") for rows in (PAIRS, list(PAIRS)))
    other = api._data(PAIRS[:3], tmp_path / "out")
    assert first == again != other
    assert [json.loads(line) for line in Path(other).read_text().splitlines()] == PAIRS[:3]


def test_no_folder_of_an_earlier_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/groups").mkdir(parents=True)
    assert str(api._folder(None, "groups")) == "runs/groups-2"


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(UserError, match="no summary"):
        api.Groups.load(tmp_path)
