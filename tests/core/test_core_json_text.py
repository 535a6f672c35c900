"""JSON is valid whatever a run's numbers and names are, and read back as it was."""

import json
import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrl_maxmin.core.json_text import json_text, plain, write_json_text
from torchrl_maxmin.core.run import MetricsLog, read_metrics, write_json


def strictly(text):
    """Parse as a reader does that knows neither NaN nor Infinity."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(TREES)
def test_any_tree_is_valid_json(tree):
    text = json_text(tree)
    assert strictly(text) == plain(tree)
    assert "\n" not in json_text(tree, indent=None)


def test_arrays_and_tensors_become_lists():
    content = {
        "a": np.array([1.0, np.inf]),
        "b": torch.tensor([2.0, math.nan]),
        "c": np.float32(0.5),
        3: (4,),
    }
    assert plain(content) == {"a": [1.0, None], "b": [2.0, None], "c": 0.5, "3": [4]}


def test_half_a_character_is_kept(tmp_path):
    name = "bad \udcff name \ud800"
    write_json_text(tmp_path / "a.json", {name: [name]})
    assert strictly((tmp_path / "a.json").read_text(encoding="utf-8")) == {name: [name]}
    write_json(tmp_path / "b.json", {"loss": torch.tensor(math.nan), "für": 1})
    assert strictly((tmp_path / "b.json").read_text(encoding="utf-8")) == {"loss": None, "für": 1}


def test_metrics_that_are_not_finite_are_null_in_the_log_and_nan_when_read(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(0, {"kl": torch.tensor(math.nan), "loss": -math.inf, "reward": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strictly(line) == {"step": 0, "kl": None, "loss": None, "reward": 0.5}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["kl"])
    assert math.isnan(row["loss"])
    assert row["reward"] == 0.5


@given(place=st.integers(0, 10**6), change=st.sampled_from(["flip", "cut", "zeros"]), bit=st.integers(0, 7))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_metrics_are_left_out(tmp_path, place, change, bit):
    """A line that is no row of numbers any more, and no other."""
    log = MetricsLog(tmp_path)
    for step in range(6):
        log.write(step, {"loss": 0.5 * step, "objective/kl": float("nan")})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    place %= len(whole)
    damaged = bytearray(whole)
    if change == "flip":
        damaged[place] ^= 1 << bit
    elif change == "cut":
        del damaged[place:]
    else:
        damaged[place : place + 4] = bytes(4)
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    untouched = [json.loads(line) for line in whole[:place].split(b"\n")[:-1]]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows[: len(untouched)]] == [row["step"] for row in untouched]
    MetricsLog(tmp_path, keep=4)
    assert len(read_metrics(tmp_path)) <= 4
