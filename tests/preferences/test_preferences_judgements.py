"""Pairs that one user was asked again are one judgement."""

from collections import defaultdict

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.judgements import PairCodes, codes_of_differences, count_once

PAIRS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("pq"), st.sampled_from(["ab", "ba", "ac", "ca", "bc"])),
    min_size=1,
    max_size=24,
)


def from_cells(cells):
    rows = [{"prompt": p, "chosen": s[0], "rejected": s[1], "user_id": u} for u, p, s in cells]
    return PreferenceDataset.load(datasets.Dataset.from_list(rows))


def codes_of(pairs):
    keys = [(p, *sorted(sides)) for p, *sides in pairs]
    return PairCodes(np.array([keys.index(key) for key in keys]), np.array([a < b for _, a, b in pairs]))


def cells_of(data):
    users = [int(data.user_ids[u]) for u in data.row_users.tolist()]
    return list(zip(users, data.prompts, data.chosen, data.rejected, strict=True))


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_repeats_sum_to_one_judgement(cells):
    data = from_cells(cells)
    total, order = defaultdict(float), {}
    for (user, prompt, *sides), weight, judgement in zip(
        cells_of(data), data.weights.tolist(), data.judgement_ids.tolist(), strict=True
    ):
        key = (user, prompt, *sorted(sides))
        total[key] += weight
        assert order.setdefault(key, judgement) == judgement
    assert len(set(order.values())) == len(order)
    assert list(total.values()) == pytest.approx([1.0] * len(total))
    report = data.check()
    assert report.repeats == len(cells) - len(total)
    ways = {key: {c[2] for c in cells_of(data) if (*c[:2], *sorted(c[2:])) == key} for key in total}
    assert report.contradicted == sum(len(chosen) > 1 for chosen in ways.values())
    if len(total) == len(cells):  # nothing to do: as ever
        assert data.weights.tolist() == [1.0] * len(cells)
        assert data.judgement_ids.tolist() == data.ranking_ids.tolist()


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.integers(0, 9))
def test_repeats_are_held_out_together(cells, seed):
    train, held = from_cells(cells).split_heldout(0.5, seed)
    if held is not None:
        known, later = ({(u, p, *sorted(s)) for u, p, *s in cells_of(part)} for part in (train, held))
        assert not known & later


def test_features_are_equal_exactly_or_not_at_all():
    row = np.array([[0.0, 0.1, -0.2]])
    near = row * (1 + 1e-16) + [[0, 2e-17, 0]]
    x = np.concatenate([row, -row, near, row * [[1, 1, -1]], np.zeros((2, 3))])
    codes = codes_of_differences(x)
    assert codes.code[0] == codes.code[1]
    assert codes.side[0] != codes.side[1]
    assert len(set(codes.code.tolist())) == 4 + (near != row).any()
    again = codes_of_differences(x.astype(np.float32)[:2])
    assert again.code[0] == again.code[1]


@pytest.mark.parametrize("rows", [0, 1, 8192, 8193])
def test_features_are_coded_in_blocks(rows):
    x = np.random.default_rng(0).normal(size=(rows, 2)).round(1)
    codes = codes_of_differences(x).code
    known = {min(row, tuple(-np.array(row))) for row in map(tuple, x + 0.0)} - {(0.0, 0.0)}
    assert len(np.unique(codes)) == len(known) + int((x == 0).all(1).sum())


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.data())
def test_counting_once_twice_changes_nothing(cells, draw):
    """Repeats that count once stay as they are, whatever their weights were rounded to."""
    users = np.array([user for user, *_ in cells])
    codes = codes_of([(p, *s) for _, p, s in cells])
    given_weights = np.array([draw.draw(st.sampled_from([0.5, 1.0, 2.5])) for _ in cells])
    once = count_once(users, codes, given_weights)
    if given_weights.max() <= 1:
        rounded = once.weights.astype(np.float32)
        assert (count_once(users, codes, rounded).weights == rounded).all()
    assert np.bincount(once.same, once.weights).sum() == pytest.approx(once.weights.sum())
    for user, prompt, side in set(cells):
        mine = [c == (user, prompt, side) or c == (user, prompt, side[::-1]) for c in cells]
        most = max(1.0, given_weights[mine].max())
        assert once.weights[mine].sum() == pytest.approx(min(most, given_weights[mine].sum()))


def test_rankings_are_one_judgement_where_their_choices_repeat():
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "rank": [1, 2, 3], "user_id": "u"},
        {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2], "user_id": "u"},
        # shares a pair with the first, but each was chosen among others: evidence of its own
        {"prompt": "p", "responses": ["a", "b", "d"], "rank": [1, 2, 3], "user_id": "u"},
        {"prompt": "p", "responses": ["c", "b", "a"], "rank": [3, 2, 1], "user_id": "u"},  # the first again
        {"prompt": "p", "responses": ["a", "b", "d"], "rank": [1, 2, 3], "user_id": "v"},
    ]
    data = PreferenceDataset.load(datasets.Dataset.from_list(rows))
    assert data.ranking_ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert data.choice_offsets.tolist() == [0, 2, 3, 4, 6, 7, 9, 10, 12, 13]
    assert data.judgement_ids.tolist() == [0, 0, 0, 1, 2, 2, 2, 0, 0, 0, 4, 4, 4]
    assert data.weights.tolist() == [0.5, 0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1]
    assert data.distinct_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert data.judgements.num_repeats == 2


def test_ids_that_are_stated_decide():
    users, codes = np.zeros(4, int), codes_of([("p", "a", "b")] * 4)
    assert count_once(users, codes, ids=np.arange(4), stated=True).weights is None
    some = count_once(users, codes, ids=np.array([7, 7, 8, 9]), stated=True)
    assert some.weights.tolist() == [0.5, 0.5, 1, 1]
    assert some.ids.tolist() == [7, 7, 8, 9]


def test_halved_ties_are_as_they_were():
    rows = [
        {"prompt": "p", "response_a": "a", "response_b": b, "winner": w, "user_id": 1}
        for b, w in [("b", "tie"), ("c", "a"), ("d", "tie")]
    ]
    data = PreferenceDataset.load(datasets.Dataset.from_list(rows), ties="halve")
    assert data.weights.tolist() == [0.5, 0.5, 1, 0.5, 0.5]
    assert (data.check().repeats, data.check().contradicted) == (0, 0)
    assert data.judgements.merged_weights.tolist() == [0.5, 0.5, 1, 0.5, 0.5]


def test_the_report_says_what_became_of_repeats():
    cells = [(0, "p", "ab")] * 3 + [(0, "p", "ba"), (0, "q", "ab"), (1, "p", "ab")]
    told = "\n".join(from_cells(cells).check().warnings)
    assert "3 pairs repeat an earlier pair of the same user and count with it as one judgement." in told
    assert "1 pairs were chosen both ways by the same user; each way counts by its share." in told
