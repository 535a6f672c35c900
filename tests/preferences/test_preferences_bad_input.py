"""Malformed files: one line that names cause and place, exit code 2, nothing on the standard output."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r", "user_id": "u"}
CHOICE = {"prompt": "p", "response_a": "x", "response_b": "y", "winner": "a", "user_id": "u"}
LISTED = {"prompt": "p", "responses": ["x", "y", "z"], "rank": [1, 2, 3], "user_id": "u"}
SCORED = {"prompt": "p", "response": "x", "score": 3.0, "user_id": "u"}
RATED = {"context": "c", "response": "x", "Q_overall": "No", "rater_id": "u"}
FLAGGED = {
    "prompt": "p",
    "response_a": "x",
    "response_b": "y",
    "winner_model_a": 1,
    "winner_model_b": 0,
    "user": 1,
}
SUMMARISED = {"info": {"post": "p"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 0, "worker": 1}


def lines(*rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows).encode()


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def changed(row, **cells):
    return {**row, **cells}


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def as_parquet(rows, stop=None):
    """Bytes of a parquet file, made when its path is known."""
    return lambda path: parquet(path, rows)[:stop]


FILES = [
    # -- the file itself
    ("empty.jsonl", b"", "no rows"),
    ("blank.jsonl", b"\n  \n\n", "no rows"),
    ("empty.json", b"[]", "no rows"),
    ("empty.csv", b"", "no rows"),
    ("header.csv", b"prompt,chosen,rejected,user_id\n", "no rows"),
    ("rows.parquet", as_parquet([]), "no rows"),
    ("nothing.jsonl", lines({}, {}), "no rows"),
    ("unknown.txt", b"x", r"unknown\.txt is none of \.json, \.jsonl, \.csv, \.tsv, \.parquet, \.soc"),
    ("broken.jsonl", lines(PAIR, PAIR, '{"prompt": '), "line 3 is not JSON"),
    ("cut.jsonl", lines(PAIR, PAIR)[:-9], "line 2 is not JSON"),
    ("pretty.jsonl", json.dumps(PAIR, indent=1).encode(), "line 1 is not JSON.*one object a line"),
    ("long.jsonl", lines(PAIR, '{"prompt": "' + "x" * 10_000_000), "line 2 is not JSON"),
    ("numbers.jsonl", lines("3"), "line 1 holds a number, not an object"),
    ("lists.jsonl", lines('["p"]'), "line 1 holds text, not an object"),
    ("deep.jsonl", lines(PAIR, "[" * 100_000), "line 2 is not JSON"),
    ("deep.json", b"[" * 100_000, "nested too deeply"),
    ("cut.json", json.dumps([PAIR, PAIR], indent=1).encode()[:-30], "line 11 is not JSON"),
    ("more.json", json.dumps([PAIR]).encode() * 2, "there is more after the end of the list"),
    ("latin.jsonl", lines(PAIR) + '{"prompt": "é"}\n'.encode("latin-1"), "line 2 is not UTF-8 text"),
    ("latin.json", '[{"prompt": "é"}]'.encode("latin-1"), "is not UTF-8 text"),
    ("latin.csv", "prompt,chosen,rejected,user_id\né,b,c,d\n".encode("latin-1"), "not UTF-8 text"),
    (
        "body.csv",
        b"prompt,chosen,rejected,user_id\n" + b"a,b,c,d\n" * 9_999 + b"\xe9,b,c,d\n",
        "invalid UTF8",
    ),
    ("head.csv", "é,chosen,rejected,user_id\na,b,c,d\n".encode("latin-1"), "is not UTF-8 text"),
    ("half.jsonl", lines('{"prompt": "\\ud800"}'), "half a character"),
    ("semicolon.csv", b"prompt;chosen;rejected;user_id\na;b;c;d\n", "separated by ';'; save it with commas"),
    ("tabs.csv", b"prompt\tchosen\trejected\tuser_id\na\tb\tc\td\n", "separated by .*; name it .tsv"),
    ("commas.tsv", b"prompt,chosen,rejected,user_id\na,b,c,d\n", "separated by ','; name it .csv"),
    ("ragged.tsv", b"prompt\tchosen\trejected\tuser_id\na\tb\n", "Expected 4 columns, got 2"),
    ("nothing.soc", b"", "no rows"),
    ("words.soc", b"prompt,chosen\n", "line 1 is no order; write its orders as"),
    ("unnamed.soc", b"# ALTERNATIVE NAME 1: a\n2: 1,2\n", "line 2 orders 2, which no line names"),
    ("again.soi", b"# ALTERNATIVE NAME 1: a\n2: 1,1\n", "line 2 orders an alternative twice"),
    ("nobody.soi", b"# ALTERNATIVE NAME 1: a\n0: 1\n", "line 2 has no voter"),
    ("tied.soc", b"# ALTERNATIVE NAME 1: a\n1: {1,2}\n", "line 2 holds a tie"),
    ("many.soc", b"# ALTERNATIVE NAME 1: a\n9999999: 1\n", "line 2: there are more than 1,000,000 voters"),
    ("lone.soi", b"# ALTERNATIVE NAME 1: a\n9: 1\n", "no rows"),
    ("old.soc", b"2\n1,a\nb,2\n3,3,1\n3,1,2\n", "line 3 does not name an alternative"),
    ("latin.soc", b"# ALTERNATIVE NAME 1: \xe9\n", "line 1 is not UTF-8 text"),
    ("ragged.csv", b"prompt,chosen,rejected,user_id\na,b,c,d\na,b\n", "Expected 4 columns, got 2"),
    ("wide.csv", b"prompt,chosen\n" + b"x" * 100_000 + b"\n", "Expected 2 columns, got 1"),
    ("twice.csv", b"prompt,prompt,rejected,user_id\na,b,c,d\n", "two columns of the same name"),
    ("cut.parquet", as_parquet([PAIR] * 99, stop=-40), "cannot read data from .*cut.parquet"),
    (
        "spoilt.parquet",  # text that is not UTF-8, which the reader of parquet lets pass
        lambda path: parquet(path, [changed(PAIR, chosen="caf\u00e9")]).replace(
            "\u00e9".encode(), b"\xff\xfe"
        ),
        r"spoilt.parquet is damaged in column 'chosen' \(Invalid.*UTF8.*write it again",
    ),
    ("fake.parquet", b"PAR1 but no more", "cannot read data from .*fake.parquet"),
    ("empty.parquet", b"", "cannot read data from .*empty.parquet"),
    # -- columns
    (
        "mixed.jsonl",
        lines(PAIR, changed(PAIR, chosen=3)),
        r"'chosen' holds text \(line 1\) and a number \(line 2\)",
    ),
    (
        "late.jsonl",
        lines(*[PAIR] * 5_000, changed(PAIR, user_id=3)),
        r"lines 5001 to 5001: a column changes its type.*user_id",
    ),
    ("nested.jsonl", lines({"info": {"post": "p"}}, {"info": {"post": 3}}), "column 'info': "),
    (
        "unread.jsonl",  # the column that is mixed is not the one that is missing
        lines(changed(PAIR, note=1), changed(PAIR, note="x", user_id=" ")),
        r"row 1: no user id.*left out: .*'note' holds a number \(line 1\) and text \(line 2\)",
    ),
    ("huge.jsonl", lines(changed(PAIR, user_id=10**30)), "column 'user_id'"),
    (
        "prompt.jsonl",
        lines(without(PAIR, "prompt")),
        r"needs the column\(s\) prompt; found chosen, rejected, user_id",
    ),
    ("chosen.jsonl", lines(without(PAIR, "chosen")), r"needs the column\(s\) chosen; found prompt, rejected"),
    ("other.jsonl", lines({"a": 1, "b": 2}), "needs the column.*found a, b.*to one of: chosen, rejected"),
    ("nobody.jsonl", lines(without(PAIR, "user_id")), "no user column among prompt, chosen, rejected"),
    ("two.jsonl", lines(changed(PAIR, worker=1)), "several columns could be the user: user_id, worker"),
    (
        "three.jsonl",
        lines(changed(CHOICE, label=1)),
        "several columns could say which response won: winner, label",
    ),
    # -- users
    ("null.jsonl", lines(PAIR, changed(PAIR, user_id=None)), "row 1: no user id in column 'user_id'"),
    ("space.jsonl", lines(PAIR, changed(PAIR, user_id=" ")), "row 1: no user id in column 'user_id'"),
    (
        "nan.parquet",
        as_parquet([changed(PAIR, user_id=1.0), changed(PAIR, user_id=np.nan)]),
        "row 1: no user id",
    ),
    ("hole.csv", b"prompt,chosen,rejected,user_id\na,b,c,d\ne,f,g,\n", "row 1: no user id"),
    ("ids.jsonl", lines(changed(PAIR, user_id=["a"])), "column 'user_id' holds list.*not user ids"),
    # -- texts
    ("same.jsonl", lines(changed(PAIR, rejected="c")), "1 have two equal responses"),
    ("copies.jsonl", lines(PAIR, PAIR, PAIR), "all 3 pairs are copies of one pair"),
    (
        "absent.jsonl",
        lines(PAIR, changed(PAIR, chosen=None)),
        "row 1: column 'chosen' holds NoneType, not text",
    ),
    ("number.jsonl", lines(changed(PAIR, rejected=3)), "row 0: column 'rejected' holds int, not text"),
    ("list.jsonl", lines(changed(PAIR, chosen=[])), "row 0: column 'chosen' holds an empty list"),
    ("words.jsonl", lines(changed(PAIR, chosen=["a", "b"])), "is no conversation"),
    (
        "turn.jsonl",
        lines(changed(PAIR, chosen=[{"role": "assistant", "content": None}])),
        "row 0: column 'chosen' holds a list that is no conversation",
    ),
    (
        "apart.jsonl",
        lines({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: b", "user_id": 1}),
        "row 0: there is no prompt, and the responses are no transcripts that share a turn",
    ),
    # -- verdicts
    (
        "range.jsonl",
        lines(changed(CHOICE, winner=0), changed(CHOICE, winner=7)),
        "row 1: column 'winner' holds 7, which",
    ),
    (
        "unsaid.jsonl",
        lines(CHOICE, changed(CHOICE, winner=None)),
        "row 1: column 'winner' holds None, which names none",
    ),
    (
        "truth.jsonl",
        lines(changed(CHOICE, winner=True)),
        "row 0: column 'winner' holds True, which names none",
    ),
    (
        "word.jsonl",
        lines(changed(CHOICE, winner="x" * 999)),
        r"row 0: column 'winner' holds 'x{76}\.\.\., which",
    ),
    ("ones.jsonl", lines(changed(CHOICE, winner=1)), "never says 0 nor 2"),
    (
        "zeros.jsonl",
        lines({**without(CHOICE, "winner"), "y": 0}),
        "which may be a place or say whether the first",
    ),
    ("places.jsonl", lines(changed(CHOICE, winner=[0])), "column 'winner' holds list"),
    ("draw.jsonl", lines({**without(LISTED, "rank"), "winner": "tie"}), "row 0: a tie of 3 responses"),
    (
        "single.jsonl",
        lines({**without(LISTED, "rank"), "choice": 0, "responses": ["x"]}),
        "two or more responses",
    ),
    (
        "flags.jsonl",
        lines(changed(FLAGGED, winner_model_a=0)),
        "row 0: 0 of winner_model_a.* exactly one must be",
    ),
    (
        "flag.jsonl",
        lines(changed(FLAGGED, winner_model_a=2)),
        "row 0: column 'winner_model_a' holds 2, not 0 or 1",
    ),
    ("ties.jsonl", lines(changed(CHOICE, winner="tie")), "give no pair: 1 are ties, which ties='halve'"),
    ("three_s.jsonl", lines(changed(SUMMARISED, summaries=[{"text": "x"}])), "does not hold two"),
    (
        "text_s.jsonl",
        lines(changed(SUMMARISED, summaries=[{"text": "x"}, {"text": None}])),
        "row 0: column 'summaries",
    ),
    (
        "post_s.jsonl",
        lines(changed(SUMMARISED, info={"post": None})),
        "row 0: column 'info.post' holds NoneType",
    ),
    (
        "lengths.jsonl",
        lines(changed(LISTED, rank=[1, 2])),
        r"row 0: column 'rank' holds \[1, 2\]; for 3 responses",
    ),
    (
        "ranknan.jsonl",
        lines(changed(LISTED, rank=[1, 2, np.nan])),
        "row 0: column 'rank' holds .*a rank for each",
    ),
    (
        "order.jsonl",
        lines({**without(LISTED, "rank"), "ranking": [0, 0, 1]}),
        "row 0: column 'ranking' holds",
    ),
    (
        "letters.jsonl",
        lines({**without(LISTED, "rank"), "ranking": "A>B"}),
        "their places or letters, best first",
    ),
    # -- scores
    (
        "score.jsonl",
        lines(SCORED, changed(SCORED, score=np.nan)),
        "row 1: column 'score' holds nan, not a number",
    ),
    (
        "none.jsonl",
        lines(SCORED, changed(SCORED, score=None)),
        "row 1: column 'score' holds None, not a number",
    ),
    ("good.jsonl", lines(changed(SCORED, score="good")), "row 0: column 'score' holds 'good', not a number"),
    ("lists_s.jsonl", lines(changed(SCORED, score=[1])), "column 'score' holds list.*not numbers"),
    ("lonely.jsonl", lines(SCORED), "1 ratings have no other of another value"),
    ("equal.jsonl", lines(SCORED, changed(SCORED, response="y")), "give no pair: 2 ratings have no other"),
    (
        "maybe.jsonl",
        lines(changed(RATED, Q_overall="Maybe")),
        "row 0: column 'Q_overall' holds 'Maybe', not Yes, No or",
    ),
    (
        "talk.jsonl",
        lines(RATED, changed(RATED, context=None, Q_overall="Yes")),
        "row 0: column 'response' holds None",
    ),
]


@pytest.fixture
def refused(tmp_path, capsys):
    """Check a data set that must be refused; returns the one line."""

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        assert main(["data", "check", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("torchrl-maxmin data: error: ")
        assert len(line) < 1_000
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, _, _ in FILES])
def test_malformed_files(tmp_path, refused, name, content, message):
    path = tmp_path / name
    path.write_bytes(content(path) if callable(content) else content)
    line = refused(path)
    with pytest.raises(AssertionError, match=message):  # pytest's match shows both texts when they differ
        raise AssertionError(line)


def test_places_without_data(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "holds no .json, .jsonl, .csv, .tsv, .parquet, .soc, .soi file" in refused(tmp_path / "empty")
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    (kinds / "a.jsonl").write_bytes(lines(PAIR))
    (kinds / "b.csv").write_bytes(b"prompt\n")
    assert "files of several kinds (.csv, .jsonl)" in refused(kinds)
    assert "there is no such file" in refused(tmp_path / "absent.jsonl")
    assert "cannot read data from 'no/such-data'" in refused("no/such-data")


def test_settings_that_cannot_be(tmp_path, refused):
    (tmp_path / "pairs.jsonl").write_bytes(lines(PAIR))
    path = tmp_path / "pairs.jsonl"
    assert "ties 'keep' is none of drop, halve" in refused(path, "--ties", "keep")
    assert "tie_margin must be at least 0, not -1" in refused(path, "--tie_margin", "-1")
    assert "tie_margin must be at least 0, not nan" in refused(path, "--tie_margin", "nan")
    assert "max_pairs must be at least 1, not 0" in refused(path, "--max_pairs", "0")
    assert "no layout 'pair'" in refused(path, "--layout", "pair")
    assert "(user column) needs the column(s) who; found" in refused(path, "--user_column", "who")
    assert "(group column) needs the column(s) who; found" in refused(path, "--group_column", "who")
    with pytest.raises(UserError, match="identical 'maybe' is none of error, drop"):
        PreferenceDataset.load(path, identical="maybe")
    with pytest.raises(
        UserError, match="cannot read data from a list; give a path, a hub name or a datasets"
    ):
        PreferenceDataset.load([PAIR])


def test_what_looks_odd_but_is_not_wrong(tmp_path):
    long = "x" * 10_000_000
    path = tmp_path / "odd.jsonl"
    optional = {**PAIR, "prompt": "q", "note": {"deep": [1, 2.5]}}
    rows = [
        changed(PAIR, chosen=long),
        changed(PAIR, chosen="\x00\u2028\x85"),
        optional,
        changed(optional, note=None),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + lines(*rows).replace(b"\n", b"\r\n"))
    data = PreferenceDataset.load(path)
    assert list(data.chosen) == [long, "\x00\u2028\x85", "c", "c"]
    path = tmp_path / "odd.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,chosen,rejected,user_id\r\n"'
        + long.encode()
        + b'","a\nb","""c""",u\r\n\r\n,b,,u'
    )
    data = PreferenceDataset.load(path)
    assert list(data.prompts) == [long, ""]
    assert list(data.chosen) == ["a\nb", "b"]
    assert list(data.rejected) == ['"c"', ""]


def test_columns_that_appear_late_or_change_from_int_to_float(tmp_path):
    path = tmp_path / "late.jsonl"
    early = [{**SCORED, "prompt": f"p{i // 2}", "response": f"r{i}", "score": i % 7} for i in range(5_000)]
    late = [
        {**row, "prompt": f"late {row['prompt']}", "score": row["score"] + 0.5, "more": "x"} for row in early
    ]
    path.write_bytes(lines(*early, *late))
    data = PreferenceDataset.load(path)
    assert len(data) == 5_000
    assert data.ignored_columns == ["more"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_list_is_read_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, indent, chunk):
    from torchrl_maxmin.preferences.io import files as reading

    monkeypatch.setattr(reading, "_CHUNK", chunk)
    rows = [{**PAIR, "prompt": f'{i} "]}}, é\u2028', "number": -i * 1.5} for i in range(30)]
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    (table,) = reading.read_files([path])
    assert table.to_pylist() == rows
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(UserError, match=f"line {2 if indent is None else 30 * 7 + 2 - 1} is not JSON"):
        list(reading.read_files([path]))


@pytest.mark.parametrize("early", [1, 5_000])
def test_a_mixed_column_that_nothing_reads_is_left_out(tmp_path, early):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(lines(*[changed(PAIR, note=1)] * early, changed(PAIR, note=["x"], user_id="v")))
    data = PreferenceDataset.load(path)
    assert (len(data), data.num_users) == (early + 1, 2)
    assert any("Left out" in note and "note" in note for note in data.origin.notes)
    other = tmp_path / "folder"
    other.mkdir()
    (other / "a.jsonl").write_bytes(lines(changed(PAIR, note=1)))
    (other / "b.jsonl").write_bytes(lines(changed(PAIR, note="x")))
    assert len(PreferenceDataset.load(other)) == 2
