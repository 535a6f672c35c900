"""CSV and Markdown, as every stage writes them."""

import csv

from torchrl_maxmin.core.tables import markdown_table, write_csv


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
