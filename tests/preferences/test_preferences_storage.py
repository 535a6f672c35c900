"""Mapped tables, columns read by rows, and token ids of all pairs."""

import errno
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.preferences import PreferenceDataset, encode
from torchrl_maxmin.preferences.io.table import ArrowColumn, spill


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.lists(st.text(max_size=3), max_size=5), max_size=6))
def test_a_column_reads_like_a_list(data, chunks):
    values = [value for chunk in chunks for value in chunk]
    index = st.integers(0, max(0, len(values) - 1))
    rows = data.draw(st.lists(index, max_size=20)) if values else []
    column = ArrowColumn(pa.chunked_array(chunks, pa.large_string()), np.array(rows, dtype=np.int64))
    expected = [values[row] for row in rows]
    assert list(column) == expected
    assert column == expected
    assert len(column) == len(expected)
    assert [column[i] for i in range(-len(rows), len(rows))] == expected * 2
    assert column[2:9:3] == expected[2:9:3]
    assert column + column == expected * 2
    others = ["x"]
    assert (column + others, others + column) == ([*expected, "x"], ["x", *expected])
    assert column != [*expected, "more"]
    assert column != ["other" + value for value in expected] or not expected
    assert [text for batch in column.batches(3) for text in batch.to_pylist()] == expected


def test_a_column_shows_its_beginning():
    column = ArrowColumn(pa.chunked_array([["a", "b"], ["c", "d"]]), np.arange(4))
    assert repr(column) == "ArrowColumn(['a', 'b', 'c', ...], 4 rows)"
    with pytest.raises(IndexError):
        column[4]


def test_spilled_tables_are_one_table_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def tables():
        for i in range(3):
            seen.append(len(list(tmp_path.iterdir())))
            yield pa.table({"a": [i], "b": [{"x": i}]})
        yield pa.table({"a": [0.5], "b": [{"x": 1, "y": "z"}], "c": ["new"]})

    table = spill(tables())
    assert seen == [0, 1, 1]
    assert list(tmp_path.iterdir()) == []
    assert table.to_pylist() == [
        *({"a": float(i), "b": {"x": i, "y": None}, "c": None} for i in range(3)),
        {"a": 0.5, "b": {"x": 1, "y": "z"}, "c": "new"},
    ]
    assert spill(iter(())).num_rows == 0


def test_a_full_disk_is_said(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    with pytest.raises(UserError, match=r"no space for a temporary copy of the data in .*set TMPDIR"):
        spill([pa.table({"a": [1]})])


def test_a_bar_shows_only_when_work_takes_long(monkeypatch):
    from torchrl_maxmin.core import progress as module

    shown = []

    class Bar:
        def __init__(self, description, total):
            shown.append((description, total))

        def __enter__(self):
            return shown.append

        def __exit__(self, *_):
            shown.append("closed")

    monkeypatch.setattr(module, "progress_bar", Bar)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with late_bar("quick", 9) as reach:
        reach(9)
    assert shown == []
    with late_bar("slow", 9) as reach:
        reach(2)
        now[0] = 2.1
        reach(5)
        reach(9)
    assert shown == [("slow", 9), 5, 4, "closed"]


def test_encode_keeps_the_end(tokenizer):
    words = ["the", "film", "was", "great"]
    ids = encode(tokenizer, "the film", "was great")
    expected = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(words), tokenizer.eos_token_id]
    assert ids == expected
    assert encode(tokenizer, "the film", "was great", max_length=3) == [expected[0], *expected[-2:]]
    assert encode(tokenizer, "the film", "was great", max_length=1) == expected[-1:]
    assert encode(tokenizer, "the film", "was great", max_length=99) == expected


def test_data_can_be_copied_to_another_process(tmp_path):
    import pickle

    path = Path(tmp_path) / "pairs.csv"
    path.write_text("prompt,chosen,rejected,user\na,b,c,1\nd,e,f,2\n")
    data = pickle.loads(pickle.dumps(PreferenceDataset.load(path)))
    assert data.chosen == ["b", "e"]
    assert data.check().pairs == 2


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """Ten times the pairs take about the same memory of their own."""
    import subprocess
    import sys

    script = """
import sys, threading, time
from torchrl_maxmin.preferences import PreferenceDataset

def own_kilobytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], own_kilobytes())
        time.sleep(0.01)

peak = [0]
threading.Thread(target=watch, daemon=True).start()
data = PreferenceDataset.load(sys.argv[1])
data.check()
data.split_heldout(0.1, 0)
print(peak[0], len(data))
"""
    used = []
    for pairs in (20_000, 200_000):
        path = tmp_path / f"{pairs}.jsonl"
        with path.open("w") as file:
            for i in range(pairs):
                text = f"{i} " * 60
                file.write(
                    f'{{"prompt": "{text}", "chosen": "{text}a", "rejected": "b", "user": {i % 999}}}\n'
                )
        run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
        kilobytes, loaded = map(int, run.stdout.split())
        assert loaded == pairs
        used.append(kilobytes)
    assert used[1] - used[0] < 100_000, used  # the texts alone are 150 MB
