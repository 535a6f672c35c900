"""Luce's choices: which rows of pairs are one, and that rankings are rebuilt from them."""

from itertools import pairwise

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.schemas.pairs import ranked

RANKINGS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(2, 6).flatmap(lambda n: st.permutations(range(n)))),
    min_size=1,
    max_size=6,
)


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def from_rankings(rankings):
    rows = [
        {"prompt": f"p{i}", "ranked_responses": [f"i{item}" for item in order], "user_id": f"u{user}"}
        for i, (user, order) in enumerate(rankings)
    ]
    return from_rows(rows)


def choices_of(data):
    """(user, prompt, chosen, rejected ones) of every choice, each of one chosen response."""
    users, found = data.row_users.tolist(), []
    prompts, chosen, rejected = data.prompts[:], data.chosen[:], data.rejected[:]
    for start, stop in pairwise(data.choice_offsets.tolist()):
        assert len(set(zip(users[start:stop], prompts[start:stop], chosen[start:stop], strict=True))) == 1
        assert len(set(rejected[start:stop])) == stop - start > 0
        found.append((users[start], prompts[start], chosen[start], frozenset(rejected[start:stop])))
    return found


@settings(max_examples=60, deadline=None)
@given(RANKINGS)
def test_choices_rebuild_every_ranking(rankings):
    data = from_rankings(rankings)
    assert data.choice_offsets.tolist() == sorted(set(data.choice_offsets.tolist()))
    rebuilt = {}
    for user, prompt, chosen, rejected in choices_of(data):
        rebuilt.setdefault((data.user_ids[user], prompt), []).append((chosen, rejected))
    for i, (user, order) in enumerate(rankings):
        items = [f"i{item}" for item in order]
        expected = [(item, frozenset(items[place + 1 :])) for place, item in enumerate(items[:-1])]
        assert rebuilt.pop((f"u{user}", f"p{i}")) == expected
    assert not rebuilt


def log_likelihood(data, reward):
    """Of all choices by their rows, as they are modelled: -log(1 + sum exp(-margin))."""
    sides = zip(data.chosen, data.rejected, strict=True)
    terms = np.exp([reward[rejected] - reward[chosen] for chosen, rejected in sides])
    return -np.log1p(np.add.reduceat(terms, data.choice_offsets[:-1].numpy())).sum()


@settings(max_examples=60, deadline=None)
@given(RANKINGS, st.lists(st.floats(-9, 9), min_size=6, max_size=6), st.randoms(use_true_random=False))
def test_rows_in_any_order_give_plackett_luce(rankings, values, random):
    data = from_rankings(rankings)
    reward = {f"i{item}": value for item, value in enumerate(values)}
    expected = 0.0
    for _, order in rankings:
        values = np.array([reward[f"i{item}"] for item in order])
        expected += sum(values[i] - np.log(np.exp(values[i:]).sum()) for i in range(len(values)))
    mixed = random.sample(range(len(data)), len(data))
    for part in (data, data.select_rows(mixed), data.select_rows(mixed).select_rows(mixed)):
        assert log_likelihood(part, reward) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(RANKINGS, st.floats(0.1, 0.9), st.integers(0, 9), st.randoms(use_true_random=False))
def test_what_is_left_of_a_choice_is_one_choice(rankings, fraction, seed, random):
    data = from_rankings(rankings)

    def named(part):
        return {(part.user_ids[user], *rest): rejected for user, *rest, rejected in choices_of(part)}

    whole = named(data)
    train, held = data.split_heldout(fraction, seed)
    parts = [named(train), {} if held is None else named(held)]
    assert {**parts[0], **parts[1]} == whole  # none is cut apart
    assert len(parts[0]) + len(parts[1]) == len(whole)
    kept = random.sample(range(len(data)), random.randint(1, len(data)))
    left = data.select_rows(kept)
    assert all(rejected <= whole[choice] for choice, rejected in named(left).items())
    assert sum(map(len, named(left).values())) == len(kept)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_a_ranking_with_ties_compares_best_first(values):
    ranks, comparisons = ranked(values)
    assert len(comparisons) == len(values) * (len(values) - 1) // 2
    assert [values[pair.better] for pair in comparisons] == sorted(values[p.better] for p in comparisons)
    assert all(pair.tie == (values[pair.better] == values[pair.worse]) for pair in comparisons)
    assert all(ranks[pair.better] < ranks[pair.worse] for pair in comparisons if not pair.tie)
    strict = [pair.better for pair in comparisons if not pair.tie]
    assert len([a for a, b in pairwise([-1, *strict]) if a != b]) == len(set(strict))


def test_choices_of_other_judgements():
    best = {"prompt": "p", "responses": ["x", "y", "z"], "choice": "c", "user_id": "u"}
    assert choices_of(from_rows([best])) == [(0, "p", "z", {"x", "y"})]
    rows = [{"prompt": "p", "chosen": "a", "rejected": r, "user_id": "u"} for r in "bc"]
    assert from_rows(rows).choice_offsets.tolist() == [0, 1, 2]  # one chosen text, two judgements


def test_each_order_of_a_halved_tie_is_a_choice():
    row = {"prompt": "p", "responses": ["x", "y", "z"], "ranking": "C>A=B", "user_id": "u"}
    data = from_rows([row], ties="halve")
    assert choices_of(data) == [(0, "p", "z", {"x", "y"}), (0, "p", "x", {"y"}), (0, "p", "y", {"x"})]
    assert data.weights.tolist() == [1, 1, 0.5, 0.5]
    top = from_rows([{**row, "ranking": "A=B>C"}], ties="halve")
    assert [(chosen, set(rest)) for _, _, chosen, rest in choices_of(top)] == [
        ("x", {"z"}),
        ("x", {"y"}),
        ("y", {"x"}),
        ("y", {"z"}),
    ]


def test_equal_texts_leave_the_rest_of_a_choice():
    row = {"prompt": "p", "ranked_responses": ["a", "b", "a", "c"], "user_id": "u"}
    data = from_rows([row])
    assert [(chosen, set(rest)) for _, _, chosen, rest in choices_of(data)] == [
        ("a", {"b", "c"}),
        ("b", {"a", "c"}),
        ("a", {"c"}),
    ]
