"""Scores as pairs: against every pair listed by hand, and the cap as a uniform seeded choice."""

from collections import Counter
from itertools import combinations

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.schemas.verdicts import pairs_within


def listed(values, margin, keep_ties):
    """All pairs (better, worse, tie) by their definition."""
    pairs = set()
    for i, j in combinations(range(len(values)), 2):
        apart = abs(values[i] - values[j])
        better, worse = (i, j) if values[i] > values[j] else (j, i)
        if apart > margin:
            pairs.add((better, worse, False))
        elif keep_ties:
            pairs.add((frozenset((i, j)), True))
    return pairs


def unordered_ties(pairs):
    return {(frozenset(pair[:2]), True) if pair.tie else tuple(pair) for pair in pairs}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.sampled_from([0, 0.5, 1, 2]),
    st.booleans(),
    st.integers(1, 80),
)
def test_pairs_of_scores_are_all_pairs_or_a_choice_of_them(values, margin, keep_ties, most):
    everything = listed(values, margin, keep_ties)
    pairs, total = pairs_within(np.array(values, float), margin, keep_ties, most, np.random.default_rng(0))
    found = unordered_ties(pairs)
    assert total == len(everything)
    assert len(found) == len(pairs) == min(most, total)
    assert found <= everything


def test_the_choice_is_uniform():
    values, draws = np.array([0.0, 1, 1, 2, 5]), 6_000
    generator = np.random.default_rng(0)
    seen = Counter(
        tuple(pair) for _ in range(draws) for pair in pairs_within(values, 0.0, False, 3, generator)[0]
    )
    share = np.array(list(seen.values())) / draws
    assert len(seen) == 9
    np.testing.assert_allclose(share, 3 / 9, atol=4 * np.sqrt(3 / 9 * 6 / 9 / draws))


def test_many_values_take_few_steps():
    values = np.random.default_rng(0).permutation(200_000).astype(float)  # 2e10 pairs, never listed
    pairs, total = pairs_within(values, 0.0, False, 50, np.random.default_rng(1))
    assert total == 200_000 * 199_999 // 2
    assert len(pairs) == 50
    assert all(values[pair.better] > values[pair.worse] for pair in pairs)


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def scored(*cells):
    """Rows from (user, prompt, response, score)."""
    return [dict(zip(("user", "prompt", "response", "score"), values, strict=True)) for values in cells]


ROWS = scored(
    ("a", "p", "a1", 3),
    ("b", "p", "b1", 1),
    ("a", "q", "a2", 9),
    ("a", "p", "a3", 5),
    ("b", "p", "b2", 2),
    ("a", "p", "a4", 4),
    ("b", "q", "b3", 2),
)


def sides(data):
    return list(zip(data.prompts, data.chosen, data.rejected, strict=True))


def test_scores_are_compared_within_a_user_and_a_prompt():
    data = from_rows(ROWS)
    assert data.user_ids == ["a", "b"]
    assert sides(data) == [("p", "a4", "a1"), ("p", "a3", "a1"), ("p", "a3", "a4"), ("p", "b2", "b1")]
    assert data.ranking_ids.tolist() == [0, 0, 0, 1]
    assert [(r.responses, r.ranks) for r in data.rankings()] == [
        (["a3", "a4", "a1"], [0, 1, 2]),
        (["b2", "b1"], [0, 1]),
    ]


def test_margin_and_ties_of_scores():
    assert sides(from_rows(ROWS, tie_margin=1)) == [("p", "a3", "a1")]
    halved = from_rows(ROWS, tie_margin=1, ties="halve")
    assert Counter(halved.weights.tolist()) == {1.0: 1, 0.5: 6}
    assert (halved.check().ties, from_rows(ROWS, tie_margin=1).check().ties) == (3, 3)


def test_a_key_tells_equal_prompts_apart_and_joins_different_ones():
    keys = {"a1": 1, "a2": 1, "a3": 2, "a4": 2, "b1": 3, "b2": 4, "b3": 3}
    keyed = [{**row, "interaction_id": keys[row["response"]]} for row in ROWS]
    assert sides(from_rows(keyed)) == [("p", "a2", "a1"), ("p", "a3", "a4"), ("p", "b3", "b1")]


def test_a_choice_alone_is_a_score():
    rows = [{**row, "if_chosen": row["response"] in ("a3", "b2")} for row in ROWS]
    for row in rows:
        del row["score"]
    assert sides(from_rows(rows)) == [("p", "a3", "a1"), ("p", "a3", "a4"), ("p", "b2", "b1")]


def test_numbers_in_words_are_numbers():
    rows = [{**row, "score": f" {row['score']}.0"} for row in ROWS]
    assert sides(from_rows(rows)) == sides(from_rows(ROWS))


def test_the_cap_holds_for_a_user_and_prompt_and_is_seeded():
    rows = scored(*((f"u{u}", p, f"{u}{p}{i}", i) for u in range(3) for p in "pq" for i in range(20)))
    data = from_rows(rows, max_pairs=7)
    assert Counter(zip(data.row_users.tolist(), data.prompts, strict=True)) == {
        (u, p): 7 for u in range(3) for p in "pq"
    }
    report = data.check()
    assert report.beyond_cap == 6 * (190 - 7)
    assert all(int(c[2:]) > int(r[2:]) for c, r in zip(data.chosen, data.rejected, strict=True))
    again, other = from_rows(rows, max_pairs=7), from_rows(rows, max_pairs=7, seed=1)
    assert sides(data) == sides(again) != sides(other)


def rated(verdicts, user="r"):
    return [
        {"rater_id": user, "context": f"c{i}", "response": f"t{i}", "Q_overall": verdict}
        for i, verdict in enumerate(verdicts)
    ]


def test_safe_over_harmful_within_a_rater():
    data = from_rows(rated(["Yes", "No", "Unsure", "no"]) + rated(["No", "No"], "s"))
    assert sides(data) == [("", "c1\nt1", "c0\nt0"), ("", "c3\nt3", "c0\nt0")]
    assert data.user_ids == ["r"]
    assert data.check().ties == 5  # of six pairs of r two are strict, and s has one
    halved = from_rows(rated(["Yes", "No", "Unsure"]), ties="halve")
    assert Counter(halved.weights.tolist()) == {1.0: 1, 0.5: 4}


def test_many_ratings_are_capped_for_a_rater():
    verdicts = ["Yes" if i % 3 else "No" for i in range(300)]
    data = from_rows(rated(verdicts) + rated(verdicts, "s"), max_pairs=50)
    assert data.user_offsets.tolist() == [0, 50, 100]
    assert data.check().beyond_cap == 2 * (100 * 200 - 50)
    number = [int(text.partition("\n")[0][1:]) for text in data.chosen]
    assert all(n % 3 == 0 for n in number)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_of_a_user_need_not_stand_together(shuffled):
    rng = np.random.default_rng(0)
    cells = [(f"u{u}", f"p{p}", f"{u} {p} {i}", i) for u in range(30) for p in range(20) for i in range(3)]
    rows = scored(*cells)
    if shuffled:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    data = from_rows(rows)
    assert len(data) == 30 * 20 * 3
    found = {tuple(text.split()) for text in data.chosen}
    assert found == {(str(u), str(p), str(i)) for u in range(30) for p in range(20) for i in (1, 2)}
    for user, prompt, chosen, rejected in zip(
        data.row_users, data.prompts, data.chosen, data.rejected, strict=True
    ):
        u, p, i = chosen.split()
        assert (data.user_ids[user], prompt) == (f"u{u}", f"p{p}")
        assert rejected.rsplit(" ", 1)[0] == f"{u} {p}"
        assert int(i) > int(rejected.split()[2])
