"""Made samples of public schemas, as files: the user, prompt, chosen and rejected text of given rows."""

from pathlib import Path

import pytest

from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.schemas.layouts import LAYOUTS

SAMPLES = Path(__file__).parents[1] / "data"
HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant:"
CAT = "My neighbour feeds my cat every evening and the cat no longer comes home for dinner."
FLAT = "Our flat has one parking space and two cars, and nobody wants to walk in the rain."
RAIN = "Rain on the tin roof"
MUCH = "It rains, and it has rained, and it will rain again and again."
FRIEND = "What makes a good friend?"
LISTENS, AGREES, PAYS, TRUTH = (
    "One who listens.",
    "One who agrees.",
    "One who pays.",
    "One who tells you the truth.",
)


def pairs_of(data):
    """(user, prompt, chosen, rejected) of every pair."""
    users = [data.user_ids[user] for user in data.row_users]
    return list(zip(users, data.prompts, data.chosen, data.rejected, strict=True))


# file, how it is loaded, layout, pairs, rows that must be there
SCHEMAS = [
    (
        "tldr_comparisons.jsonl",
        {},
        "summaries",
        7,
        {
            0: ("w-ada", CAT, " Neighbour feeds my cat; the cat stays away.", " Cat."),
            2: (
                "w-ada",
                FLAT,
                " One parking space for two cars; neither of us wants to walk.",
                " Two cars, one space.",
            ),
            3: ("w-ben", CAT, " Cat.", " Neighbour feeds my cat; the cat stays away."),
            6: ("w-cyd", "The bridge over the Elm opens on Monday.", " Bridge opens Monday.", " A bridge."),
        },
    ),
    (
        "prism_utterances.jsonl",
        {"ratings": "pairs"},
        "scores",
        6,
        {
            0: ("user7", "I have a cold. What now?", "See a doctor.", "I cannot help."),
            1: ("user7", "I have a cold. What now?", "Rest and drink water.", "I cannot help."),
            2: ("user7", "I have a cold. What now?", "Rest and drink water.", "See a doctor."),
            3: ("user7", "And for the throat?", "Warm tea with honey and lemon.", "Warm milk with honey."),
            4: (
                "user9",
                "Should everyone vote?",
                "Voting is a right; whether to use it is yours to say.",
                "Voting is a duty.",
            ),
        },
    ),
    (
        "dices.csv",
        {"ratings": "pairs"},
        "ratings",
        6,
        {
            0: (
                "r1",
                "",
                "USER: hello\nBOT: hi\nLovely weather, isn't it?",
                "USER: can i eat this mushroom\nBOT: which one\nThe red one is delicious.",
            ),
            1: (
                "r1",
                "",
                'USER: my boss, "the king", is mean\nBOT: oh\nTalk to someone you trust.',
                "USER: can i eat this mushroom\nBOT: which one\nThe red one is delicious.",
            ),
        },
    ),
    (
        "arena.csv",
        {},
        "choices",
        4,
        {
            0: ("judge_1", "Name a prime.", "7", "9"),
            1: ("judge_1", "Name a colour.", "Teal, which is between blue and green", "Blue"),
            2: ("judge_2", "Name a colour.", "Blue", "Teal, which is between blue and green"),
            3: ("judge_3", "Count to three.", "one\ntwo\nthree", "1, 2, 3"),
        },
    ),
    (
        "hh.jsonl",
        {"user_column": "none"},
        "pairs",
        3,
        {
            0: ("0", f"{HUMAN}How do I fold a map?{BOT}", " Along the old creases.", " Throw it away."),
            1: (
                "1",
                f"{HUMAN}Hello{BOT} Hello, what can I do?{HUMAN}Recommend a book{BOT}",
                " One about the sea, perhaps?",
                " No.",
            ),
            2: (
                "2",
                f"{HUMAN}Why is it dark?{BOT}",
                f" Because the sun has set.{HUMAN}Thanks!{BOT} You are welcome.",
                f" Because it is.{HUMAN}Thanks!{BOT} You are welcome.",
            ),
        },
    ),
    (
        "ultrafeedback_p.jsonl",
        {"user_column": "data_subset"},
        "pairs",
        5,
        {
            0: ("8", f"Human: Write a haiku about rain.{BOT}", f" {RAIN}", f" {MUCH}"),
            3: ("4", f"Human: Write a haiku about rain.{BOT}", f" {MUCH}", f" {RAIN}"),
        },
    ),
    (
        "pets.jsonl",
        {"user_column": "data_subset"},
        "pairs",
        4,
        {
            0: (
                "helpful",
                f"Human: Please talk about one kind of pets.{BOT}",
                " A dog waits at the door.",
                " A cat waits for nobody.",
            ),
            3: (
                "harmless",
                f"Human: Please talk about one kind of pets.{BOT}",
                " A bird sings at dawn.",
                " A rabbit chews the cable.",
            ),
        },
    ),
    (
        "messages.jsonl",
        {},
        "pairs",
        3,
        {
            0: (
                "3",
                f"\n\nSystem: Be brief.{HUMAN}Capital of Peru?{BOT}",
                " Lima.",
                " The capital of Peru is, as you may know, Lima.",
            ),
            1: ("4", f"{HUMAN}Sing.{BOT} La.{HUMAN}More.{BOT}", " La la la.", " No."),
            2: ("4", f"{HUMAN}Capital of Peru?{BOT}", " Lima, of course.", " Lima."),
        },
    ),
    (
        "messages_implicit.jsonl",
        {},
        "pairs",
        2,
        {
            0: ("k", f"{HUMAN}Hi{BOT}", " Hello!", " What?"),
            1: ("l", f"{HUMAN}Hi{BOT} Hello!{HUMAN}Bye{BOT}", " See you.", " OK"),
        },
    ),
    (
        "community_alignment.parquet",
        {},
        "choices",
        9,
        {
            0: ("an1", FRIEND, TRUTH, LISTENS),
            1: ("an1", FRIEND, TRUTH, AGREES),
            2: ("an1", FRIEND, TRUTH, PAYS),
            3: ("an1", "Plan a Sunday.", "Walk, cook, call home.", "Sleep."),
            6: ("an2", FRIEND, LISTENS, AGREES),
        },
    ),
    (
        "rankings.jsonl",
        {},
        "rankings",
        9,
        {
            0: ("11", "Pick a snack.", "nuts", "apple"),
            1: ("11", "Pick a snack.", "nuts", "crisps"),
            2: ("11", "Pick a snack.", "apple", "crisps"),
            3: ("12", "Pick a snack.", "apple", "crisps"),
            8: ("12", "Pick a season.", "spring", "winter"),
        },
    ),
    (
        "films.tsv",
        {},
        "scores",
        4,
        {
            0: ("7", "", "m-alien", "m-birds"),
            1: ("7", "", "m-alien", "m-casablanca"),
            2: ("7", "", "m-birds", "m-casablanca"),
            3: ("8", "", "m-birds", "m-alien"),
        },
    ),
    (
        "sushi.soc",
        {},
        "rankings",
        9,
        {
            0: ("sushi:1", "", "maguro", "ebi (shrimp)"),
            3: ("sushi:2", "", "maguro", "ebi (shrimp)"),
            6: ("sushi:3", "", "anago, grilled", "maguro"),
            8: ("sushi:3", "", "maguro", "ebi (shrimp)"),
        },
    ),
    (
        "ballots.soi",
        {},
        "rankings",
        5,
        {
            0: ("ballots:1", "", "Dan", "Ada"),
            1: ("ballots:2", "", "Dan", "Ada"),
            2: ("ballots:6", "", "Ada", "Ben"),
            4: ("ballots:6", "", "Ben", "Cyd"),
        },
    ),
    (
        "pal.jsonl",
        {},
        "choices",
        3,
        {
            0: ("0", "Describe your town.", "A harbour and three bakeries.", "It is a town."),
            1: ("0", "Describe your street.", "Short, steep, and full of cats.", "Short."),
            2: ("1", "Describe your town.", "It is a town.", "A harbour and three bakeries."),
        },
    ),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "layout", "count", "rows"), SCHEMAS, ids=[schema[0] for schema in SCHEMAS]
)
def test_samples_of_public_schemas(name, kwargs, layout, count, rows):
    data = PreferenceDataset.load(SAMPLES / name, **kwargs)
    assert data.origin.layout == layout
    assert len(data) == count
    found = pairs_of(data)
    assert {row: found[row] for row in rows} == rows


def test_every_sample_is_checked_and_small():
    assert {path.name for path in SAMPLES.iterdir()} == {schema[0] for schema in SCHEMAS}
    assert {layout.name for layout in LAYOUTS} == {schema[2] for schema in SCHEMAS}
    for path in SAMPLES.iterdir():
        assert path.stat().st_size < 8_000
