"""Widths, positions and nested configs of trunks, the same for every architecture."""

import copy

import pytest
import torch
from architectures import build, write

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models import TokenCritic, TokenPolicy
from torchrl_maxmin.models.loading import load_causal_lm, load_tokenizer, require_causal_lm
from torchrl_maxmin.models.sampling import encode_prompts, sample_responses
from torchrl_maxmin.models.sequences import (
    backbone_of,
    max_positions,
    pad_right,
    require_positions,
    states_width,
    text_config,
)
from torchrl_maxmin.rewards.features import load_feature_trunk, text_features


@pytest.mark.parametrize(
    ("name", "width"),
    [("GPT-2", 16), ("OPT (projected)", 8), ("Gemma3 (images)", 16), ("Mamba2", 16), ("BERT", 16)],
)
def test_the_width_of_states_is_that_of_what_the_trunk_gives(name, width, tokenizer):
    backbone = backbone_of(build(name, tokenizer))
    torch.manual_seed(2)
    expected = torch.rand(2)
    torch.manual_seed(2)
    assert states_width(backbone) == width
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", ["OPT (projected)", "Gemma3 (images)"])
def test_a_critic_and_features_of_a_trunk_with_another_width(name, tokenizer, tmp_path):
    folder = write(name, tokenizer, tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    policy = TokenPolicy.from_pretrained(folder, tokenizer, max_new_tokens=4)
    batch = sample_responses(policy, encode_prompts(tokenizer, ["the film", "its"]), 2)
    critic = TokenCritic(copy.deepcopy(backbone_of(policy.model)), 3)
    assert critic(batch)["state_value"].shape == (4, 4, 3)

    model, reader = load_feature_trunk(folder)
    rows = reader.encode(["the film", "its"], ["was great .", "cast"])
    features = text_features(model, rows, reader.pad_id, reader=reader)
    tokens, mask = pad_right(rows, reader.pad_id)
    width = states_width(backbone_of(model))
    with torch.no_grad():
        for i in range(2):
            alone = backbone_of(model)(input_ids=tokens[i : i + 1, mask[i]]).last_hidden_state[0]
            embedded = model.get_input_embeddings()(tokens[i, mask[i]])
            expected = torch.cat([alone[-1], alone.sum(0), embedded.sum(0)])
            torch.testing.assert_close(features[i], expected, atol=1e-4, rtol=1e-5)
    assert features.shape == (2, 2 * width + embedded.shape[-1])


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("GPT-2", 64),
        ("OPT (projected)", 64),
        ("Gemma3 (images)", 64),
        ("MPT (ALiBi)", 64),
        ("Bloom (ALiBi)", None),
        ("Mamba2", None),
    ],
)
def test_positions(name, positions, tokenizer):
    model = build(name, tokenizer)
    assert (
        max_positions(model) == max_positions(backbone_of(model)) == max_positions(model.config) == positions
    )


def test_nested_configs(tokenizer, tmp_path):
    folder = write("Gemma3 (images)", tokenizer, tmp_path / "model")
    model = load_causal_lm(folder)
    assert text_config(model) is text_config(model.config) is model.config.text_config
    assert text_config(backbone_of(model)).hidden_size == 16
    assert require_causal_lm(folder).model_type == "gemma3"


def test_prompt_and_response_must_fit(tokenizer):
    model = build("GPT-2", tokenizer)
    require_positions(model, 60, 4)
    with pytest.raises(
        UserError, match="has 60 tokens and a response up to 5, more than the model's 64 positions"
    ):
        require_positions(model, 60, 5)
    require_positions(build("Bloom (ALiBi)", tokenizer), 10_000, 10_000)
