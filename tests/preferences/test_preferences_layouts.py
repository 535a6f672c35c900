"""The variants of every layout that public data come in."""

import datasets
import pytest

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset

HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant:"


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def pairs_of(data):
    """(user, prompt, chosen, rejected) of every pair."""
    users = [data.user_ids[user] for user in data.row_users]
    return list(zip(users, data.prompts, data.chosen, data.rejected, strict=True))


# -- chosen over rejected --------------------------------------------------------------------------


def test_a_transcript_is_cut_where_it_parts_and_a_prompt_column_repeats_it():
    start = f"{HUMAN}Hi{BOT} Hello{HUMAN}More?{BOT}"
    sides = {"chosen": f"{start} I would", "rejected": f"{start} I will", "uid": 1}
    explicit = {"prompt": f"{HUMAN}Hi{BOT} Hello{HUMAN}More?", **sides}
    for row in (sides, explicit):
        assert pairs_of(from_rows([row])) == [("1", start, " I would", " I will")]


def test_texts_that_only_look_like_transcripts_keep_their_prompt():
    row = {"prompt": "Continue:", "chosen": "Human: to err", "rejected": "Human: to ask", "uid": 1}
    assert pairs_of(from_rows([row])) == [("1", "Continue:", "Human: to err", "Human: to ask")]
    inside = {"prompt": "the film", "chosen": "the film was good", "rejected": "the film was bad", "uid": 1}
    assert pairs_of(from_rows([inside]))[0][1:] == ("the film", "the film was good", "the film was bad")


def say(role, content):
    return {"role": role, "content": content}


def test_messages_and_strings_mix():
    rows = [
        {"prompt": "Hi", "chosen": [say("assistant", "A")], "rejected": [say("assistant", "B")], "uid": 1},
    ]
    assert pairs_of(from_rows(rows)) == [("1", f"{HUMAN}Hi{BOT}", " A", " B")]
    rows = [{"prompt": [say("user", "Hi")], "chosen": "A", "rejected": "B", "uid": 1}]
    assert pairs_of(from_rows(rows)) == [("1", f"{HUMAN}Hi{BOT}", " A", " B")]
    # whole conversations beside the prompt that they repeat
    whole = {
        "prompt": "Hi",
        "chosen": [say("user", "Hi"), say("assistant", "A")],
        "rejected": [say("user", "Hi"), say("assistant", "B"), say("user", "C")],
        "uid": 1,
    }
    assert pairs_of(from_rows([whole])) == [("1", f"{HUMAN}Hi{BOT}", " A", f" B{HUMAN}C")]


def test_conversations_that_part_at_the_user_are_refused():
    row = {
        "chosen": [say("user", "Hi"), say("assistant", "A")],
        "rejected": [say("user", "Ho"), say("assistant", "A")],
        "uid": 1,
    }
    with pytest.raises(UserError, match="row 0: the conversations do not part at a turn of the assistant"):
        from_rows([row])


@pytest.mark.parametrize("name", ["query", "question", "instruction", "user_prompt", "user_input", "context"])
def test_prompts_by_other_names(name):
    data = from_rows([{name: "p", "chosen": "c", "rejected": "r", "worker": 1}])
    assert pairs_of(data) == [("1", "p", "c", "r")]
    assert data.origin.columns[name] == "prompt"


# -- a verdict over responses ----------------------------------------------------------------------


def chosen_of(values, names=("response_a", "response_b"), column="winner", **kwargs):
    """Which response is chosen for each value: 1 or 2."""
    rows = [
        {"prompt": f"p{i}", names[0]: f"first {i}", names[1]: f"second {i}", column: value, "user_id": "u"}
        for i, value in enumerate(values)
    ]
    data = from_rows(rows, **kwargs)
    return [1 if text.startswith("first") else 2 for text in data.chosen]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1], ("response_a", "response_b")),
        ([0.0, 1.0], ("answer_0", "answer_1")),
        ([1, 2], ("completion_a", "completion_b")),
        ([1, 2], ("output_1", "output_2")),
        ([0, 1], ("output_1", "output_2")),
        ([1, -1], ("response_1", "response_2")),
        (["0", "1"], ("response_0", "response_1")),
        (["1", "2"], ("response_1", "response_2")),
        (["a", "b"], ("response_a", "response_b")),
        (["A", " B "], ("output_1", "output_2")),
        (["model_a", "model_b"], ("response_a", "response_b")),
        (["model_a", "model_b"], ("conversation_a", "conversation_b")),
        (["response_1", "response_2"], ("response_1", "response_2")),
        (["response_a", "completion_b"], ("completion_a", "completion_b")),
    ],
)
def test_ways_to_name_the_winner(values, names):
    assert chosen_of(values, names) == [1, 2]
    assert chosen_of(values[::-1], names) == [2, 1]


@pytest.mark.parametrize("column", ["winner", "choice", "label", "y", "preference", "preferred_response"])
def test_columns_that_name_the_winner(column):
    assert chosen_of([1, -1, -1], column=column) == [1, 2, 2]


def test_one_value_alone_is_read_by_the_names_or_refused():
    assert chosen_of([1, 1], ("output_0", "output_1")) == [2, 2]
    assert chosen_of([1, 1], ("output_1", "output_2")) == [1, 1]
    assert chosen_of([0, 0]) == [1, 1]
    assert chosen_of([2, 2]) == [2, 2]
    with pytest.raises(UserError, match=r"never says 0 nor 2.*write letters"):
        chosen_of([1, 1])
    with pytest.raises(UserError, match="column 'y' holds 0 and 1, which may be a place or say whether"):
        chosen_of([0, 1], column="y")


@pytest.mark.parametrize("value", ["tie", "Tie (bothbad)", "both", "same"])
def test_words_for_ties(value):
    assert chosen_of(["a", value, "b"]) == [1, 2]
    assert chosen_of(["a", value, "b"], ties="halve") == [1, 1, 2, 2]


def test_numbers_for_ties():
    assert chosen_of([0, 0.5, 1], ties="halve") == [1, 1, 2, 2]
    assert chosen_of([-1, 0, 1], ties="halve") == [2, 1, 2, 1]


def test_a_halved_tie_is_one_judgement_of_two_half_pairs():
    rows = [
        {"prompt": "p", "response_a": f"a{i}", "response_b": f"b{i}", "winner": winner, "user_id": "u"}
        for i, winner in enumerate(["a", "tie", "b"])
    ]
    dropped = from_rows(rows)
    assert list(zip(dropped.chosen, dropped.rejected, strict=True)) == [("a0", "b0"), ("b2", "a2")]
    halved = from_rows(rows, ties="halve")
    assert list(zip(halved.chosen, halved.rejected, halved.weights.tolist(), strict=True)) == [
        ("a0", "b0", 1.0),
        ("a1", "b1", 0.5),
        ("b1", "a1", 0.5),
        ("b2", "a2", 1.0),
    ]
    assert halved.ranking_ids.tolist() == [0, 1, 1, 2]
    assert [ranking.ranks for ranking in halved.rankings()] == [[0, 1], [0, 0], [0, 1]]
    assert (dropped.check().ties, dropped.check().ties_kept) == (1, False)
    assert (halved.check().ties, halved.check().ties_kept, halved.check().rankings) == (1, True, 0)


def test_lists_of_responses_and_more_than_two():
    rows = [
        {"prompt": "p", "responses": ["x", "y", "z"], "choice": 2, "user_id": "u"},
        {"prompt": "q", "responses": ["x", "y"], "choice": 0, "user_id": "u"},
    ]
    data = from_rows(rows)
    assert pairs_of(data) == [("u", "p", "z", "x"), ("u", "p", "z", "y"), ("u", "q", "x", "y")]
    assert [(r.responses, r.ranks) for r in data.rankings()] == [
        (["z", "x", "y"], [0, 1, 1]),
        (["x", "y"], [0, 1]),
    ]
    one_based = from_rows([{**row, "choice": row["choice"] + 1} for row in rows])
    assert pairs_of(one_based) == pairs_of(data)


def test_stated_pairs_come_before_other_layouts():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "responses": ["c", "r"], "label": 1, "uid": 1}
    data = from_rows([row])
    assert (data.origin.layout, pairs_of(data)) == ("pairs", [("1", "p", "c", "r")])
    other = from_rows([{**row, "label": 0}], layout="choices")
    assert (other.origin.layout, other.ignored_columns) == ("choices", ["chosen", "rejected"])
    with pytest.raises(UserError, match="no layout 'x'; choose one of pairs, summaries"):
        from_rows([row], layout="x")
    with pytest.raises(UserError, match=r"response, context, Q_overall \(ratings\)$"):
        from_rows([row], layout="ratings")


# -- rankings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("rank", [3, 1, 2]),
        ("ranks", [2.5, 0.0, 1.0]),
        ("ranking", [1, 2, 0]),
        ("ranking", [2, 3, 1]),
        ("ranking", "B>C>A"),
        ("ranking", "b > c > a"),
    ],
)
def test_ways_to_write_a_ranking(column, value):
    data = from_rows([{"prompt": "p", "responses": ["x", "y", "z"], column: value, "user_id": "u"}])
    assert [tuple(ranking) for ranking in data.rankings()] == [("p", ["y", "z", "x"], [0, 1, 2], 0)]
    assert set(pairs_of(data)) == {("u", "p", "y", "x"), ("u", "p", "z", "x"), ("u", "p", "y", "z")}


def test_responses_listed_best_first():
    data = from_rows([{"prompt": "p", "ranked_responses": ["x", "y", "z"], "user_id": "u"}])
    assert next(data.rankings()).responses == ["x", "y", "z"]
    assert len(data) == 3


def test_ties_inside_a_ranking():
    row = {"prompt": "p", "responses": ["x", "y", "z"], "ranking": "C>A=B", "user_id": "u"}
    assert pairs_of(from_rows([row])) == [("u", "p", "z", "x"), ("u", "p", "z", "y")]
    halved = from_rows([row], ties="halve")
    assert halved.weights.tolist() == [1.0, 1.0, 0.5, 0.5]
    for data in (from_rows([row]), halved):
        assert [(r.responses, r.ranks) for r in data.rankings()] == [(["z", "x", "y"], [0, 1, 1])]
        assert data.check().rankings == 1


def test_a_ranking_stays_together_when_pairs_are_held_out():
    rows = [
        {
            "prompt": f"p{i}",
            "responses": [f"{i}x", f"{i}y", f"{i}z"],
            "rank": [1, 2, 3],
            "user_id": f"u{i % 2}",
        }
        for i in range(20)
    ]
    data = from_rows(rows)
    train, heldout = data.split_heldout(0.3, seed=1)
    assert (len(train), len(heldout)) == (2 * 7 * 3, 2 * 3 * 3)
    assert not set(train.ranking_ids) & set(heldout.ranking_ids)
    for part in (train, heldout):
        for prompt, responses, ranks, user in part.rankings():
            number = prompt[1:]
            assert responses == [f"{number}x", f"{number}y", f"{number}z"]
            assert ranks == [0, 1, 2]
            assert part.user_ids[user] == f"u{int(number) % 2}"
