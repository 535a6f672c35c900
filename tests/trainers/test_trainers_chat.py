"""Conversations through every stage: one chat template, one reading of a response."""

import json

import numpy as np
import pytest
import torch
from chat_tokenizers import CHATML, make_tokenizer, save_chat_model
from trainers_runs import PPORun
from transformers import AutoTokenizer, GenerationConfig

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.preferences.texts import TextEncoder
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.trainers.ppo_config import PPOConfig

ASKED = ["a b", "hello c", "d", "c a a"]
received = []
seen = []


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def words(prompts, completions, **columns):
    """Two groups: brevity, and the letter a; keeps what it was given."""
    received.append((prompts, completions, columns))
    texts = [completion[0]["content"] for completion in completions]
    return [
        [-float(len(text.split())), float(text.split().count("a")) + i * 1e-3] for i, text in enumerate(texts)
    ]


def by_topic(prompts, completions, topic):
    seen.append([(prompt[0]["content"], name) for prompt, name in zip(prompts, topic, strict=True)])
    return [float(len(completion[0]["content"])) for completion in completions]


def prefer_short(prompts, a, b):
    assert all(isinstance(x, list) and x[0]["role"] == "assistant" for x in (*a, *b))
    sizes = [(len(x[0]["content"]), len(y[0]["content"])) for x, y in zip(a, b, strict=True)]
    return [0.5 + 0.5 * ((y > x) - (y < x)) for x, y in sizes]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat") / "model", make_tokenizer(template=CHATML))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Prompts, demonstrations and preferences as messages."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [{"prompt": user(text), "topic": f"t{i}"} for i, text in enumerate(ASKED)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {
            "prompt": user(text),
            "completion": assistant("a"),
            "chosen": assistant("a" if who % 2 else "b b c"),
            "rejected": assistant("b b c" if who % 2 else "a"),
            "user_id": f"u{who}",
        }
        for who in range(6)
        for text in ASKED
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run(verb, **settings):
    assert main([verb, *flags(**settings), "--device", "cpu"]) == 0


@pytest.fixture(scope="module")
def stages(chat_model, here):
    """A reference and a reward mixture, from messages."""
    run("sft", model_name_or_path=chat_model, dataset_name=here / "pairs.jsonl", output_dir=here / "sft",
        max_steps=2, system_prompt="brief")  # fmt: skip
    run("reward", model_name_or_path=here / "sft", dataset_name=here / "pairs.jsonl",
        output_dir=here / "reward", num_groups=2, num_rounds=1, steps_per_round=2, response_length=8,
        calibration_prompts=4)  # fmt: skip
    return here


def test_the_reference_keeps_template_system_prompt_and_ends(stages, chat_model):
    tokenizer = AutoTokenizer.from_pretrained(stages / "sft")
    (prompt,) = TextEncoder(tokenizer).prompts([user("a")])
    assert "system brief" in tokenizer.decode(prompt).replace("  ", " ")
    ends = GenerationConfig.from_pretrained(stages / "sft").eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    again = AutoTokenizer.from_pretrained(stages / "reward")
    assert TextEncoder(again).prompts([user("a")]) == [prompt]


def test_ppo_and_evaluate_score_a_response_alike(stages, tmp_path):
    """The mixture on the tokens themselves, a row at a time, is the reference of both."""
    base = {"reward_model_path": str(stages / "reward"), "dataset_name": str(stages / "prompts.jsonl")}
    run("ppo", model_name_or_path=stages / "sft", output_dir=tmp_path / "ppo", num_iterations=2,
        rollout_batch_size=8, mini_batch_size=4, response_length=8, **base)  # fmt: skip
    run("evaluate", policies=f"[sft={stages / 'sft'},maxmin={tmp_path / 'ppo'}]",
        output_dir=tmp_path / "out", judge=stages / "reward", response_length=8, num_samples=2,
        dataset_name=stages / "prompts.jsonl", dataset_split="train")  # fmt: skip
    result = SeedResult.load(tmp_path / "out" / "result")
    config = PPOConfig(
        model_name_or_path=str(tmp_path / "ppo"),
        output_dir=str(tmp_path / "again"),
        response_length=8,
        **base,
    )
    trainer = PPORun(config)
    torch.manual_seed(0)
    from torchrl_maxmin.models.sampling import sample_responses

    sampled = sample_responses(trainer.policy, trainer.rollouts.prompts, 2)
    mixture = RewardMixture.from_pretrained(stages / "reward")
    scored = mixture.calibration.apply(trainer.rollouts.rewards.source(sampled)).detach().reshape(4, 2, 2)
    np.testing.assert_allclose(result.utilities["maxmin"], scored.numpy(), atol=1e-5)
    rows = [torch.cat([r["prompt_tokens"][r["prompt_mask"]], r["action"][r["action_mask"]]]) for r in sampled]
    with torch.no_grad():
        alone = torch.cat([mixture(row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows])
    torch.testing.assert_close(trainer.rollouts.rewards.source(sampled), alone, atol=1e-5, rtol=1e-5)


def test_reward_functions_get_what_trl_gives(stages, tmp_path):
    received.clear()
    run("ppo", model_name_or_path=stages / "sft", output_dir=tmp_path / "ppo", num_iterations=1,
        rollout_batch_size=8, mini_batch_size=4, response_length=8, calibration="none",
        reward_funcs="[test_trainers_chat:words]", dataset_name=stages / "prompts.jsonl")  # fmt: skip
    prompts, completions, columns = received[-1]
    assert all(prompt in [user(text) for text in ASKED] for prompt in prompts)
    assert all(
        len(c) == 1 and c[0]["role"] == "assistant" and "<|" not in c[0]["content"] for c in completions
    )
    assert columns["topic"] == [f"t{ASKED.index(prompt[0]['content'])}" for prompt in prompts]


def test_a_prompt_in_several_rows_keeps_each_rows_columns(stages, tmp_path):
    """As data with several reference answers a prompt have it; equal rows count once."""
    topics = [("a b", "t0"), ("d", "t1"), ("a b", "t2"), ("a b", "t0")]
    rows = [{"prompt": user(text), "topic": topic, "extra": i} for i, (text, topic) in enumerate(topics)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen.clear()
    run("ppo", model_name_or_path=stages / "sft", output_dir=tmp_path / "ppo", num_iterations=1,
        rollout_batch_size=3, mini_batch_size=3, response_length=4, calibration="none",
        reward_funcs="[test_trainers_chat:by_topic]", dataset_name=tmp_path / "rows.jsonl")  # fmt: skip
    assert sorted(seen[-1]) == sorted(topics[:3])  # a rollout is a pass over the prompts


@pytest.mark.parametrize("judge", ["words", "prefer_short"])
def test_judges_get_messages(stages, tmp_path, judge):
    run("evaluate", policies=f"[sft={stages / 'sft'},other={stages / 'sft'}]",
        output_dir=tmp_path / "out", judge=f"test_trainers_chat:{judge}", response_length=8,
        dataset_name=stages / "prompts.jsonl", dataset_split="train")  # fmt: skip
    result = SeedResult.load(tmp_path / "out" / "result")
    np.testing.assert_allclose(result.kl["sft"], 0.0, atol=1e-4)


def test_diagnose_reads_conversations(stages, tmp_path):
    run("diagnose", model_name_or_path=stages / "sft", dataset_name=stages / "pairs.jsonl",
        output_dir=tmp_path / "out", num_groups=2, num_jackknife=0, num_bootstrap=0, num_folds=2)  # fmt: skip
    assert (tmp_path / "out" / "report.md").is_file()


def test_data_check_shows_a_pair_as_the_model_reads_it(stages, capsys):
    command = ["data", "check", str(stages / "pairs.jsonl"), "--model_name_or_path", str(stages / "sft")]
    assert main([*command, "--max_length", "13"]) == 0
    out = capsys.readouterr().out
    assert "tokens: <|start|> system brief <|end|> <|start|> user a b <|end|>" in " ".join(out.split("\n"))
    assert "--max_length 13 cuts" in out
    assert main([*command[:3], "--system_prompt", "brief"]) == 2


def test_pairs_that_are_cut_alike_are_named_and_left_out(stages, tmp_path, capsys, monkeypatch):
    """Two answers that differ at their start alone are one text once the start is gone."""
    printed = []
    monkeypatch.setattr("torchrl_maxmin.rewards.settings.console.print", printed.append)
    rows = [json.loads(line) for line in (stages / "pairs.jsonl").read_text().splitlines()]
    rows[3] |= {"chosen": assistant("a " + "b " * 20), "rejected": assistant("c " + "b " * 20)}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": stages / "sft",
        "dataset_name": tmp_path / "long.jsonl",
        "num_groups": 1,
        "num_rounds": 1,
        "steps_per_round": 1,
        "calibration": "none",
        "heldout_fraction": 0,
    }
    run("reward", output_dir=tmp_path / "out", max_length=18, **settings)
    assert printed == [
        "1 of 24 pairs left out: --max_length 18 leaves chosen and rejected the same tokens (rows 3)"
    ]
    run("reward", output_dir=tmp_path / "whole", max_length=60, **settings)
    assert len(printed) == 1
    assert main(["reward", *flags(output_dir=tmp_path / "none", max_length=1, **settings)]) == 2
    assert "cuts the chosen and the rejected text of every pair to the same tokens" in capsys.readouterr().err
