"""The evaluation stage: who judges, what is measured, and what is certified, on tiny models."""

import dataclasses
import json
import shutil
from pathlib import Path

import measure_judges
import numpy as np
import pytest
import torch
import yaml
from evaluation_results import CALIBRATION, LENGTH
from judge_server import Server, ok, shorter
from rounding import TINY_MODEL, log_prob_bar
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.evaluation.measure import EvaluateConfig, run_evaluate
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses
from torchrl_maxmin.models.sequences import has_ended
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.world import World

# -- judges ----------------------------------------------------------------------------------------


def test_a_world_judges_by_its_groups(measure, tmp_path):
    world = World(name="10:1", shares=(0.7, 0.3), sentiment_scale=8.0, utility_std=(0.5, 2.0))
    world.save(tmp_path / "world.json")
    result = measure(judge=str(tmp_path / "world.json"), seed=5)
    assert (result.seed, result.group_names) == (5, ["sentiment", "conciseness"])
    assert result.group_shares == [0.7, 0.3]
    assert result.extra["judge"] == "world"
    words = measure(name="words", seed=5).utilities["maxmin"].sum(-1)  # of the same responses
    np.testing.assert_allclose(result.utilities["maxmin"][..., 1], -words / 10 / 2.0)


def test_a_function_judges_every_response_of_its_prompt(measure, prompts):
    measure_judges.calls.clear()
    result = measure()
    assert result.group_names == ["group 0", "group 1"]
    assert result.group_shares == [0.5, 0.5]
    assert result.extra["judge"] == "function"
    assert result.policies == ["sft", "maxmin"]
    (_, probe), sft, maxmin = measure_judges.calls
    assert len(probe) == 2
    for policy, (asked, answers) in (("sft", sft), ("maxmin", maxmin)):
        assert asked == [prompt for prompt in prompts for _ in range(3)]
        counted = np.array([len(answer.split()) for answer in answers]).reshape(6, 3)
        np.testing.assert_array_equal(result.utilities[policy][..., 1], counted)
        np.testing.assert_array_equal(
            result.utilities[policy][..., 0], [[len(prompt.split())] * 3 for prompt in prompts]
        )
        assert counted.std() > 0


def test_one_number_a_response_is_one_group(measure):
    result = measure(judge="measure_judges:brevity")
    assert result.group_names == ["group 0"]
    assert result.utilities["sft"].shape == (6, 3, 1)


def rewards_of_tokens(mixture, path, prompts, seed=0):
    """Raw rewards [18, 2] of what a policy samples under the seed: its tokens, a row at a time, unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    torch.manual_seed(seed)
    policy = TokenPolicy.from_pretrained(path, tokenizer, max_new_tokens=LENGTH)
    sampled = sample_responses(policy, encode_prompts(tokenizer, prompts), 3)
    assert not has_ended(sampled, tokenizer.eos_token_id).all()  # some were cut off
    rows = [
        torch.cat([row["prompt_tokens"][row["prompt_mask"]], row["action"][row["action_mask"]]])
        for row in sampled
    ]
    with torch.no_grad():
        return torch.cat([mixture(row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows])


def test_a_reward_folder_judges_by_its_calibrated_heads(
    measure, mixture, reward_folder, other_model, prompts
):
    result = measure(judge=reward_folder)
    assert result.extra["judge"] == "reward heads"
    np.testing.assert_allclose(result.group_shares, [0.75, 0.25], rtol=1e-6)
    raw = rewards_of_tokens(mixture, other_model, prompts)
    expected = ((raw - CALIBRATION.shift) / CALIBRATION.scale).reshape(6, 3, 2)
    np.testing.assert_allclose(result.utilities["maxmin"], expected, rtol=1e-5, atol=1e-6)


def test_a_reference_without_a_pad_token_gets_one(measure, tiny_model, other_model, tmp_path):
    """As GPT-2 itself; its tokenizer is the one that all policies are read with."""
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    policies = [f"sft={bare}", f"maxmin={other_model}"]
    first, again = measure(policies=policies), measure(name="again", policies=policies)
    assert first.length["sft"].min() >= 1
    bar = LENGTH * log_prob_bar(AutoModelForCausalLM.from_pretrained(bare), TINY_MODEL)
    np.testing.assert_allclose(first.kl["sft"], 0.0, atol=bar)
    np.testing.assert_array_equal(first.kl["maxmin"], again.kl["maxmin"])


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("measure_judges:broken", "fails on f.prompts, completions. with KeyError"),
        ("measure_judges:unequal", "one number, or one a group, for every response"),
        ("measure_judges:undefined", "NaN or infinity"),
        ("measure_judges:nothing", "TypeError"),
        ("measure_judges:absent", "write module:function"),
    ],
)
def test_a_judge_that_cannot_judge_is_told_before_any_work(make_config, tmp_path, judge, message):
    with pytest.raises(UserError, match=message):
        run_evaluate(make_config(judge=judge))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("judge", ["looks_up", "looks_up_pairs"])
def test_a_judge_is_asked_about_the_data_s_prompts_alone(measure, prompts, monkeypatch, judge):
    monkeypatch.setattr(measure_judges, "known", set(prompts))
    assert measure(judge=f"measure_judges:{judge}").group_names == ["group 0"]


def test_a_judge_of_pairs_compares_every_two_policies(make_config, measure, other_model, tiny_model):
    """The same as its utility would say, and no utilities."""
    measure_judges.compared.clear()
    folder = run_evaluate(make_config(judge="measure_judges:by_group"))
    result = SeedResult.load(folder / "result")
    assert result.extra["judge"] == "comparisons"
    assert (result.group_names, result.group_shares) == (["brief", "first"], [0.5, 0.5])
    assert result.utilities == {}
    expected = measure(name="utilities", judge="measure_judges:brevity")
    for policy in ("sft", "maxmin"):
        np.testing.assert_allclose(
            result.win_matrix(policy, "sft")[:, 0], expected.win_matrix(policy, "sft")[:, 0]
        )
        np.testing.assert_allclose(result.win_matrix(policy, "sft")[:, 1], 0.5)  # both orders were asked
        np.testing.assert_array_equal(result.kl[policy], expected.kl[policy])
    assert result.extra["judge_first_place"]["first"] == 1.0
    assert [len(prompts) for prompts, _, _ in measure_judges.compared] == [1, 54, 54]  # 6 prompts, 3 by 3
    summary = json.loads((folder / "summary.json").read_text())
    rate = summary["policies"]["maxmin"]["win_rate_vs_sft"]["brief"]
    assert rate["mean"] == pytest.approx(result.win_matrix("maxmin", "sft")[:, 0].mean())
    assert summary["policies"]["maxmin"]["utility"] == {"brief": None, "first": None}
    assert "compared pairs" in summary["policies"]["maxmin"]["length_correlation"]["brief"]["reason"]
    text = (folder / "report.md").read_text()
    assert "a group's judge, asked in both orders, prefers" in text
    assert "first +1.000" in text
    assert "judges compared pairs and gave no utilities" in text


def test_one_function_of_pairs_is_one_group(measure):
    assert measure(judge="measure_judges:shorter").group_names == ["group 0"]


def test_an_endpoint_judges_for_each_group(make_config, measure, prompts):
    with Server(shorter) as server:
        settings = {"judge": server.url, "judge_model": "judge-1", "num_samples": 1}
        result = measure(judge_criteria=["brief=few words", "long=a=b"], **settings)
        questions = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert result.extra["judge"] == "endpoint"
    assert result.group_names == ["brief", "long"]
    assert len(questions) == 2 + 2 * 2 * len(prompts)  # a first question each, then both orders
    assert sum("few words" in question for question in questions) == len(questions) / 2
    assert sum("wants this: a=b" in question for question in questions) == len(questions) / 2
    expected = measure(name="utilities", judge="measure_judges:brevity", num_samples=1)
    for g in range(2):
        np.testing.assert_allclose(
            result.win_matrix("maxmin", "sft")[:, g], expected.win_matrix("maxmin", "sft")[:, 0]
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs --judge_model, and --judge_criteria"),
        ({"judge_model": "m", "judge_criteria": ["brief"]}, "takes name=words; 'brief' is not that"),
        ({"judge_model": "m", "judge_criteria": ["a=x", "a=y"]}, "names a group twice"),
        ({"judge_model": "m", "judge_criteria": ["a=x"], "judge_retries": 0}, "no verdict in 1 attempt:"),
        (
            {"judge": "measure_judges:words", "judge_model": "m"},
            "belong to a --judge that is an http address",
        ),
        ({"judge": "measure_judges:sure"}, r"outside \[0, 1\]"),
    ],
)
def test_a_judge_of_pairs_that_cannot_judge_is_told_before_any_work(make_config, tmp_path, settings, message):
    with Server(lambda number, body: ok("neither")) as server, pytest.raises(UserError, match=message):
        run_evaluate(make_config(**({"judge": server.url} | settings)))
    assert not (tmp_path / "out").exists()


# -- measurements ----------------------------------------------------------------------------------


def test_kl_is_the_log_ratio_of_whole_responses(measure, tiny_model, other_model, tokenizer):
    """Against plain forward passes over the responses' text, one at a time, in double precision."""
    measure_judges.calls.clear()
    result = measure()
    models = [
        AutoModelForCausalLM.from_pretrained(path).double().eval() for path in (other_model, tiny_model)
    ]
    np.testing.assert_allclose(result.kl["sft"], 0.0, atol=LENGTH * log_prob_bar(models[1], TINY_MODEL))
    checked = 0
    rows = zip(
        *measure_judges.calls[-1], result.kl["maxmin"].ravel(), result.length["maxmin"].ravel(), strict=True
    )
    for prompt, answer, found, size in rows:
        start = tokenizer(prompt).input_ids
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        if size == len(ids) + 1 and size < LENGTH:
            ids = [*ids, tokenizer.eos_token_id]  # it ended by itself
        elif size != len(ids):
            continue  # it holds a special token, which text leaves out
        tokens = torch.tensor([start + ids])
        answered = tokens[0, len(start) :, None]
        with torch.no_grad():
            policy, reference = (
                model(tokens).logits[0, len(start) - 1 : -1].log_softmax(-1).gather(-1, answered).sum()
                for model in models
            )
        assert found == pytest.approx((policy - reference).item(), abs=1e-4)
        checked += 1
    assert checked >= 5


def test_the_seed_decides_everything(measure):
    first, again, another = (measure(name=f"run{i}", seed=seed) for i, seed in enumerate((0, 0, 1)))
    for name in ("utilities", "kl", "length"):
        for policy in first.policies:
            np.testing.assert_array_equal(getattr(first, name)[policy], getattr(again, name)[policy])
    assert not np.array_equal(first.kl["maxmin"], another.kl["maxmin"])


def test_one_sample_a_prompt(measure, reward_folder):
    result = measure(num_samples=1, reward_model_path=reward_folder)
    assert result.utilities["maxmin"].shape == (6, 1, 2)
    assert set(result.extra["calibration"]["utilities"]) == {"sft_mean", "win_rate", "none"}
    more = measure(name="more", num_samples=2, reward_model_path=reward_folder)
    assert set(more.extra["calibration"]["utilities"]) == {"sft_std", "sft_mean", "win_rate", "none"}


def test_the_first_prompts_alone(measure, prompts):
    measure_judges.calls.clear()
    assert measure(num_prompts=2).num_prompts == 2
    assert measure_judges.calls[-1][0] == [prompt for prompt in prompts[:2] for _ in range(3)]


def test_a_summary_and_a_report_are_written(make_config):
    config = make_config()
    folder = run_evaluate(config)
    summary = json.loads((folder / "summary.json").read_text())
    result = SeedResult.load(folder / "result")
    assert list(summary["policies"]) == ["sft", "maxmin"]
    assert summary["num_prompts"] == 6
    for k, name in enumerate(result.group_names):
        mean = result.utilities["maxmin"][..., k].mean()
        assert summary["policies"]["maxmin"]["utility"][name] == pytest.approx(mean)
    assert summary["policies"]["maxmin"]["kl"] == pytest.approx(result.kl["maxmin"].mean())
    assert (summary["certificate"]["value"], summary["certificate"]["reason"]) == (None, "not computed")
    assert "judge" in (folder / "report.md").read_text()
    assert EvaluateConfig(**yaml.safe_load((folder / "config.yaml").read_text())) == config


def test_figures_of_the_reward_stage_come_along(measure, reward_folder, tmp_path, tiny_model, prompts):
    folder = tmp_path / "reward"
    shutil.copytree(reward_folder, folder)
    told = {
        "users": [9, 3],
        "user_accuracy": 0.75,
        "heldout": {"log_likelihood": -0.5, "head_accuracy": [0.9, 0.8]},
        "head_of_group": {"group 0": 1, "group 1": 0},
    }
    (folder / "summary.json").write_text(json.dumps(told))
    result = measure(reward_model_path=str(folder))
    assert result.extra["group_users"] == [3, 9]
    em = result.extra["em"]
    assert (em["user_accuracy"], em["heldout_log_likelihood"], em["num_groups_selected"]) == (0.75, -0.5, 2)
    raw = rewards_of_tokens(RewardMixture.from_pretrained(folder), tiny_model, prompts).numpy()
    truth = result.utilities["sft"].reshape(-1, 2)
    for g, head in ((0, 1), (1, 0)):
        expected = np.corrcoef(raw[:, head], truth[:, g])[0, 1]
        assert em["head_correlation"][f"group {g}"] == pytest.approx(expected, abs=1e-5)
    assert set(result.extra["calibration"]["utilities"]["none"]) == {"group 0", "group 1"}


def test_a_constant_head_has_no_scale_and_stops_nothing(measure, mixture, tmp_path):
    flat = RewardMixture(mixture.model, mixture.tokenizer)
    before = flat.model.score.weight.detach().clone()
    try:
        with torch.no_grad():
            flat.model.score.weight[1] = 0.0
        flat.save_pretrained(tmp_path / "flat")
    finally:
        with torch.no_grad():
            flat.model.score.weight.copy_(before)
    result = measure(reward_model_path=str(tmp_path / "flat"))
    assert set(result.extra["calibration"]["utilities"]) == {"sft_mean", "win_rate", "none"}


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ["maxmin=a"]}, "needs sft=folder"),
        ({"policies": ["sft"]}, "'sft' has no folder"),
        ({"policies": ["sft=a", "sft=b"]}, "twice"),
        ({"num_samples": 0}, "--num_samples must be at least 1"),
        ({"num_prompts": -1}, "--num_prompts must not be negative"),
        ({"certificate_samples": 10}, "multiple of 4"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"beta": -1.0}, "--beta must be positive"),
    ],
)
def test_settings_that_cannot_work(make_config, settings, message):
    with pytest.raises(UserError, match=message):
        make_config(**settings).check()


def test_a_folder_name_may_hold_an_equals_sign(make_config):
    assert make_config(policies=["sft=a=b"]).folders() == {"sft": "a=b"}


def test_earlier_results_are_left_as_they_are(make_config, tmp_path):
    config = make_config()
    Path(config.output_dir).mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_evaluate(dataclasses.replace(config))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
