"""Every verb on models that are not GPT-2: what is supported runs through all four, the rest is one line."""

import json

import numpy as np
import pytest
from architectures import write
from cli_files import write_rows

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.models.loading import load_tokenizer

PROMPTS = ["the film", "its cast", "a story", "i finished this"]


@pytest.fixture
def files(here):
    """Pairs of three users who disagree, and prompts."""
    rows = []
    for user, better in (("ann", "was great ."), ("bob", "was dull ."), ("eve", "was great .")):
        worse = "was dull ." if better == "was great ." else "was great ."
        rows += [{"prompt": p, "chosen": better, "rejected": worse, "user_id": user} for p in PROMPTS]
    write_rows(here / "users.jsonl", rows)
    write_rows(here / "few.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return here


def run(verb, **flags):
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return main([verb, *words, "--device", "cpu"])


def train_reward(model, output_dir, **flags):
    quick = {"num_rounds": 1, "steps_per_round": 1, "num_restarts": 1, "identifiability": False}
    sizes = {"calibration_prompts": 4, "response_length": 6, "num_groups": 2}
    settings = {**quick, **sizes, "dataset_name": "users.jsonl", "output_dir": output_dir, **flags}
    return run("reward", model_name_or_path=model, **settings)


@pytest.mark.parametrize("name", ["Gemma2 (soft cap)", "Phi (bias)", "Cohere (scale)", "OPT (projected)"])
def test_four_verbs_from_a_base_model_to_a_result(name, files, tokenizer):
    base = write(name, tokenizer, files / "base")
    common = {"dataset_name": "few.jsonl"}
    assert run("sft", model_name_or_path=base, dataset_name="users.jsonl", output_dir="sft", max_steps=1) == 0
    assert train_reward("sft", "reward") == 0
    assert "calibration_error" not in json.loads((files / "reward/summary.json").read_text())
    calibration = json.loads((files / "reward/mixture.json").read_text())["calibration"]
    assert calibration["method"] == "sft_std"
    assert np.isfinite(calibration["scale"]).all()
    sizes = {"num_iterations": 1, "rollout_batch_size": 8, "mini_batch_size": 4, "response_length": 6}
    rewards = {"reward_model_path": "reward", "calibration_prompts": 4}
    assert run("ppo", model_name_or_path="sft", output_dir="maxmin", **common, **sizes, **rewards) == 0
    policies = "[sft=sft, maxmin=maxmin]"
    measured = {"judge": "reward", "response_length": 6, "num_samples": 4}
    assert run("evaluate", policies=policies, output_dir="results", **common, **measured) == 0
    result = SeedResult.load(files / "results/result")
    assert np.abs(result.kl["sft"].mean()) < 1e-4  # of the reference to itself


@pytest.mark.parametrize("name", ["GPT-J (bias)", "Granite (scale)", "StableLM", "Gemma3 (images)", "BERT"])
def test_rewards_are_trained_and_calibrated(name, files, tokenizer):
    assert train_reward(write(name, tokenizer, files / "base"), "reward") == 0
    assert "calibration_error" not in json.loads((files / "reward/summary.json").read_text())


@pytest.mark.parametrize("name", ["Gemma3 (images)", "FalconH1 (scale)"])
def test_a_model_is_fine_tuned(name, files, tokenizer):
    base = write(name, tokenizer, files / "base")
    assert run("sft", model_name_or_path=base, dataset_name="users.jsonl", output_dir="sft", max_steps=1) == 0


@pytest.mark.parametrize("verb", ["sft", "ppo", "evaluate"])
@pytest.mark.parametrize(("name", "kind"), [("T5", "encoder-decoder (t5)"), ("BERT", "encoder (bert)")])
def test_what_cannot_answer_is_no_policy(refused, stage, here, tokenizer, verb, name, kind):
    model = write(name, tokenizer, here / "model")
    flags = (
        {"policies": f"[sft={model}, maxmin={model}]"}
        if verb == "evaluate"
        else {"model_name_or_path": model}
    )
    line = refused(*stage(verb, **flags))
    assert f"is an {kind}" in line
    assert "a policy is a causal language model" in line


def test_an_encoder_decoder_gives_no_rewards(refused, stage, here, tokenizer):
    model = write("T5", tokenizer, here / "model")
    line = refused(*stage("reward", model_name_or_path=model))
    assert "rewards are read from a decoder or an encoder alone" in line


def test_a_trunk_that_cannot_be_sampled_is_refused_before_it_is_trained(files, capsys, tokenizer):
    """Calibration would fail after the training; without one there is nothing to sample."""
    base = write("RecurrentGemma (soft cap)", tokenizer, files / "base")
    assert train_reward(base, "reward") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a padded prompt gets other log-probabilities than the same prompt alone" in line
    assert line.endswith("by --calibration none")
    assert not (files / "reward").exists()
    assert train_reward(base, "reward", calibration="none") == 0


@pytest.mark.parametrize("verb", ["sft", "ppo", "evaluate"])
def test_text_longer_than_the_positions(files, stage, capsys, make_model, verb):
    model = make_model("short", n_positions=16)
    prompt = "the film was moving " * 4
    write_rows(files / "long.jsonl", [{"prompt": prompt, "text": prompt}] * 2)
    flags = (
        {"policies": f"[sft={model}, maxmin={model}]"}
        if verb == "evaluate"
        else {"model_name_or_path": model}
    )
    if verb != "sft":
        flags |= {"max_prompt_length": 12, "response_length": 5}
    assert main([str(word) for word in stage(verb, dataset_name="long.jsonl", **flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    tokens = len(load_tokenizer(model)(prompt).input_ids)
    if verb == "sft":
        assert f"the longest text has {tokens + 1} tokens, more than the model's 16 positions" in line
        assert "--max_length 16" in line
        assert (
            run("sft", model_name_or_path=model, dataset_name="long.jsonl", output_dir="out", max_length=16)
            == 0
        )
    else:
        assert "the longest prompt has 12 tokens and a response up to 5, more than the model's 16" in line
        assert "--max_prompt_length or --response_length" in line
