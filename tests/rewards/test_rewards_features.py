"""Frozen features of texts."""

import torch

from torchrl_maxmin.rewards.pairs import text_features


def test_text_features_are_last_state_and_sums(tiny_model):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tiny_model).eval()
    rows = [[1, 5, 6, 7, 2], [1, 2], [1, 9, 9, 2]]
    features = text_features(model, rows, pad_id=0, batch_size=2)
    with torch.no_grad():
        for row, feature in zip(rows, features, strict=True):
            tokens = torch.tensor([row])
            states = model.transformer(input_ids=tokens).last_hidden_state[0]
            embedded = model.transformer.wte(tokens)[0]
            expected = torch.cat([states[-1], states.sum(0), embedded.sum(0)])
            torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-4)
