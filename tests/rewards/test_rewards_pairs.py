"""Pairs as tokens, batches that can be put back, frozen features."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_maxmin.preferences import PreferenceDataset, encode
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.rewards.features import text_features
from torchrl_maxmin.rewards.fine_tuning import Batches
from torchrl_maxmin.rewards.pairs import PairTokens, each_once


@pytest.fixture(scope="module")
def data():
    import datasets

    words = ["the film", "was", "great and long", "not good at all"]
    rows = [
        {"prompt": words[i % 2], "chosen": words[i % 4], "rejected": words[(i + 1) % 4], "user_id": i % 3}
        for i in range(11)
    ]
    return PreferenceDataset.load(datasets.Dataset.from_list(rows))


def test_rows_are_the_encoded_texts(data, tiny_model, monkeypatch):
    monkeypatch.setattr("torchrl_maxmin.rewards.pairs._ENCODED_AT_ONCE", 4)
    mixture = RewardMixture.from_backbone(tiny_model, 2)
    pairs = PairTokens(data, mixture.encoder(None), mixture.reader.pad_id)
    assert len(pairs) == 11
    assert len(pairs.rows) == 22
    for i, (p, c, r) in enumerate(zip(data.prompts, data.chosen, data.rejected, strict=True)):
        assert pairs.rows[i] == encode(mixture.tokenizer, p, c)
        assert pairs.rows[11 + i] == encode(mixture.tokenizer, p, r)
    assert pairs.rows.lengths.tolist() == [len(pairs.rows[i]) for i in range(22)]


def test_repeats_are_tokenized_once():
    asked = []

    def encode(prompts, completions):
        asked.extend(zip(prompts, completions, strict=True))
        return [[len(str(p)), len(str(c))] for p, c in zip(prompts, completions, strict=True)]

    turn = [{"role": "user", "content": "hello"}]
    prompts, completions = ["a", turn, "a", "ab", turn], ["bc", "d", "bc", "c", "d"]
    assert each_once(encode)(prompts, completions) == encode(prompts, completions)
    assert sorted(map(str, asked[:3])) == sorted(map(str, [("a", "bc"), (turn, "d"), ("ab", "c")]))
    assert len(asked) == 3 + 5
    assert each_once(encode)([], []) == []


def test_margins_are_those_of_single_texts(data, tiny_model):
    mixture = RewardMixture.from_backbone(tiny_model, 2)
    pairs = PairTokens(data, mixture.encoder(None), mixture.reader.pad_id)
    one_by_one = torch.cat(
        [
            mixture.score([p], [c]) - mixture.score([p], [r])
            for p, c, r in zip(data.prompts, data.chosen, data.rejected, strict=True)
        ]
    )
    torch.testing.assert_close(pairs.margins(mixture, batch_size=3), one_by_one, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_meets_each_row_once(rows, size, seed):
    batches = Batches(rows, size, seed)
    seen = np.concatenate([next(batches) for _ in range(2 * rows)])[: 2 * rows]
    for epoch in seen.reshape(2, rows):
        assert sorted(epoch.tolist()) == list(range(rows))


def test_batches_go_on_where_they_stopped():
    batches = Batches(10, 4, 0)
    next(batches)
    state = batches.state_dict()
    following = [next(batches) for _ in range(7)]
    other = Batches(10, 4, 99)
    other.load_state_dict(state)
    assert [next(other) for _ in range(7)] == following


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
