"""The demo at a tiny size, then the same again by its config, and by hand stage by stage."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from page_reader import check_sources, read_page
from rounding import EPS, TINY_MODEL
from safetensors.torch import load_file

from torchrl_maxmin.cli import demo as demo_module
from torchrl_maxmin.cli.demo import WorldSizes
from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.manifest import require_whole
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_causal_lm, load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses, to_texts
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.world.world import write_preferences, write_world

RECIPE = """
world: {num_texts: 600, num_prompts: 120, num_test_prompts: 12, test_pairs_per_user: 2}
sft: {max_steps: 20, per_device_train_batch_size: 32, warmup_steps: 2}
reward: {num_rounds: 2, steps_per_round: 4, per_device_train_batch_size: 32, num_restarts: 2}
ppo: {num_iterations: 2, rollout_batch_size: 16, mini_batch_size: 8, calibration_prompts: 16}
evaluate: {num_samples: 2, certificate_prompts: 4, certificate_samples: 16}
"""
FLAGS = ["--num_users", "24", "--pairs_per_user", "6", "--num_groups", "2", "--num_workers", "1"]
POLICIES = ("sft", "single", "maxmin", "oracle")


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def console(tmp_path_factory):
    """The demo by its console entry, without --output_dir where runs/demo is taken already."""
    place = tmp_path_factory.mktemp("demo")
    (place / "runs" / "demo").mkdir(parents=True)
    (place / "runs" / "demo" / "earlier.txt").write_text("mine")
    (place / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "torchrl_maxmin.cli.main", "demo", "--recipe", "recipe.yaml", *FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return place, run


@pytest.fixture
def folder(console, monkeypatch):
    """What the demo wrote; its configs name paths relative to where it was started."""
    monkeypatch.chdir(console[0])
    return Path("runs/demo-2")


@pytest.fixture
def seed(folder):
    return folder / "seed-0"


def test_last_line_names_the_first_free_folder(console):
    place, run = console
    assert run.stdout.splitlines()[-1] == "demo done: runs/demo-2"
    assert [path.name for path in (place / "runs" / "demo").iterdir()] == ["earlier.txt"]
    assert "Traceback" not in run.stderr
    assert "Warning" not in run.stderr


def test_first_free_folder(tmp_path):
    first_free = demo_module._first_free
    assert first_free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert first_free(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "a").write_text("")
    (tmp_path / "demo-2").write_text("a file")
    assert first_free(tmp_path / "demo") == tmp_path / "demo-3"


def test_summary_has_what_is_promised(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == [0]
    assert summary["wall_seconds"] > 0
    assert [(g["name"], round(g["share"], 3)) for g in summary["groups"]] == [
        ("sentiment", 0.909),
        ("conciseness", 0.091),
    ]
    assert sum(group["users"] for group in summary["groups"]) == 24
    assert 0 <= summary["em"]["user_accuracy"] <= 1
    assert summary["em"]["num_groups_selected"] == 2
    assert summary["em"]["heldout_log_likelihood"] < 0
    assert list(summary["policies"]) == list(POLICIES)
    for policy in summary["policies"].values():
        rates = policy["win_rate_vs_sft"]
        assert list(rates) == ["sentiment", "conciseness"]
        for rate in rates.values():
            # sums in another order: where the ends are equal, the last bits of a float64 need not be
            assert rate["low"] - 1e-12 <= rate["mean"] <= rate["high"] + 1e-12
            assert 0 <= rate["low"] <= rate["high"] <= 1 + 1e-12
        assert policy["worst_group_win_rate"] == pytest.approx(min(rate["mean"] for rate in rates.values()))
        assert policy["average_win_rate"] == pytest.approx(np.mean([rate["mean"] for rate in rates.values()]))
        assert list(policy["utility"]) == list(rates)
        assert isinstance(policy["kl"], float)
    for name in ("worst_group_relative_gain", "average_relative_gain", "majority_relative_change"):
        assert isinstance(summary["comparison"][name], float)
    certificate = summary["certificate"]
    assert {"value", "low", "high", "reason"} <= certificate.keys()
    assert (certificate["value"] is None) == (certificate["reason"] is not None)
    assert set(summary["timings"]) == {
        *("prepare", "reward_maxmin", "reward_single", "single", "maxmin", "oracle", "evaluate")
    }


def test_report_and_figures(folder):
    report = (folder / "report.md").read_text()
    assert "synthetic" in report
    summary = json.loads((folder / "summary.json").read_text())
    page = read_page(folder)
    assert check_sources(page, summary) > 100
    assert page.heading == summary["verdict"]["headline"]
    assert {"who", "groups", "responses", "training", "certificate", "calibration"} <= page.by_section.keys()
    for policy in ("single", "maxmin", "oracle"):
        assert page.heading in (folder / "seed-0" / policy / "README.md").read_text()
        require_whole(folder / "seed-0" / policy)
    for name in ("win_rates", "training"):
        assert f"figures/{name}.png" in report
        for suffix in ("png", "csv"):
            assert (folder / "figures" / f"{name}.{suffix}").stat().st_size > 0


def test_report_verb_keeps_the_training_figure(folder, capsys):
    before = (folder / "report.md").read_text()
    curves = (folder / "figures" / "training.csv").read_text()
    (folder / "figures" / "training.csv").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text() == before
    assert (folder / "figures" / "training.csv").read_text() == curves
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {folder / 'report.md'}"


def test_curves_are_true_utilities_in_the_unit_of_the_tables(folder, seed):
    with (folder / "figures" / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = read_metrics(seed / "maxmin")
    found = {
        (int(row["iteration"]), row["group"]): float(row["value"])
        for row in rows
        if row["policy"] == "maxmin" and row["metric"].startswith("rewards/")
    }
    for step, row in enumerate(metrics):
        for k, name in enumerate(("sentiment", "conciseness")):
            assert found[step, name] == pytest.approx(row[f"monitor/{k}/mean"])
    assert not any(row["policy"] == "single" and "weights" in row["metric"] for row in rows)


def test_folder_holds_the_resolved_settings(folder, seed):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seeds"], config["num_users"], config["num_groups"]) == ([0], 24, 2)
    recipe = yaml.safe_load(Path(config["recipe"]).read_text())
    assert recipe["ppo"]["num_iterations"] == 2  # as given
    assert recipe["ppo"]["beta"] == 0.02  # as shipped
    assert yaml.safe_load((seed / "maxmin" / "config.yaml").read_text())["beta"] == 0.02
    assert len((seed / "prompts.jsonl").read_text().splitlines()) == 120
    assert len((seed / "prompts_test.jsonl").read_text().splitlines()) == 12
    assert len((seed / "preferences_test.jsonl").read_text().splitlines()) == 24 * 2


def test_shipped_sizes_are_the_worlds_own():
    shipped = demo_module._read_recipe(None)["world"]
    assert WorldSizes(**shipped) == WorldSizes()
    assert (shipped["num_texts"], shipped["num_prompts"], shipped["num_test_prompts"]) == (16_000, 4_000, 512)


def test_a_given_config_repeats_the_run(folder, tmp_path, capsys):
    again = tmp_path / "again"
    config = ["--config", str(folder / "config.yaml")]
    assert main(["demo", *config, "--output_dir", str(again)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"demo done: {again}"
    first, second = (json.loads((home / "summary.json").read_text()) for home in (folder, again))
    for summary in (first, second):
        del summary["wall_seconds"], summary["timings"]
    assert first == second
    for name in (*POLICIES, "reward_maxmin", "reward_single"):
        assert_same_weights(folder / "seed-0" / name, again / "seed-0" / name)
    for name in ("preferences.jsonl", "prompts.jsonl", "sft.jsonl", "world.json", "maxmin/metrics.jsonl"):
        assert (folder / "seed-0" / name).read_bytes() == (again / "seed-0" / name).read_bytes()


def killed_when(there, command, environment):
    """Run a demo and kill it, workers and all, when a file is there."""
    run = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 240
    while not there() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun",
    ["sft.jsonl", "sft/run.json", "reward_maxmin/run.json", "single/metrics.jsonl", "evaluation/run.json"],
)
def test_a_demo_that_is_killed_goes_on(folder, seed, tmp_path, capsys, begun):
    """Its stages that are finished stay; the end is that of the demo that was never killed."""
    again = tmp_path / "again"
    command = [sys.executable, "-m", "torchrl_maxmin.cli.main", "demo", "--recipe", "recipe.yaml", *FLAGS]
    command += ["--output_dir", str(again)]
    killed_when((again / "seed-0" / begun).exists, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    assert not (again / "summary.json").exists()
    assert main(command[3:]) == 2
    printed = capsys.readouterr().err
    assert main(shlex.split(printed.partition("go on with: torchrl-maxmin ")[2])) == 0
    for name in POLICIES:
        assert_same_weights(seed / name, again / "seed-0" / name)
    tables = [json.loads((place / "summary.json").read_text())["policies"] for place in (folder, again)]
    assert tables[0] == tables[1]


def test_by_hand_from_pairs_without_groups(seed, tmp_path):
    mine = {name: str(tmp_path / name) for name in ("sft", "reward", "maxmin", "results")}
    pairs = [json.loads(line) for line in (seed / "preferences.jsonl").read_text().splitlines()]
    blind = tmp_path / "pairs.jsonl"
    blind.write_text(
        "".join(json.dumps(row | {"group": None}) + "\n" for row in pairs).replace(', "group": null', "")
    )
    assert "group" not in blind.read_text()

    def run(verb, stage, out, **changes):
        flags = [
            part
            for name, value in changes.items()
            for part in (f"--{name}", *([value] if isinstance(value, str) else value))
        ]
        assert (
            main([verb, "--config", str(seed / stage / "config.yaml"), *flags, "--output_dir", mine[out]])
            == 0
        )

    run("sft", "sft", "sft")
    assert_same_weights(mine["sft"], seed / "sft")

    run("reward", "reward_maxmin", "reward", model_name_or_path=mine["sft"], dataset_name=str(blind))
    assert_same_weights(mine["reward"], seed / "reward_maxmin")
    for name in ("groups.csv", "mixture.json"):
        assert (Path(mine["reward"]) / name).read_bytes() == (seed / "reward_maxmin" / name).read_bytes()
    told = json.loads((Path(mine["reward"]) / "summary.json").read_text())
    demos = json.loads((seed / "reward_maxmin" / "summary.json").read_text())
    assert demos.keys() - told.keys() == {"user_accuracy", "head_of_group"}
    assert told == {name: demos[name] for name in told}

    paths = {"model_name_or_path": mine["sft"], "reward_model_path": mine["reward"]}
    run("ppo", "maxmin", "maxmin", **paths)
    assert_same_weights(mine["maxmin"], seed / "maxmin")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights(mine["maxmin"]).values(), weights(mine["sft"]).values(), strict=True)
    )

    policies = [f"{name}={mine[name]}" for name in ("sft", "maxmin")]
    run("evaluate", "evaluation", "results", policies=policies, reward_model_path=mine["reward"])
    by_hand = SeedResult.load(Path(mine["results"]) / "result")
    demos = SeedResult.load(seed / "evaluation" / "result")
    assert by_hand.policies == ["sft", "maxmin"]
    for name in by_hand.policies:
        for kind in ("utilities", "kl", "length"):
            np.testing.assert_array_equal(getattr(by_hand, kind)[name], getattr(demos, kind)[name])
    summary = json.loads((Path(mine["results"]) / "summary.json").read_text())
    assert summary["em"]["user_accuracy"] is None  # nobody told
    assert summary["certificate"]["reason"]
    assert (Path(mine["results"]) / "report.md").is_file()


PLAIN = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
policy, reward, data, out = sys.argv[1:]
given = np.load(data)
policy = AutoModelForCausalLM.from_pretrained(policy).eval()
log_probs = np.zeros(given["action"].shape)
texts = []
for i in range(len(log_probs)):
    prompt = given["prompt_tokens"][i][given["prompt_mask"][i]]
    action = given["action"][i][given["action_mask"][i]]
    tokens = torch.tensor(np.concatenate([prompt, action]))[None]
    with torch.no_grad():
        table = policy(tokens).logits[0].double().log_softmax(-1)
    for t, token in enumerate(action):
        log_probs[i, t] = table[len(prompt) + t - 1, token]
tokenizer = AutoTokenizer.from_pretrained(reward)
classifier = AutoModelForSequenceClassification.from_pretrained(reward).eval()
whole = [f"{text} {tokenizer.eos_token}" for text in given["texts"]]
with torch.no_grad():
    scores = classifier(**tokenizer(whole, return_tensors="pt", padding=True)).logits
assert not [name for name in sys.modules if name.startswith(("torchrl_maxmin", "maxmin_kernels"))]
np.savez(out, log_probs=log_probs, scores=scores.numpy())
"""


def test_folders_load_without_this_package(seed, tmp_path):
    tokenizer = load_tokenizer(str(seed / "maxmin"))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy = TokenPolicy(load_causal_lm(str(seed / "maxmin")), **ids, max_new_tokens=24)
    torch.manual_seed(0)
    prompts = ["the film", "a very long story with my sister", "i"]
    responses = sample_responses(policy, encode_prompts(tokenizer, prompts), 3)
    texts = [f"{p} {c}".strip() for p, c in zip(*to_texts(tokenizer, responses), strict=True)]
    names = ("prompt_tokens", "prompt_mask", "action", "action_mask")
    np.savez(tmp_path / "data.npz", texts=texts, **{name: responses[name].numpy() for name in names})
    arguments = [seed / "maxmin", seed / "reward_maxmin", tmp_path / "data.npz", tmp_path / "out.npz"]
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    plain = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        ours = policy.log_prob(responses).numpy()
    assert np.abs(ours).max() > 1
    # rows alone and in a batch: a model of the tiny one's depth rounds as often
    bar = TINY_MODEL * EPS * np.abs(ours).max()
    np.testing.assert_allclose(ours, plain["log_probs"], atol=bar)
    mixture = RewardMixture.from_pretrained(seed / "reward_maxmin")
    scores = mixture.score(*to_texts(tokenizer, responses)).numpy()
    assert scores.shape == (9, 2)
    np.testing.assert_allclose(scores, plain["scores"], atol=1e-5)


def test_a_policy_with_one_answer_gives_nothing_to_compare(tmp_path, make_model, monkeypatch):
    from torchrl_maxmin.world import World
    from torchrl_maxmin.world import world as world_data

    write_world(tmp_path, seed=0, num_texts=20, num_prompts=10, num_test_prompts=5)
    monkeypatch.setattr(world_data, "to_texts", lambda tokenizer, td: ([], ["same"] * len(td)))
    monkeypatch.setattr(world_data, "_MAX_ROUNDS", 3)
    with pytest.raises(UserError, match="nothing to compare"):
        write_preferences(
            tmp_path, World.preset("10:1"), tmp_path / "base_model", 0, num_users=2, pairs_per_user=1
        )
    assert not (tmp_path / "preferences.jsonl").exists()
