"""Whatever a file holds, it loads, or one :class:`UserError` says why not."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.io import preflib

SAMPLES = Path(__file__).parents[1] / "data"
SUFFIXES = [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".soc", ".soi"]
COLUMNS = [
    ["prompt", "chosen", "rejected", "user_id"],
    ["chosen", "rejected", "worker"],
    ["prompt", "response_a", "response_b", "winner", "user_id", "group"],
    ["prompt", "response_0", "response_1", "y", "user_id"],
    ["prompt", "output_a", "output_b", "winner_model_a", "winner_model_b", "winner_tie", "judge"],
    ["prompt", "responses", "choice", "user_id"],
    ["prompt", "responses", "rank", "user_id"],
    ["prompt", "responses", "ranking", "user_id"],
    ["prompt", "ranked_responses", "user_id"],
    ["info", "summaries", "choice", "worker"],
    ["prompt", "response", "score", "interaction_id", "user_id"],
    ["context", "response", "Q_overall", "rater_id"],
    ["text", "rating", "userId"],
    ["movieId", "score", "if_chosen", "userId"],
    ["ranked_responses", "labeler"],
]


@pytest.fixture(autouse=True, scope="module")
def few_voters():
    """A digit more in a count of voters makes a file of millions of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflib, "_MOST_VOTERS", 1_000)
        yield


TURN = "\n\nHuman: x\n\nAssistant:"
WORDS = [
    "",
    " ",
    "a",
    "b",
    "tie",
    "0",
    "1",
    "2",
    "-1",
    "nan",
    "A>B",
    "B=A",
    "Yes",
    "No",
    "Unsure",
    TURN,
    f"{TURN} y",
]
texts = st.sampled_from(WORDS) | st.text(max_size=4)
numbers = st.sampled_from([-1, 0, 1, 2, 3, 0.5]) | st.floats() | st.integers(-(2**70), 2**70)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", ""]), "content": texts}
)
scalars = st.none() | st.booleans() | texts | numbers
nested = st.recursive(
    scalars | messages,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["post", "text", "uid", "role"]), inner, max_size=2)
    ),
    max_leaves=5,
)
FITTING = {
    "responses": st.lists(texts, min_size=1, max_size=4),
    "ranked_responses": st.lists(texts, min_size=1, max_size=4),
    "rank": st.lists(st.integers(0, 3), min_size=1, max_size=4),
    "ranking": st.permutations([0, 1, 2]) | st.sampled_from(["A>B", "B>A=C", "C>B>A"]),
    "summaries": st.lists(st.fixed_dictionaries({"text": texts}), min_size=2, max_size=2),
    "info": st.fixed_dictionaries({"post": texts | st.none(), "article": texts}),
    "score": st.integers(0, 4),
    "rating": st.integers(0, 4),
    "movieId": st.integers(0, 9),
    "if_chosen": st.booleans(),
    "Q_overall": st.sampled_from(["Yes", "No", "Unsure"]),
    "choice": st.integers(0, 2),
    "winner": st.sampled_from(["a", "b", "tie", "model_a"]),
    "y": st.sampled_from([-1, 1]),
    **dict.fromkeys(["winner_model_a", "winner_model_b", "winner_tie"], st.integers(0, 1)),
    **dict.fromkeys(
        ["user_id", "worker", "judge", "rater_id", "interaction_id", "group", "userId", "labeler"],
        st.sampled_from("uvw"),
    ),
}


@st.composite
def tables(draw):
    """Rows of some layout, of which now and then a column, a cell or a whole row is something else."""
    columns = draw(st.sampled_from(COLUMNS))
    conversations = st.lists(messages, max_size=3)
    text = draw(st.sampled_from([texts, texts, conversations]))
    cells = {name: FITTING.get(name, text) for name in columns}
    if draw(st.booleans()):
        cells[draw(st.sampled_from(columns))] = draw(st.sampled_from([nested, scalars, texts]))
    rows = draw(st.lists(st.fixed_dictionaries(cells), max_size=6))
    if draw(st.integers(0, 9)) == 0:
        rows.insert(draw(st.integers(0, len(rows))), draw(nested))
    return rows


@st.composite
def spoilt_files(draw):
    """A file of some suffix: any bytes, or a good sample with bytes changed, cut out or put in."""
    if draw(st.booleans()):
        return draw(st.sampled_from(SUFFIXES)), draw(st.binary(max_size=200))
    sample = draw(st.sampled_from(sorted(SAMPLES.iterdir())))
    content = bytearray(sample.read_bytes())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.integers(0, 30))
        content[start:stop] = draw(st.binary(max_size=10))
    return sample.suffix, bytes(content)


options = st.fixed_dictionaries(
    {
        "user_column": st.sampled_from([None, None, None, "none", "info.uid"]),
        "ties": st.sampled_from(["drop", "halve"]),
        "identical": st.sampled_from(["error", "drop"]),
        "tie_margin": st.sampled_from([0.0, 1.5]),
        "max_pairs": st.sampled_from([1, 64]),
        "ratings": st.sampled_from(["blocks", "pairs"]),
        "lower_is_better": st.sampled_from([False, False, True]),
        "prompt_column": st.sampled_from([None, None, "none", "text"]),
        "response_column": st.sampled_from([None, None, None, "text", "responses"]),
    }
)


def loads_or_says_why(suffix, content, kwargs):
    folder = Path(tempfile.mkdtemp())
    path = folder / f"data{suffix}"
    path.write_bytes(content)
    data, why = None, ""
    try:
        data = PreferenceDataset.load(path, **kwargs)
    except UserError as error:
        why = str(error)
    beside = [file.name for file in folder.iterdir()]
    shutil.rmtree(folder)
    assert beside == [path.name]
    if data is None:
        assert 10 < len(why) < 2_000
        return
    report = data.check()
    assert report.pairs == len(data) > 0
    assert int(data.user_offsets[-1]) == len(data)
    assert all(
        isinstance(text, str) for column in (data.prompts, data.chosen, data.rejected) for text in column
    )
    assert all(c != r for c, r in zip(data.chosen, data.rejected, strict=True))
    assert sum(len(ranking.responses) > 2 for ranking in data.rankings()) <= report.rankings
    train, heldout = data.split_heldout(0.5, 0)
    assert len(train) + (0 if heldout is None else len(heldout)) == len(data)


def check_rows(rows, kind, kwargs):
    if kind == ".json":
        content = json.dumps(rows)
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    loads_or_says_why(kind, content.encode("utf-8", "surrogatepass"), kwargs)


any_rows = given(tables(), st.sampled_from([".json", ".jsonl"]), options)
any_bytes = given(spoilt_files(), options)
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# half an hour each of rows and of bytes on one core
long_of_rows, long_of_bytes = (settings(quick, max_examples=count) for count in (190_000, 900_000))


@quick
@any_rows
def test_any_rows(rows, kind, kwargs):
    check_rows(rows, kind, kwargs)


@quick
@any_bytes
def test_any_bytes(file, kwargs):
    loads_or_says_why(*file, kwargs)


@pytest.mark.slow
@long_of_rows
@any_rows
def test_any_rows_for_long(rows, kind, kwargs):
    check_rows(rows, kind, kwargs)


@pytest.mark.slow
@long_of_bytes
@any_bytes
def test_any_bytes_for_long(file, kwargs):
    loads_or_says_why(*file, kwargs)
