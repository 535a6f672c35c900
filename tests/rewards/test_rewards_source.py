"""Reward functions as users write them: columns of the data, None, and numbers that may not change."""

import datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tensordict import TensorDict
from transformers import GenerationConfig

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer, same_vocabulary
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses
from torchrl_maxmin.rewards import Calibration, RewardMixture
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.functions import FunctionRewards, UserFunction, distinct_rows, extra_columns
from torchrl_maxmin.rewards.source import MixtureRewards, NonFiniteRewards, fill_absent

PROMPTS = ["the film", "we loved", "it"]


def responses(tokenizer, index):
    rows = TensorDict(
        {
            "prompt_tokens": torch.tensor([tokenizer(PROMPTS[0]).input_ids] * len(index)),
            "prompt_mask": torch.ones(len(index), 3, dtype=torch.bool),
            "prompt_index": torch.tensor(index),
            "action": torch.tensor([tokenizer("was great").input_ids[1:]] * len(index)),
            "action_mask": torch.ones(len(index), 2, dtype=torch.bool),
        },
        [len(index)],
    )
    assert rows["prompt_tokens"].shape[1] == 3
    return rows


def test_functions_get_the_datas_own_prompts_and_columns(tokenizer):
    """Not what their tokens read back as, which the length limit may have cut."""
    seen = []

    def score(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return [float(len(a)) for a in answer]

    def everything(prompts, completions, **columns):
        seen.append(sorted(columns))
        return [1.0] * len(prompts)

    columns = {"answer": ["x", "xx", "xxx"], "other": [1, 2, 3]}
    source = FunctionRewards([score, everything], tokenizer, PROMPTS, columns)
    assert seen == [(PROMPTS[:2], ["c", "d e"], ["x", "xx"]), ["answer", "other"]]
    rewards = source(responses(tokenizer, [2, 0, 2]))
    assert seen[-2] == (["it", "the film", "it"], ["was great"] * 3, ["xxx", "x", "xxx"])
    assert rewards.tolist() == [[3.0, 1.0], [1.0, 1.0], [3.0, 1.0]]


def test_only_columns_that_a_function_takes_are_read():
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "p", "answer": i, "big": "x"} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    assert extra_columns([lambda prompts, completions, answer: 0], table, [2, 0]) == {"answer": [2, 0]}
    assert extra_columns([lambda prompts, completions: 0, len], table, [0]) == {}
    assert set(extra_columns([lambda p, c, **rest: 0], table, [0])) == {"answer", "big"}


def test_rows_are_one_where_prompt_and_columns_are_equal():
    ask_a, ask_b = [{"role": "user", "content": "a"}], [{"content": "b", "role": "user"}]
    prompts = ["a", ask_a, "a", ask_b, [{"content": "a", "role": "user"}], "a"]
    assert distinct_rows(prompts, {}) == [0, 1, 3]
    nested = [{"x": [1], "y": None}, 0, {"y": None, "x": [1]}, 0, 0, {"x": [2], "y": None}]
    assert distinct_rows(prompts, {"answer": nested}) == [0, 1, 3, 5]
    days = [datetime.date(2020, 1, day) for day in (1, 2, 3, 4, 2, 1)]
    assert distinct_rows(prompts, {"day": days}) == [0, 1, 2, 3]
    assert distinct_rows(prompts, {"day": days, "answer": nested}) == [0, 1, 2, 3, 5]


def test_none_leaves_a_response_out_of_its_groups_mean(tokenizer):
    answers = [[1.0, None], [3.0, 4.0], [None, 8.0]]
    calls = iter([[[1.0, 2.0]] * 2, answers])
    source = FunctionRewards([lambda p, c: next(calls)], tokenizer, PROMPTS)
    raw = source(responses(tokenizer, [0, 1, 2]))
    assert raw.isnan().tolist() == [[False, True], [False, False], [True, False]]
    filled = fill_absent(raw, torch.tensor([5.0, 7.0]))
    assert filled.mean(0).tolist() == [2.0, 6.0]
    assert filled[0, 0] == 1
    assert filled[1, 1] == 4
    silent = fill_absent(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]]), torch.tensor([5.0, 7.0]))
    assert silent.tolist() == [[1.0, 7.0], [1.0, 7.0]]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1.0, None], [[1.0], [np.nan]]),
        ((None, 2), [[np.nan], [2.0]]),
        ([[1.0, 2.0], [None, 3.0]], [[1.0, 2.0], [np.nan, 3.0]]),
        ([torch.tensor(1.0), None], [[1.0], [np.nan]]),
    ],
)
def test_forms_of_none(answer, expected):
    np.testing.assert_array_equal(UserFunction(lambda p, c: answer)(["a", "b"], ["c", "d"]), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_none(bad):
    with pytest.raises(NonFiniteRewards, match="NaN or infinity"):
        UserFunction(lambda p, c: [bad, None])(["a", "b"], ["c", "d"])
    with pytest.raises(UserError, match="gives no numbers"):
        UserFunction(lambda p, c: ["x", None])(["a", "b"], ["c", "d"])


def test_the_number_of_groups_may_not_change(tokenizer):
    """One number a response would else be every group's."""
    calls = iter([[[1.0, 2.0]] * 2, [5.0, 6.0, 7.0]])
    source = FunctionRewards([lambda p, c: next(calls)], tokenizer, PROMPTS)
    with pytest.raises(UserError, match=r"gave 2 number\(s\) a response at first, and gives 1 now"):
        source(responses(tokenizer, [0, 1, 2]))


# -- calibration on samples of which some have no reward -------------------------------------------


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (5, 4, 2), elements=st.floats(-4, 4)), st.integers(0, 2**32 - 1))
def test_calibration_counts_what_is_there(values, seed):
    values += np.random.default_rng(seed).normal(size=values.shape)
    absent = np.random.default_rng(seed + 1).random(values.shape) < 0.3
    absent[0] = False
    raw = np.where(absent, np.nan, values)
    fitted = Calibration.fit(torch.from_numpy(raw), "sft_std")
    for k in range(2):
        present = [row[~np.isnan(row)] for row in raw[..., k]]
        np.testing.assert_allclose(fitted.shift[k], np.concatenate(present).mean(), rtol=1e-5, atol=1e-5)
        variance = np.mean([np.var(row, ddof=1) for row in present if len(row) > 1])
        np.testing.assert_allclose(fitted.scale[k], variance**0.5, rtol=1e-5)
    win_rate = Calibration.fit(torch.from_numpy(raw), "win_rate").apply(torch.from_numpy(raw))
    for k in range(2):
        known = raw[..., k][~absent[..., k]]
        expected = (1 / (1 + np.exp(known[None] - known[:, None]))).mean(1)
        np.testing.assert_allclose(win_rate[..., k].numpy()[~absent[..., k]], expected, atol=1e-5)
    assert win_rate.isnan().numpy().tolist() == absent.tolist()


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_calibration_needs_a_reward_of_every_group(method):
    raw = torch.randn(3, 2, 2)
    raw[..., 1] = torch.nan
    with pytest.raises(UserError, match=r"no reference sample has a reward for group\(s\) \[1\]"):
        Calibration.fit(raw, method)


def test_a_deviation_needs_two_samples_of_a_prompt():
    raw = torch.randn(3, 2, 2)
    raw[..., 1] = torch.nan
    raw[:, 0, 1] = 1.0
    with pytest.raises(UserError, match=r"no prompt has two reference samples .* group\(s\) \[1\]"):
        Calibration.fit(raw)


@pytest.mark.parametrize("raw", ["an end pads", "nothing pads"])
def test_a_pad_token_of_its_own_is_no_other_vocabulary(make_model, tokenizer, tmp_path, raw):
    """Models whose generation config ends responses with the pad token, as Qwen's do: the trunk has no such
    config, so it keeps the pad token that the policy cannot."""
    folder = make_model(f"raw_{raw[:2]}")
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    if raw == "an end pads":
        GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    mixture = RewardMixture.from_backbone(folder, 2)
    own = load_tokenizer(folder)
    if raw == "nothing pads":
        own.pad_token = None
    policy = TokenPolicy.from_pretrained(folder, own, max_new_tokens=4)
    assert mixture.tokenizer.pad_token == "<pad>"
    assert own.pad_token == "<|pad|>"
    rows = [m.get_input_embeddings().num_embeddings for m in (policy.model, mixture.model)]
    assert rows == [len(tokenizer) + 1, len(tokenizer)]
    rewards = MixtureRewards(mixture, own, PROMPTS, policy.eos_token_ids)
    assert rewards.shared_vocabulary
    torch.manual_seed(0)
    prompts = encode_prompts(own, PROMPTS)
    sampled = sample_responses(policy, prompts, 8)
    texts = [
        torch.cat([r["prompt_tokens"][r["prompt_mask"]], r["action"][r["action_mask"]]]) for r in sampled
    ]
    known = [text[text < rows[1]] for text in texts]
    with torch.no_grad():
        alone = [mixture(text[None], torch.ones(1, len(text), dtype=torch.bool)) for text in known]
    torch.testing.assert_close(rewards(sampled), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_vocabularies_are_the_same_but_for_padding(tiny_model):
    def changed(**special):
        made = load_tokenizer(tiny_model)
        made.add_special_tokens(special)
        return made

    plain, padded = load_tokenizer(tiny_model), changed(pad_token="<|pad|>")
    assert same_vocabulary(plain, plain)
    assert same_vocabulary(plain, padded)
    assert same_vocabulary(padded, plain)
    assert same_vocabulary(padded, changed(pad_token="<other pad>"))
    extra = changed(additional_special_tokens=["<|pad|>"])  # a word of the one, padding of the other
    assert not same_vocabulary(plain, extra)
    assert not same_vocabulary(extra, plain)
    later = changed(additional_special_tokens=["<new>"])
    later.add_special_tokens({"pad_token": "<|pad|>"})
    assert not same_vocabulary(padded, later)


def test_rows_beyond_the_words_are_no_tokens(tiny_model, tokenizer):
    """A policy whose embeddings were padded samples them, and reads them as nothing."""
    mixture = RewardMixture.from_backbone(tiny_model, 2)
    rewards = MixtureRewards(mixture, tokenizer, PROMPTS)
    plain, odd = responses(tokenizer, [0, 0]), responses(tokenizer, [0, 0])
    beyond = torch.full((2, 1), len(tokenizer) + 3)
    odd["action"] = torch.cat([odd["action"][:, :1], beyond, odd["action"][:, 1:]], -1)
    odd["action_mask"] = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(rewards(odd), rewards(plain))
    assert not torch.equal(rewards(plain), torch.zeros(2, 2))


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, prompts: [float(len(c)) for c in completions],
        lambda completions, **kwargs: [float(len(c)) for c in completions],
        lambda completions, target, **kwargs: [float(len(c)) for c in completions],
        lambda completions, target: [float(len(c)) for c in completions],
        lambda prompts, completion, **kwargs: [float(len(c)) for c in kwargs["completions"]],
        lambda p, c: [float(len(x)) for x in c],
        lambda p, c, **kwargs: [float(len(x)) for x in c],
    ],
)
def test_functions_in_every_form_that_trl_takes(function):
    columns = {"target": ["x"], "completion": ["y"], "p": ["z"]}
    assert UserFunction(function)(["PP"], ["CCCC"], columns).tolist() == [[4.0]]
