"""Preference pairs from every kind of file, with every kind of mistake."""

import json
import tempfile
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset, load_table
from torchrl_maxmin.preferences.dataset import USER_ALIASES

ROWS = [
    {"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "user_id": user, "group": group}
    for i, (user, group) in enumerate(
        [("b", "y"), ("a", "x"), ("b", "y"), ("c", "x"), ("a", "x"), ("b", "y")]
    )
]


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def write(path, kind):
    table = datasets.Dataset.from_list(ROWS)
    if kind == "json":
        path = path / "pairs.json"
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "jsonl":
        path = path / "pairs.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif kind == "csv":
        path = path / "pairs.csv"
        table.to_csv(path, index=False)
    elif kind == "parquet":
        path = path / "pairs.parquet"
        table.to_parquet(path)
    elif kind == "folder":
        path = path / "shards"
        path.mkdir()
        datasets.Dataset.from_list(ROWS[:2]).to_parquet(path / "train-00000.parquet")
        datasets.Dataset.from_list(ROWS[2:]).to_parquet(path / "train-00001.parquet")
        datasets.Dataset.from_list(ROWS[:1]).to_parquet(path / "test-00000.parquet")
    elif kind == "save_to_disk":
        path = path / "saved"
        table.save_to_disk(path)
    elif kind == "dict_to_disk":
        path = path / "saved"
        datasets.DatasetDict(train=table).save_to_disk(path)
    elif kind == "dataset":
        return table
    elif kind == "dict":
        return datasets.DatasetDict(train=table)
    return path


KINDS = ["json", "jsonl", "csv", "parquet", "folder", "save_to_disk", "dict_to_disk", "dataset", "dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_rows_sorted_by_user(tmp_path, kind):
    data = PreferenceDataset.load(write(tmp_path, kind))
    assert data.user_ids == ["b", "a", "c"]
    assert data.prompts == ["p0", "p2", "p5", "p1", "p4", "p3"]
    assert data.chosen == ["good 0", "good 2", "good 5", "good 1", "good 4", "good 3"]
    assert data.rejected == ["bad 0", "bad 2", "bad 5", "bad 1", "bad 4", "bad 3"]
    assert data.user_offsets.dtype == torch.int64
    assert data.user_offsets.tolist() == [0, 3, 5, 6]
    assert data.row_users.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.groups == ["y", "x", "x"]
    assert (len(data), data.num_users, data.ignored_columns) == (6, 3, [])


def test_unescaped_line_separators_stay_inside_a_text(tmp_path):
    rows = [{**ROWS[0], "chosen": "one\u2028two\x85three"}, ROWS[1]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert PreferenceDataset.load(path).chosen == ["one\u2028two\x85three", "good 1"]


def renamed(new, old="user_id"):
    return [{(new if k == old else k): v for k, v in row.items()} for row in ROWS]


@pytest.mark.parametrize("alias", USER_ALIASES)
def test_user_column_is_found_by_alias(alias):
    assert from_rows(renamed(alias)).user_ids == ["b", "a", "c"]


def test_two_candidates_are_an_error_and_user_column_decides():
    rows = [{**row, "worker": f"w{i % 2}"} for i, row in enumerate(ROWS)]
    with pytest.raises(UserError, match=r"user_id, worker.*--user_column"):
        from_rows(rows)
    assert from_rows(rows, user_column="worker").user_ids == ["w0", "w1"]
    chosen = from_rows(rows, user_column="user_id")
    assert chosen.user_ids == ["b", "a", "c"]
    assert chosen.ignored_columns == ["worker"]
    assert chosen.check().ignored == ["worker"]


def test_user_column_wins_over_an_alias_and_may_have_any_name():
    rows = [{**row, "who": "z"} for row in ROWS]
    assert from_rows(rows, user_column="who").user_ids == ["z"]


def test_group_column_by_name_and_absent():
    rows = renamed("camp", "group")
    assert from_rows(rows).groups is None
    assert from_rows(rows, group_column="camp").groups == ["y", "x", "x"]


def replaced(i, **cells):
    return [*ROWS[:i], {**ROWS[i], **cells}, *ROWS[i + 1 :]]


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (renamed("nobody"), {}, "no user column among .*--user_column"),
        (ROWS, {"user_column": "worker"}, "worker.*found prompt"),
        (ROWS, {"group_column": "camp"}, "camp.*found prompt"),
        (renamed("answer", "chosen"), {}, "chosen; found .*answer"),
        (replaced(3, rejected="good 3"), {}, "row 3: chosen equals rejected"),
        (replaced(2, user_id=""), {}, "row 2: no user id in column 'user_id'"),
        (replaced(2, user_id=None), {}, "row 2: no user id in column 'user_id'"),
        (replaced(4, prompt=None), {}, "row 4: column 'prompt' holds NoneType, not text"),
        (
            [{**row, "user_id": float(i) if i else float("nan")} for i, row in enumerate(ROWS)],
            {},
            "row 0: no user id",
        ),
        (
            [{**row, "chosen": [{"role": "user"}]} for row in ROWS],
            {},
            "row 0: .*list that is no conversation",
        ),
        ([{**row, "rejected": 1} for row in ROWS], {}, "row 0: column 'rejected' holds int"),
        ([], {}, "no rows"),
    ],
)
def test_mistakes_name_cause_and_place(rows, kwargs, message):
    with pytest.raises(UserError, match=message):
        from_rows(rows, **kwargs)


def test_missing_file_and_split(tmp_path):
    with pytest.raises(UserError, match=r"cannot read data from 'no/where.jsonl'"):
        PreferenceDataset.load("no/where.jsonl")
    with pytest.raises(UserError, match=r"no split 'test'.*train"):
        PreferenceDataset.load(write(tmp_path, "dict"), split="test")
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2])
    )
    assert len(load_table(both, "test")) == 2
    folder = write(tmp_path, "folder")
    assert load_table(folder, "test")["prompt"][:] == ["p0"]
    with pytest.raises(UserError, match=r"no split 'validation' in the folder .*; there are test, train"):
        load_table(folder, "validation")


def test_nothing_is_left_beside_the_file_or_in_the_cache(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    for kind in ("csv", "jsonl", "save_to_disk"):
        path = write(tmp_path, kind)
        before = sorted(tmp_path.rglob("*"))
        data = PreferenceDataset.load(path)
        data.check()
        assert sorted(tmp_path.rglob("*")) == before
        assert data.prompts[0] == "p0"


def test_every_row_a_user_only_when_asked():
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    data = from_rows(rows, user_column="none")
    assert data.user_ids == ["0", "1", "2", "3", "4", "5"]
    assert "every row counts as a user" in str(data.check())
    named = from_rows([{**row, "none": "n"} for row in rows], user_column="none")
    assert named.user_ids == ["n"]


def test_users_inside_another_column():
    rows = [{**row, "meta": {"worker": row["user_id"], "age": 3}} for row in ROWS]
    for row in rows:
        del row["user_id"]
    assert from_rows(rows).user_ids == ["b", "a", "c"]
    assert from_rows(rows, user_column="meta.age").user_ids == ["3"]
    both = [{**row, "user": i % 2} for i, row in enumerate(rows)]
    assert from_rows(both).user_ids == ["0", "1"]  # a column of its own comes first
    twice = [{**row, "more": {"uid": 1}} for row in rows]
    with pytest.raises(UserError, match=r"meta.worker, more.uid; say which with --user_column"):
        from_rows(twice)


@pytest.mark.parametrize("alias", ["group_id", "group", "data_subset"])
def test_group_column_is_found_by_alias_and_never_a_user(alias):
    data = from_rows(renamed(alias, "group"))
    assert data.groups == ["y", "x", "x"]
    assert data.user_ids == ["b", "a", "c"]
    nobody = [{k: v for k, v in row.items() if k != "user_id"} for row in renamed(alias, "group")]
    with pytest.raises(UserError, match=f"--user_column {alias}"):
        from_rows(nobody)
    asked = from_rows(nobody, user_column=alias)
    assert (asked.user_ids, asked.groups) == (["y", "x"], None)


def test_a_group_column_that_splits_a_user_is_noted_or_refused():
    rows = replaced(0, group="x")
    data = from_rows(rows)
    assert data.groups is None
    assert any("one user in several groups" in note for note in data.check().warnings)
    assert data.ignored_columns == ["group"]
    with pytest.raises(UserError, match="one user in several groups"):
        from_rows(rows, group_column="group")
    with pytest.raises(UserError, match="row 3: no group id"):
        from_rows(replaced(3, group=None), group_column="group")


def test_equal_texts_are_an_error_or_dropped():
    rows = replaced(3, rejected="good 3")
    data = from_rows(rows, identical="drop")
    assert data.user_ids == ["b", "a"]
    report = data.check()
    assert (report.identical, report.users, data.groups) == (1, 2, ["y", "x"])
    assert any("the reward stage refuses them" in told for told in report.warnings)
    assert any("1 of 3 users are left without a pair" in told for told in report.warnings)


def test_int_and_str_ids_mean_the_same():
    as_int = from_rows([{**row, "user_id": ord(row["user_id"])} for row in ROWS])
    as_str = from_rows([{**row, "user_id": str(ord(row["user_id"]))} for row in ROWS])
    assert as_int.user_ids == as_str.user_ids == ["98", "97", "99"]
    assert as_int.prompts == as_str.prompts


def test_csv_with_missing_and_integer_users(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,user_id\na,b,c,7\nd,e,f,7\ng,h,i,8\n")
    assert PreferenceDataset.load(path).user_ids == ["7", "8"]
    path = tmp_path / "words.csv"
    path.write_text('prompt,chosen,rejected,user_id\nNA,null,None,007\n"a\nb","x,y",nan,NA\n')
    words = PreferenceDataset.load(path)
    assert words.user_ids == ["007", "NA"]
    assert list(zip(words.prompts, words.chosen, words.rejected, strict=True)) == [
        ("NA", "null", "None"),
        ("a\nb", "x,y", "nan"),
    ]
    path = tmp_path / "holes.csv"
    path.write_text("prompt,chosen,rejected,user_id\na,b,c,7\nd,e,f,\n")
    with pytest.raises(UserError, match="row 1: no user id"):
        PreferenceDataset.load(path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0, 0.9), st.integers(0, 99))
def test_sorting_and_heldout_keep_every_row_with_its_user(users, fraction, seed):
    rows = [
        {"prompt": f"{i}", "chosen": f"c{i}", "rejected": f"r{i}", "user_id": f"u{u}", "group": f"g{u % 2}"}
        for i, u in enumerate(users)
    ]
    data = from_rows(rows)
    assert data.user_offsets[-1] == len(rows)
    owner = {str(i): f"u{u}" for i, u in enumerate(users)}
    train, heldout = data.split_heldout(fraction, seed)
    parts = [data, train] + ([] if heldout is None else [heldout])
    for part in parts:
        assert part.weights.tolist() == [1.0] * len(part)
        assert [owner[p] for p in part.prompts] == [part.user_ids[u] for u in part.row_users]
        assert [c[1:] for c in part.chosen] == [r[1:] for r in part.rejected] == part.prompts
        assert part.groups == [f"g{int(u[1:]) % 2}" for u in part.user_ids]
        assert part.row_users.tolist() == sorted(part.row_users.tolist())
    held = [] if heldout is None else list(heldout.prompts)
    assert sorted([*train.prompts, *held], key=int) == [str(i) for i in range(len(rows))]
    assert train.user_ids == data.user_ids
    counts = Counter(owner[p] for p in held)
    for user, total in Counter(owner.values()).items():
        assert counts[user] == int(fraction * total)


def test_heldout_depends_on_the_seed_alone():
    rows = [{**ROWS[0], "prompt": f"{i}", "user_id": f"u{i % 3}"} for i in range(60)]
    data = from_rows(rows)
    first, second, other = (data.split_heldout(0.2, seed)[1].prompts for seed in (1, 1, 2))
    assert first == second != other


def test_require_users():
    data = from_rows(ROWS)
    data.require_users(3)
    with pytest.raises(UserError, match="4 is more than the 3 users"):
        data.require_users(4)
    lone = from_rows(ROWS[:1])
    lone.require_users(1)
    with pytest.raises(UserError, match=r"one user.*--num_groups 1"):
        lone.require_users(2)
