"""The evaluation stage with stop strings, truncated sampling and slices."""

import json

import numpy as np
import pytest
import torch
from evaluation_results import LENGTH
from rounding import TINY_MODEL, log_prob_bar
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation.measure import run_evaluate
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses


def test_stop_strings_end_what_is_measured(measure, tiny_model, prompts):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = measure(name="plain", num_samples=40)
    torch.manual_seed(0)
    policy = TokenPolicy.from_pretrained(tiny_model, tokenizer, max_new_tokens=LENGTH)
    sampled = sample_responses(policy, encode_prompts(tokenizer, prompts), 40)
    counts = sampled["action"][sampled["action_mask"]].bincount(minlength=len(tokenizer))
    counts[tokenizer.all_special_ids] = 0
    word = int(counts.argmax())
    stopped = measure(name="stopped", num_samples=40, stop_strings=[tokenizer.decode([word])])
    said = ((sampled["action"] == word) & sampled["action_mask"]).int()
    cut = (sampled["action_mask"] & (said.cumsum(-1) - said == 0)).sum(-1)
    np.testing.assert_array_equal(stopped.length["sft"].reshape(-1), cut.numpy())
    assert (stopped.length["sft"] < plain.length["sft"]).any()


def test_truncated_policies_have_a_kl_and_no_certificate(measure, tiny_model, reward_folder):
    result = measure(top_k=3, num_samples=20, reward_model_path=reward_folder, judge=reward_folder)
    assert (result.kl["sft"] >= 0).all()  # log m - log p is -log Z of the tokens kept
    assert result.kl["sft"].mean() > 0.1
    certificate = result.extra["certificate"]
    assert certificate["value"] is None
    assert "top_k and top_p leave out" in certificate["reason"]
    whole = measure(name="whole", num_samples=20)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert np.abs(whole.kl["sft"]).max() < LENGTH * log_prob_bar(model, TINY_MODEL)


def test_a_slice_of_the_evaluation_is_as_small_as_asked(measure, tiny_model, monkeypatch):
    sizes, answer = [], TokenPolicy._answer

    def watched(self, tensordict, *args, **options):
        sizes.append(len(tensordict))
        return answer(self, tensordict, *args, **options)

    monkeypatch.setattr(TokenPolicy, "_answer", watched)
    result = measure(generation_batch_size=5, scoring_batch_size=4)
    assert sum(size == 5 for size in sizes) >= 6  # 18 responses of each of two policies
    assert result.utilities["sft"].shape == (6, 3, 2)


@pytest.mark.parametrize(
    ("settings", "line"), [({"top_p": 2.0}, "--top_p"), ({"stop_strings": [""]}, "--stop_strings")]
)
def test_what_cannot_be_is_one_line(make_config, settings, line):
    with pytest.raises(UserError, match=line):
        run_evaluate(make_config(**settings))


def test_a_report_is_written_of_truncated_policies(make_config):
    folder = run_evaluate(make_config(top_p=0.8, stop_strings=["."], num_samples=4))
    assert json.loads((folder / "summary.json").read_text())["policies"]["maxmin"]["kl"]
