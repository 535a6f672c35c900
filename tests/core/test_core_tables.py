"""CSV and Markdown, as every stage writes them."""

import csv
import json

import pandas
import pytest
from hostile import USER_IDS
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.tables import markdown_table, read_csv, write_csv
from torchrl_maxmin.core.text_escape import uncell


def test_rows_of_unlike_keys_share_one_header(tmp_path):
    rows = [{"a": 1 / 3, "b": None}, {"a": 2, "c": "x, y"}]
    path = write_csv(tmp_path / "table.csv", rows, ".3g")
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b", "c"], ["0.333", "", ""], ["2", "", "x, y"]]
    assert b"\r" not in path.read_bytes()
    with write_csv(path, rows[:1]).open(newline="") as file:
        assert float(next(csv.DictReader(file))["a"]) == 1 / 3  # in full without a format


def test_markdown_aligns_all_columns_but_the_first():
    lines = markdown_table(["policy", "rate", "kl"], [["maxmin", "0.8", "3"]]).splitlines()
    assert lines == ["| policy | rate | kl |", "|---|---:|---:|", "| maxmin | 0.8 | 3 |"]


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """A table of all ids, and of each by itself, as one alone decides a column's type."""
    folder = tmp_path_factory.mktemp("users")
    rows = [{"user": user, "share": 0.5} for user in USER_IDS]
    paths = [write_csv(folder / "all.csv", rows, exact=["user"])]
    return paths + [write_csv(folder / f"{i}.csv", [row], exact=["user"]) for i, row in enumerate(rows)]


def wanted(paths):
    return [USER_IDS, *([user] for user in USER_IDS)][: len(paths)]


def test_ids_come_back_by_csv_and_by_us(users):
    for path, ids in zip(users, wanted(users), strict=True):
        assert [row["user"] for row in read_csv(path)] == ids
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [json.loads(row["user_json"]) for row in rows] == ids
        assert [uncell(row["user"]) for row in rows] == ids
        assert list(rows[0]) == ["user", "share", "user_json"]


def test_ids_come_back_by_pandas_as_it_is(users):
    for path, ids in zip(users, wanted(users), strict=True):
        assert pandas.read_csv(path)["user_json"].map(json.loads).tolist() == ids


def test_ids_come_back_by_datasets(users, tmp_path):
    from datasets import load_dataset

    table = load_dataset("csv", data_files=str(users[0]), cache_dir=str(tmp_path), split="train")
    assert list(map(json.loads, table["user_json"])) == USER_IDS


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=4))
def test_any_texts_come_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "a.csv"
    assert [row["t"] for row in read_csv(write_csv(path, [{"t": t, "n": 1} for t in texts]))] == texts
    again = read_csv(write_csv(path, [{"t": t} for t in texts], exact=["t"]))
    assert again == [{"t": t} for t in texts]


def test_no_cell_and_no_column_is_a_formula(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"=head": "=1+1", "-": -1.5, "half \udcff": "+cmd \udcff"}])
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[1] == r"'=1+1,-1.5,'+cmd \udcff"
    assert text.startswith("'=head,'-,")
    assert list(read_csv(path)[0]) == ["=head", "-", r"half \udcff"]
