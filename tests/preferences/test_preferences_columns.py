"""Columns that the user names, data without prompts, and numbers that stand for items."""

import datasets
import pytest

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards.settings import MixtureSettings


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def pairs_of(data):
    users = [data.user_ids[user] for user in data.row_users]
    return list(zip(users, data.prompts, data.chosen, data.rejected, strict=True))


STATED = {"ask": "p", "good": "c", "bad": "r", "user_id": "u"}
NAMES = {"prompt_column": "ask", "chosen_column": "good", "rejected_column": "bad"}
RATED = [
    {"who": "u", "dish": dish, "stars": stars, "ask": "p"}
    for dish, stars in zip("abc", (1, 5, 3), strict=True)
]
RATES = {"user_column": "who", "response_column": "dish", "score_column": "stars"}


def test_stated_pairs_by_the_names_of_their_columns():
    data = from_rows([STATED], **NAMES)
    assert pairs_of(data) == [("u", "p", "c", "r")]
    assert data.origin.columns == {"ask": "prompt", "good": "response", "bad": "response", "user_id": "user"}
    nested = {"meta": {"ask": "q", "good": "d"}, **STATED}
    named = from_rows([nested], **{**NAMES, "prompt_column": "meta.ask", "chosen_column": "meta.good"})
    assert pairs_of(named) == [("u", "q", "d", "r")]
    bare = from_rows([STATED], **{**NAMES, "prompt_column": "none"})
    assert pairs_of(bare) == [("u", "", "c", "r")]


def test_a_named_column_wins_over_the_usual_one():
    row = {**STATED, "prompt": "x", "chosen": "y", "rejected": "z"}
    assert pairs_of(from_rows([row])) == [("u", "x", "y", "z")]
    assert pairs_of(from_rows([row], **NAMES)) == [("u", "p", "c", "r")]
    # a scored text beside stated pairs
    rows = [{**row, "grade": grade} for row, grade in zip([row, {**row, "good": "d"}], (1, 2), strict=True)]
    data = from_rows(rows, response_column="good", score_column="grade", prompt_column="ask")
    assert (data.origin.layout, pairs_of(data)) == ("scores", [("u", "p", "d", "c")])


def test_scores_by_the_names_of_their_columns_and_without_prompts():
    assert pairs_of(from_rows(RATED, **RATES)) == [
        ("u", "", "b", "a"),
        ("u", "", "b", "c"),
        ("u", "", "c", "a"),
    ]
    with_prompt = from_rows(RATED, **RATES, prompt_column="ask")
    assert {prompt for _, prompt, *_ in pairs_of(with_prompt)} == {"p"}
    apart = [{**row, "prompt": row["dish"]} for row in RATED]
    with pytest.raises(UserError, match="3 ratings have no other of another value"):
        from_rows(apart, **RATES)
    assert len(from_rows(apart, **RATES, prompt_column="none")) == 3


def test_lower_is_better_turns_every_preference_and_is_said():
    up, down = from_rows(RATED, **RATES), from_rows(RATED, **RATES, lower_is_better=True)
    assert {(chosen, rejected) for *_, chosen, rejected in pairs_of(down)} == {
        (rejected, chosen) for *_, chosen, rejected in pairs_of(up)
    }
    assert (up.check().better, down.check().better) == ("higher stars", "lower stars")
    with pytest.raises(UserError, match="the layout pairs has none"):
        from_rows([STATED], **NAMES, lower_is_better=True)
    marked = [{"user": "u", "prompt": "p", "response": r, "if_chosen": r == "a"} for r in "ab"]
    with pytest.raises(UserError, match="if_chosen is none"):
        from_rows(marked, lower_is_better=True)


def test_numbers_that_stand_for_items():
    rows = [{"userId": 1, "movieId": movie, "rating": movie / 2} for movie in (31, 1029)]
    assert pairs_of(from_rows(rows)) == [("1", "", "1029", "31")]
    ranked = {"participant": 3, "ranked_responses": [12, 7]}
    assert pairs_of(from_rows([ranked])) == [("3", "", "12", "7")]


@pytest.mark.parametrize("score", ["score", "rating"])
@pytest.mark.parametrize("item", ["text", "item", "movieId", "response"])
@pytest.mark.parametrize("user", ["userId", "worker_id", "labeler", "labeller", "participant"])
def test_names_that_are_known(user, item, score):
    rows = [{user: "u", item: name, score: value} for name, value in (("a", 1), ("b", 2))]
    assert pairs_of(from_rows(rows)) == [("u", "", "b", "a")]


def test_rankings_and_choices_of_lists_by_their_name():
    best_first = {"user_id": "u", "order": ["a", "b", "c"]}
    assert len(pairs_of(from_rows([best_first], response_column="order"))) == 3
    by_rank = from_rows([{**best_first, "rank": [2, 1, 3]}], response_column="order")
    assert by_rank.chosen == ["b", "b", "a"]
    choice = {**best_first, "winner": "b"}
    data = from_rows([choice], response_column="order", prompt_column="none")
    assert (data.origin.layout, pairs_of(data)) == ("choices", [("u", "", "b", "a"), ("u", "", "b", "c")])


def test_a_ranking_without_a_prompt_may_be_of_transcripts():
    start = "\n\nHuman: Hi\n\nAssistant:"
    data = from_rows([{"user_id": "u", "ranked_responses": [f"{start} a", f"{start} b"]}])
    assert pairs_of(data) == [("u", start, " a", " b")]


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (
            [STATED],
            {**NAMES, "prompt_column": "asked"},
            "--prompt_column 'asked' is not among the columns ask, good",
        ),
        (
            [STATED],
            {"chosen_column": "good"},
            r"needs the column\(s\) prompt, rejected; found .*--rejected_column",
        ),
        ([STATED], {"chosen_column": "good", "score_column": "bad"}, "takes --score_column, --chosen_column"),
        (RATED, {"user_column": "who", "score_column": "stars"}, r"needs the column\(s\) prompt, response"),
        (RATED, {**RATES, "layout": "pairs"}, "layout pairs takes"),
        (RATED, {**RATES, "score_column": "dish"}, "row 0: column 'dish' holds 'a', not a number"),
    ],
)
def test_a_column_that_does_not_fit_is_said_in_a_line(rows, kwargs, message):
    with pytest.raises(UserError, match=message):
        from_rows(rows, **kwargs)


def test_stages_take_the_columns(tmp_path, capsys):
    path = tmp_path / "rated.jsonl"
    datasets.Dataset.from_list(RATED).to_json(path)
    settings = MixtureSettings(**RATES, lower_is_better=True)
    settings.check()
    data = settings.load_pairs(str(path))
    assert data.chosen == ["a", "a", "c"]
    assert "left out" not in capsys.readouterr().err
    MixtureSettings(**RATES, ratings="pairs", max_pairs=1).load_pairs(str(path))
    told = "".join(capsys.readouterr())
    assert "2 pairs are left out" in told.replace("\n", " ")
    assert "not independent" in told.replace("\n", " ")
    with pytest.raises(UserError, match="--ratings 'all' is none of blocks, pairs"):
        MixtureSettings(ratings="all").check()
