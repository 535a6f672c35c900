"""Tokens that given numbers draw: whose they are, how often, and with which log-probability."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.decoding import NUMBERS, GivenNumbers
from torchrl_maxmin.models.sampling import encode_prompts


def drawn(scores, numbers, temperature=1.0):
    kept = GivenNumbers(numbers[:, None], 0, temperature)(
        torch.zeros(len(scores), 0, dtype=torch.int64), scores
    )
    assert ((kept == 0).sum(-1) == 1).all()
    assert (kept.isneginf().sum(-1) == scores.shape[-1] - 1).all()
    return kept.argmax(-1)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.2, 5.0))
def test_it_is_the_inverse_of_the_cumulated_probabilities(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 7, generator=generator)
    scores[0, seed % 7] = -torch.inf
    numbers = torch.arange(0, 2000, dtype=torch.float64) / 2000
    tokens = drawn(scores.expand(2000, -1), numbers, temperature)
    shares = tokens.bincount(minlength=7) / 2000
    expected = (scores[0].double() / temperature).softmax(-1)
    assert (shares - expected).abs().max() <= 1.01 / 2000
    assert shares[seed % 7] == 0
    assert (tokens.diff() >= 0).all()


@settings(deadline=None)
@given(
    size=st.sampled_from([255, 256, 257, 700]), seed=st.integers(0, 10**6), temperature=st.floats(0.2, 5.0)
)
def test_vocabularies_of_several_blocks_are_drawn_as_of_one(size, seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, size, generator=generator) * 3
    scores[0, torch.randperm(size, generator=generator)[: seed % size]] = -torch.inf
    numbers = torch.rand(500, generator=generator, dtype=torch.float64)
    sums = (scores[0].double() / temperature).softmax(-1).cumsum(-1)
    tokens = drawn(scores.expand(500, -1), numbers, temperature)
    assert not scores[0, tokens].isneginf().any()
    # to the rounding of a sum in float32: a number between two tokens may draw either
    below = torch.where(tokens > 0, sums[tokens - 1], 0.0)
    assert (below - 1e-5 <= numbers).all()
    assert (numbers <= sums[tokens] + 1e-5).all()


@pytest.mark.parametrize("size", [256, 300])
def test_scores_without_a_number_draw_a_token(size):
    tokens = drawn(torch.full((3, size), torch.nan), torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert ((tokens >= 0) & (tokens < size)).all()


def test_large_vocabularies_are_drawn_by_a_number_a_token(tiny_model, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = TokenPolicy.from_pretrained(tiny_model, tokenizer, max_new_tokens=6)
    prompts = encode_prompts(tokenizer, ["the film", "a", "it was a good film"])
    monkeypatch.setattr("torchrl_maxmin.models.language.LARGE_VOCABULARY", len(tokenizer))
    torch.manual_seed(0)
    whole = policy(prompts.clone())
    torch.manual_seed(0)
    assert torch.equal(
        whole["action"], policy._answer(prompts.clone().set(NUMBERS, torch.rand(3, 6)), 6)["action"]
    )
    policy.generation_batch_size = 1  # slices draw what the whole would
    torch.manual_seed(0)
    assert torch.equal(whole["action"], policy(prompts.clone())["action"])
    assert NUMBERS not in whole


def test_both_ends_draw_what_can_be_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert drawn(scores, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 5, "temperature": 1.5}, {"top_p": 0.8}]
)
def test_a_row_is_the_same_whoever_is_beside_it(tiny_model, options):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = TokenPolicy(
        AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=6,
        **options,
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) >= torch.tensor([0, 1, 3, 2, 0])[:, None]
    prompts = TensorDict(
        {
            "prompt_tokens": torch.randint(5, len(tokenizer), (5, 4), generator=generator),
            "prompt_mask": mask,
            "drawn_by": torch.rand(5, 6, generator=generator),
        },
        [5],
    )
    before = torch.get_rng_state()
    whole = policy._answer(prompts.clone(), 6)
    assert torch.equal(torch.get_rng_state(), before)  # nothing else is drawn
    policy.generation_batch_size = 2
    parts = policy._answer(prompts.clone(), 6)
    for other in (parts, torch.cat([policy._answer(row.clone(), 6) for row in prompts.split(1)])):
        assert torch.equal(other["action"], whole["action"])
        torch.testing.assert_close(other["sample_log_prob"], whole["sample_log_prob"])
    scored = policy.log_prob(whole)
    torch.testing.assert_close(
        whole.get("whole_log_prob", whole["sample_log_prob"]), scored, atol=1e-5, rtol=1e-5
    )
