"""Stop strings against the text of every prefix, truncated sampling against float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import TINY_MODEL, log_prob_bar
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.checks import check_model
from torchrl_maxmin.models.decoding import StopStrings
from torchrl_maxmin.models.loading import load_causal_lm
from torchrl_maxmin.models.sequences import has_ended, mask_after_eos, pad_left, penalise_missing_eos

PAD, BOS, EOS = 0, 1, 2
WIDTH = 10


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes and some longer pieces: strings end within tokens, characters between them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    raw = Tokenizer(models.BPE(vocabulary, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw)
    made.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<end>"]})
    return made


def first_end(tokenizer, row, strings, eos):
    """How many tokens of a row there are up to its end, by the text of every prefix."""
    for length in range(1, len(row) + 1):
        text = tokenizer.decode(row[:length])
        if row[length - 1] == eos or any(string in text for string in strings):
            return length
    return len(row)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc é.", min_size=6, max_size=9), min_size=1, max_size=4),
    st.lists(st.sampled_from(["bc", "abca", "é", "c a", ".", " .é"]), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_the_first_token_that_completes_a_string_ends_a_response(letters, texts, strings, place):
    rows = [letters(text).input_ids[:6] for text in texts]
    rows = [row[:place] + [letters.eos_token_id] * (place < 6) + row[place:] for row in rows]
    rows = [(row + [0] * 7)[:7] for row in rows]
    action = torch.tensor(rows)
    ends = StopStrings(strings, letters, [letters.eos_token_id])
    mask = mask_after_eos(action, ends)
    lengths = [first_end(letters, row, strings, letters.eos_token_id) for row in rows]
    assert mask.sum(-1).tolist() == lengths
    responses = TensorDict({"action": action, "action_mask": mask}, [len(rows)])
    shown = [letters.decode(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    ended = [any(s in text for s in [*strings, "</s>"]) for text in shown]
    assert has_ended(responses, ends).flatten().tolist() == ended
    penalised = penalise_missing_eos(torch.zeros(len(rows), 2), responses, ends, 0.5)
    assert penalised.tolist() == [[0.0 if e else -0.5] * 2 for e in ended]


@pytest.mark.parametrize(
    ("text", "string", "length"),
    [("xxabcx", "b", 3), ("x<end>x", "<end>", 2), ("xéx", "é", 3), ("x ax", " a", 2), ("xaxb", "ab", 4)],
    ids=["within a token", "a special token", "two bytes", "a space", "not there"],
)
def test_strings_within_tokens_and_characters_between_them(letters, text, string, length):
    action = torch.tensor([letters(text).input_ids])
    mask = mask_after_eos(action, StopStrings([string], letters, [letters.eos_token_id]))
    assert mask.sum() == length


def prompts_of(rows):
    tokens, mask = pad_left(rows, PAD)
    return TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [len(rows)])


def make_policy(folder, **settings):
    base = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": WIDTH}
    return TokenPolicy(load_causal_lm(folder), **(base | settings))


def test_generation_stops_where_the_mask_ends(tiny_model, tokenizer):
    whole = make_policy(tiny_model)
    first, second = (tokenizer.decode([token]) for token in (30, 40))
    strings = [first, f"{second} {first}", tokenizer.decode([50])]
    policy = make_policy(tiny_model, stop_strings=strings, tokenizer=tokenizer)
    # the last prompt ends with a string: no response has ended before it began
    prompts = prompts_of([[BOS, 10, 11], [BOS, 20], [BOS, 12, 50]] * 60)
    torch.manual_seed(0)
    unstopped = whole(prompts.clone())
    torch.manual_seed(0)
    batch = policy(prompts.clone())
    lengths = [
        first_end(tokenizer, row[mask].tolist(), strings, EOS)
        for row, mask in zip(unstopped["action"], unstopped["action_mask"], strict=True)
    ]
    assert batch["action_mask"].sum(-1).tolist() == lengths
    assert torch.equal(batch["action_mask"], mask_after_eos(batch["action"], policy.ends))
    assert sum(a < b for a, b in zip(lengths, unstopped["action_mask"].sum(-1).tolist(), strict=True)) > 20
    same = batch["action_mask"]
    assert torch.equal(batch["action"][same], unstopped["action"][same])
    assert torch.equal(batch["sample_log_prob"][same], unstopped["sample_log_prob"][same])
    assert (batch["action"][~same] == PAD).all()
    assert (batch["sample_log_prob"][~same] == 0).all()


def test_stop_strings_need_the_tokenizer_and_copy_with_the_policy(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="give the tokenizer"):
        make_policy(tiny_model, stop_strings=["."])
    policy = copy.deepcopy(make_policy(tiny_model, stop_strings=["."], tokenizer=tokenizer))
    assert policy.ends.strings == (".",)
    assert make_policy(tiny_model, tokenizer=tokenizer).ends == (EOS,)


def kept(logits, temperature, top_k, top_p):
    """The whole distribution [V] and the tokens that are kept, in float64, and how far the next is."""
    log_probs = (logits.double() / temperature).log_softmax(-1)
    values, order = log_probs.sort(descending=True)
    count = top_k or len(order)
    share = (values[:count].exp() / values[:count].exp().sum()).cumsum(0)
    before = torch.cat([share.new_zeros(1), share[:-1]])
    clear = (share - top_p).abs().min() if top_p < 1 else torch.inf
    if top_k:
        clear = min(clear, values[count - 1] - values[count])
    return log_probs, order[:count][before < top_p], clear


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(5, 1.0, 1.0), (0, 0.7, 1.3), (12, 0.8, 0.7)])
def test_the_log_probability_is_that_of_what_was_sampled(tiny_model, top_k, top_p, temperature):
    policy = make_policy(tiny_model, top_k=top_k, top_p=top_p, temperature=temperature)
    rows = [[BOS, 10, 11], [BOS, 20], [BOS]] * 20
    torch.manual_seed(0)
    batch = policy(prompts_of(rows))
    bar = log_prob_bar(policy.model, TINY_MODEL, temperature)
    with torch.no_grad():
        scored = policy.log_prob(batch)
    torch.testing.assert_close(batch["whole_log_prob"], scored, atol=bar, rtol=0)
    seen = 0
    for i, row in enumerate(rows):
        action = batch["action"][i][batch["action_mask"][i]].tolist()
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([row + action])).logits[0, len(row) - 1 : -1]
        for t, token in enumerate(action):
            whole, tokens, clear = kept(logits[t], temperature, top_k, top_p)
            if clear < 1e-4:
                continue
            assert token in tokens
            expected = whole[token] - whole[tokens].logsumexp(-1)
            torch.testing.assert_close(batch["sample_log_prob"][i, t].double(), expected, atol=1e-5, rtol=0)
            seen += 1
    assert seen > 200
    hidden = ~batch["action_mask"]
    assert (batch["whole_log_prob"][hidden] == 0).all()
    assert (batch["whole_log_prob"] < batch["sample_log_prob"]).any()


def test_first_tokens_follow_the_truncated_distribution(tiny_model):
    policy = make_policy(tiny_model, max_new_tokens=1, top_k=8, top_p=0.9, temperature=0.8)
    torch.manual_seed(0)
    batch = policy(prompts_of([[BOS, 10]] * 4000))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[BOS, 10]])).logits[0, -1]
    whole, tokens, _ = kept(logits, 0.8, 8, 0.9)
    exact = torch.zeros_like(whole)
    exact[tokens] = whole[tokens].exp() / whole[tokens].exp().sum()
    counts = batch["action"][:, 0].bincount(minlength=len(exact))
    assert counts[exact == 0].sum() == 0
    deviation = (counts - 4000 * exact) / (4000 * exact * (1 - exact)).sqrt().clamp(min=1e-9)
    assert deviation[exact > 0].abs().max() < 4.5


def test_limits_that_keep_all_tokens_change_nothing(tiny_model):
    plain, loose = make_policy(tiny_model), make_policy(tiny_model, top_k=10**6)
    assert plain.out_keys == ["action", "action_mask", "sample_log_prob"]
    prompts = prompts_of([[BOS, 10], [BOS]])
    found = []
    for policy in (plain, loose):
        torch.manual_seed(3)
        found.append(policy(prompts.clone()))
    assert "whole_log_prob" not in found[0]
    for key in plain.out_keys:
        assert torch.equal(found[0][key], found[1][key])
    assert torch.equal(found[1]["whole_log_prob"], found[1]["sample_log_prob"])


def test_a_policy_that_truncates_passes_the_checks(tiny_model, tokenizer):
    check_model(make_policy(tiny_model, top_p=0.5, stop_strings=["."], tokenizer=tokenizer))


def test_slices_are_of_like_length_and_answer_their_own_prompts(tiny_model, monkeypatch):
    lengths = [7, 1, 5, 2, 7, 1, 3, 6, 2]
    rows = [[BOS] + [10 + i] * (length - 1) for i, length in enumerate(lengths)]
    policy = make_policy(tiny_model, generation_batch_size=4, top_k=20)
    shapes, generate = [], policy.model.generate

    def watched(input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(policy.model, "generate", watched)
    prompts = prompts_of(rows)
    torch.manual_seed(0)
    batch = policy(prompts.clone())
    assert shapes == [(4, 7), (4, 3), (1, 1)]
    for key in ("prompt_tokens", "prompt_mask"):
        assert torch.equal(batch[key], prompts[key])
    with torch.no_grad():  # a response of another prompt has other log-probabilities
        scored = policy.log_prob(batch)
    bar = log_prob_bar(policy.model, TINY_MODEL)
    torch.testing.assert_close(batch["whole_log_prob"], scored, atol=bar, rtol=0)


def test_one_slice_is_what_it_was_to_the_bit(tiny_model):
    prompts = prompts_of([[BOS, 10, 11], [BOS], [BOS, 12]])
    found = []
    for size in (None, 3, 512):
        torch.manual_seed(1)
        found.append(make_policy(tiny_model, generation_batch_size=size)(prompts.clone()))
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())
