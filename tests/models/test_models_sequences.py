"""Padding, masks and hidden states of ragged rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from transformers import GPT2LMHeadModel

from torchrl_maxmin.models.sequences import (
    backbone_of,
    has_ended,
    hidden_states,
    in_length_buckets,
    last_index,
    mask_after_eos,
    pad_left,
    pad_right,
    penalise_missing_eos,
)

ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_padding_keeps_every_token_and_masks_come_from_lengths(rows):
    width = max(map(len, rows))
    for pad, side in ((pad_left, "left"), (pad_right, "right")):
        tokens, mask = pad(rows, 0)  # 0 also occurs as a real token
        assert tokens.shape == mask.shape == (len(rows), width)
        assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
        for row, t, m in zip(rows, tokens, mask, strict=True):
            assert t[m].tolist() == row
            real = m.tolist()
            assert real == sorted(real, reverse=side == "right")
        assert (tokens[~mask] == 0).all()
        expected = [len(r) - 1 if side == "right" else width - 1 for r in rows]
        assert last_index(mask).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_mask_after_eos_ends_with_the_first_eos(rows):
    mask = mask_after_eos(torch.tensor(rows), 2)
    for row, m in zip(rows, mask.tolist(), strict=True):
        real = row.index(2) + 1 if 2 in row else 5
        assert m == [True] * real + [False] * (5 - real)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=5, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
def test_the_first_of_several_ends_ends_a_response(rows, ends):
    action = torch.tensor(rows)
    mask = mask_after_eos(action, ends)
    ended = has_ended(TensorDict({"action": action, "action_mask": mask}, [len(rows)]), ends)
    for row, m, e in zip(rows, mask.tolist(), ended.tolist(), strict=True):
        found = [t for t, token in enumerate(row) if token in ends]
        real = found[0] + 1 if found else 5
        assert m == [True] * real + [False] * (5 - real)
        assert e == [bool(found)]


def test_an_end_behind_the_response_does_not_end_it():
    responses = TensorDict(
        {"action": torch.tensor([[5, 2, 2]]), "action_mask": torch.tensor([[True, False, False]])}, [1]
    )
    assert has_ended(responses, 2).tolist() == [[False]]
    assert penalise_missing_eos(torch.ones(1, 2), responses, 2, 0.25).tolist() == [[0.75, 0.75]]


def test_backbone_is_the_trunk(tiny_model):
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    assert backbone_of(model) is model.transformer
    assert backbone_of(model.transformer) is model.transformer


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_hidden_states_do_not_depend_on_padding(tiny_model, pad):
    trunk = GPT2LMHeadModel.from_pretrained(tiny_model).eval().transformer
    rows = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    tokens, mask = pad([*rows, list(range(20, 33))], 0)
    with torch.no_grad():
        states = hidden_states(trunk, tokens, mask)
        for row, s, m in zip(rows, states, mask, strict=False):
            alone = trunk(input_ids=torch.tensor([row])).last_hidden_state[0]
            torch.testing.assert_close(s[m], alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(1, 6), st.booleans(), st.randoms())
def test_buckets_give_every_row_its_own_result(rows, size, answered, random):
    tokens, mask = pad_left(rows, 0)
    table = TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [len(rows)])
    answers = [random.randint(1, 4) if answered else 0 for _ in rows]
    if answered:
        table["action_mask"] = torch.arange(4) < torch.tensor(answers)[:, None]
    seen = []

    def function(part):
        real = part["prompt_mask"]
        if len(rows) > size:
            assert real[:, 0].any()  # no column is padding alone
        seen.append((real.sum(-1) + part.get("action_mask", torch.zeros(len(real), 1)).sum(-1)).tolist())
        part["total"] = torch.stack([(part["prompt_tokens"] * real).sum(-1), real.sum(-1)], -1)
        return part

    found = in_length_buckets(function, table.copy(), size)
    assert found["total"].tolist() == [[sum(row), len(row)] for row in rows]
    whole = [length for part in seen for length in part]
    assert all(len(part) <= size for part in seen) or len(seen) == 1
    if len(rows) > size:
        assert found.keys() == {"total"}
        assert whole == sorted(map(sum, zip(map(len, rows), answers, strict=True)), reverse=True)
