"""Scores as pairs: against every pair listed by hand, and the cap as a uniform seeded choice."""

from collections import Counter
from itertools import combinations

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.schemas.ratings import blocks_within, pairs_within


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
    data = from_rows(ROWS, ratings="pairs")
    assert data.user_ids == ["a", "b"]
    assert sides(data) == [("p", "a4", "a1"), ("p", "a3", "a1"), ("p", "a3", "a4"), ("p", "b2", "b1")]
    assert data.ranking_ids.tolist() == [0, 0, 0, 1]
    assert [(r.responses, r.ranks) for r in data.rankings()] == [
        (["a3", "a4", "a1"], [0, 1, 2]),
        (["b2", "b1"], [0, 1]),
    ]


def test_margin_and_ties_of_scores():
    options = {"tie_margin": 1, "ratings": "pairs"}
    assert sides(from_rows(ROWS, **options)) == [("p", "a3", "a1")]
    halved = from_rows(ROWS, **options, ties="halve")
    assert Counter(halved.weights.tolist()) == {1.0: 1, 0.5: 6}
    assert (halved.check().ties, from_rows(ROWS, **options).check().ties) == (3, 3)


def test_a_key_tells_equal_prompts_apart_and_joins_different_ones():
    keys = {"a1": 1, "a2": 1, "a3": 2, "a4": 2, "b1": 3, "b2": 4, "b3": 3}
    keyed = [{**row, "interaction_id": keys[row["response"]]} for row in ROWS]
    assert sides(from_rows(keyed)) == [("p", "a2", "a1"), ("p", "a3", "a4"), ("p", "b3", "b1")]


def test_a_choice_alone_is_a_score():
    rows = [{**row, "if_chosen": row["response"] in ("a3", "b2")} for row in ROWS]
    for row in rows:
        del row["score"]
    data = from_rows(rows)
    assert sides(data) == [("p", "a3", "a1"), ("p", "a3", "a4"), ("p", "b2", "b1")]
    assert data.choice_offsets.tolist() == [0, 2, 3]
    assert data.check().likelihood == "Luce over 1 first choices of 3; Bradley-Terry over 1 pairs"


def test_numbers_in_words_are_numbers():
    rows = [{**row, "score": f" {row['score']}.0"} for row in ROWS]
    assert sides(from_rows(rows)) == sides(from_rows(ROWS))


def test_the_cap_holds_for_a_user_and_prompt_and_is_seeded():
    rows = scored(*((f"u{u}", p, f"{u}{p}{i}", i) for u in range(3) for p in "pq" for i in range(20)))
    data = from_rows(rows, max_pairs=7, ratings="pairs")
    assert Counter(zip(data.row_users.tolist(), data.prompts, strict=True)) == {
        (u, p): 7 for u in range(3) for p in "pq"
    }
    report = data.check()
    assert report.beyond_cap == 6 * (190 - 7)
    assert all(int(c[2:]) > int(r[2:]) for c, r in zip(data.chosen, data.rejected, strict=True))
    again, other = (
        from_rows(rows, max_pairs=7, ratings="pairs"),
        from_rows(rows, max_pairs=7, seed=1, ratings="pairs"),
    )
    assert sides(data) == sides(again) != sides(other)


def rated(verdicts, user="r"):
    return [
        {"rater_id": user, "context": f"c{i}", "response": f"t{i}", "Q_overall": verdict}
        for i, verdict in enumerate(verdicts)
    ]


def test_safe_over_harmful_within_a_rater():
    data = from_rows(rated(["Yes", "No", "Unsure", "no"]) + rated(["No", "No"], "s"), ratings="pairs")
    assert sides(data) == [("", "c1\nt1", "c0\nt0"), ("", "c3\nt3", "c0\nt0")]
    assert data.user_ids == ["r"]
    assert data.check().ties == 5  # of six pairs of r two are strict, and s has one
    halved = from_rows(rated(["Yes", "No", "Unsure"]), ties="halve", ratings="pairs")
    assert Counter(halved.weights.tolist()) == {1.0: 1, 0.5: 4}


def test_many_ratings_are_capped_for_a_rater():
    verdicts = ["Yes" if i % 3 else "No" for i in range(300)]
    data = from_rows(rated(verdicts) + rated(verdicts, "s"), max_pairs=50, ratings="pairs")
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


# -- blocks ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    st.sampled_from([0, 0.5, 1, 2]),
    st.integers(2, 8),
    st.integers(0, 9),
)
def test_blocks_are_disjoint_and_of_different_values(values, margin, most, seed):
    values = np.array(values, float)
    blocks, alone = blocks_within(values, margin, most, np.random.default_rng(seed))
    places = np.concatenate([np.empty(0, int), *blocks])
    assert len(np.unique(places)) == len(places) == len(values) - alone
    for block in blocks:
        assert 2 <= len(block) <= most
        assert (np.diff(np.sort(values[block])) > margin).all()
    if margin == 0 and most > 6:  # nothing stands alone but what is left of the most frequent value
        counts = np.sort(np.bincount(values.astype(int) + 3, minlength=7))
        assert alone == max(0, counts[-1] - counts[-2])
        assert len(blocks) == counts[-2]


def test_which_of_a_value_meet_is_drawn_evenly():
    values, draws, generator = np.array([1.0, 2, 2, 2, 3, 3]), 3_000, np.random.default_rng(0)
    met = np.zeros((6, 6))
    for _ in range(draws):
        for block in blocks_within(values, 0, 9, generator)[0]:
            met[np.ix_(block, block)] += 1 / draws
    spread = 4 * np.sqrt(0.25 / draws)
    np.testing.assert_allclose(met[0, 1:4], 1 / 3, atol=spread)
    np.testing.assert_allclose(met[0, 4:], 1 / 2, atol=spread)
    np.testing.assert_allclose(met[1:4, 4:], 1 / 3, atol=spread)


def test_blocks_of_many_values_take_few_steps():
    values = np.random.default_rng(0).permutation(200_000).astype(float)
    blocks, alone = blocks_within(values, 3.0, 11, np.random.default_rng(1))
    assert (alone, sum(map(len, blocks))) == (0, 200_000)
    assert {len(block) for block in blocks} == {10, 11}


def test_a_rating_is_in_one_ranking_at_most():
    rng = np.random.default_rng(0)
    cells = [
        (f"u{u}", p, f"{u}{p}{i}", rng.integers(1, 6)) for u in range(9) for p in "pq" for i in range(30)
    ]
    data = from_rows(scored(*cells))
    value = {response: score for *_, response, score in cells}
    seen = Counter(text for ranking in data.rankings() for text in ranking.responses)
    assert set(seen.values()) == {1}
    assert len(seen) + data.check().alone == len(cells)
    for ranking in data.rankings():
        given_scores = [value[text] for text in ranking.responses]
        assert given_scores == sorted(set(given_scores), reverse=True)
        assert {text[:2] for text in ranking.responses} == {f"{ranking.user}{ranking.prompt}"}
    again, other = from_rows(scored(*cells)), from_rows(scored(*cells), seed=1)
    assert sides(data) == sides(again) != sides(other)
    assert data.check().beyond_cap == 0
    small = from_rows(scored(*cells), max_pairs=3)
    assert max(len(ranking.responses) for ranking in small.rankings()) == 3


def test_the_report_names_the_likelihood_and_what_pairs_of_ratings_are():
    rows = scored(*((u, "p", f"{u}{i}", i % 5) for u in "ab" for i in range(40)))
    blocks, pairs = from_rows(rows).check(), from_rows(rows, ratings="pairs").check()
    assert blocks.likelihood == "Plackett-Luce over 16 rankings of 5"
    assert blocks.judgement_sizes == (5, 5, 5, 5, 5)
    assert not any("independent" in told for told in blocks.warnings)
    assert pairs.likelihood == "Bradley-Terry over 128 pairs, as if they were independent"
    told = "\n".join(pairs.warnings)
    assert "1,152 pairs are left out: of one user's ratings (of one prompt) 64 pairs at most" in told
    assert "not independent" in told
    assert from_rows(rows, ratings="pairs").choice_offsets.tolist() == list(range(129))
    assert any("no ties" in told for told in from_rows(rows, ties="halve").check().warnings)


def test_mixed_judgements_are_counted_by_kind():
    rows = [
        {"prompt": "p", "responses": list("abcd"), "ranking": order, "user_id": "u"}
        for order in ("A>B>C>D", "A>B=C=D", "A=B>C=D")
    ] + [
        {"prompt": "p", "responses": list("xy"), "ranking": order, "user_id": "u"} for order in ("A>B", "A=B")
    ]
    report = from_rows(rows, ties="halve").check()
    assert report.likelihood == (
        "Plackett-Luce over 2 rankings of 4; Luce over 1 first choices of 4; Bradley-Terry over 1 pairs; "
        "half of either order of 6 ties"
    )
    assert report.judgement_sizes == (2, 2, 4, 4, 4)
