"""Policies that one tokenizer prompts: their pad tokens, ends, vocabularies and chat templates."""

import json
import shutil

import numpy as np
import pytest
import torch
from chat_tokenizers import CHATML, make_tokenizer, save_chat_model
from evaluation_results import CALIBRATION, LENGTH
from rounding import TINY_MODEL, log_prob_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.evaluation.measure import measure_policies
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses
from torchrl_maxmin.models.sequences import has_ended
from torchrl_maxmin.rewards import RewardMixture


@pytest.fixture
def ending(other_model, tmp_path):
    """The other policy, with further tokens that end its responses."""

    def make(*ends):
        folder = shutil.copytree(other_model, tmp_path / "ending")
        GenerationConfig(eos_token_id=list(ends)).save_pretrained(folder)
        return str(folder)

    return make


def test_a_later_policys_end_may_be_the_references_padding(measure, ending, tiny_model, tokenizer):
    """As Qwen's raw models: all are padded with a token that ends none, and that each has a row for."""
    folder = ending(tokenizer.eos_token_id, tokenizer.pad_token_id)
    policies = [f"sft={tiny_model}", f"maxmin={folder}", f"again={tiny_model}"]
    result = measure(policies=policies, num_samples=8)
    bar = LENGTH * log_prob_bar(AutoModelForCausalLM.from_pretrained(tiny_model), TINY_MODEL)
    np.testing.assert_allclose(result.kl["sft"], 0.0, atol=bar)
    np.testing.assert_array_equal(result.length["again"], result.length["sft"])
    # the reference reads the end of a policy like every other token
    padded = AutoTokenizer.from_pretrained(tiny_model)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    torch.manual_seed(0)
    policy = TokenPolicy.from_pretrained(folder, padded, max_new_tokens=LENGTH)
    assert tokenizer.pad_token_id in policy.eos_token_ids
    assert (result.length["maxmin"] < LENGTH).any()
    assert np.isfinite(result.kl["maxmin"]).all()


def test_a_policys_responses_are_scored_with_its_own_ends(
    measure, ending, tiny_model, tokenizer, prompts, tmp_path
):
    """A reward model that reads texts closes those that ended, and no others."""
    turn_end = tokenizer.convert_tokens_to_ids("the")
    folder = ending(tokenizer.eos_token_id, turn_end)
    torch.manual_seed(3)
    mixture = RewardMixture.from_backbone(tiny_model, 2, layout="concat")
    mixture.calibration = CALIBRATION
    mixture.save_pretrained(tmp_path / "reward")
    result = measure(
        policies=[f"sft={tiny_model}", f"maxmin={folder}"], reward_model_path=str(tmp_path / "reward")
    )
    torch.manual_seed(0)
    policy = TokenPolicy.from_pretrained(folder, tokenizer, max_new_tokens=LENGTH)
    sampled = sample_responses(policy, encode_prompts(tokenizer, prompts, 16), 3)
    rows = zip(sampled["action"], sampled["action_mask"], strict=True)
    texts = [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]
    ended = has_ended(sampled, [tokenizer.eos_token_id, turn_end]).flatten().tolist()
    assert ended != has_ended(sampled, tokenizer.eos_token_id).flatten().tolist()
    raw = mixture.score([prompt for prompt in prompts for _ in range(3)], texts, ended=ended).mean(0)
    found = result.extra["calibration"]["utilities"]["none"]
    assert list(found.values()) == pytest.approx(raw.tolist(), rel=1e-4, abs=1e-4)


def test_a_folder_of_weights_alone_reads_with_the_references_tokenizer(
    measure, other_model, tiny_model, tmp_path
):
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(other_model).save_pretrained(bare)
    found = measure(policies=[f"sft={tiny_model}", f"maxmin={bare}"])
    expected = measure(name="whole")
    np.testing.assert_array_equal(found.kl["maxmin"], expected.kl["maxmin"])


def test_other_vocabularies_are_refused_before_any_work(make_config, tiny_model, tmp_path):
    chat = save_chat_model(tmp_path / "chat", make_tokenizer())
    config = make_config(policies=[f"sft={tiny_model}", f"maxmin={chat}"])
    with pytest.raises(UserError, match=r"have different vocabularies, .* give policies of one base model"):
        measure_policies(config)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def chats(tmp_path):
    """Prompts as messages and as strings, and two policies that put them in other words."""
    for name, template in (("sft", CHATML), ("maxmin", CHATML.replace("<|end|>", "<|end|> ?"))):
        save_chat_model(tmp_path / name, make_tokenizer(template=template))
    for name, prompt in (("messages", [{"role": "user", "content": "a b"}]), ("strings", "a b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    return tmp_path


def test_other_chat_templates_need_one_for_all(make_config, chats):
    def config(name, **settings):
        policies = [f"{policy}={chats / policy}" for policy in ("sft", "maxmin")]
        judge = "test_evaluation_measure_tokenizers:sizes"
        return make_config(name, policies=policies, judge=judge, max_prompt_length=32, **settings)

    messages, strings = str(chats / "messages.jsonl"), str(chats / "strings.jsonl")
    for settings in ({}, {"system_prompt": "brief"}):
        with pytest.raises(UserError, match=r"different chat templates.*--chat_template"):
            measure_policies(config("out", dataset_name=messages, **settings))
    assert not (chats / "out").exists()
    measure_policies(config("strings", dataset_name=strings))
    for name, template in (("none", "none"), ("one", CHATML)):
        folder = measure_policies(config(name, dataset_name=messages, chat_template=template))
        np.testing.assert_allclose(SeedResult.load(folder / "result").kl["maxmin"], 0.0, atol=1e-4)


def sizes(prompts, completions):
    return [float(len(str(completion))) for completion in completions]
