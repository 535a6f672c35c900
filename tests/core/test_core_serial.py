"""States are read back as they were, from files that hold numbers and text alone."""

import json
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrl_maxmin.clustering.agreement import Restarts
from torchrl_maxmin.core.serial import Elsewhere, load_state, save_state

PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
KEYS = st.text() | st.integers()
STATES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


def same(one, other):
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


@settings(deadline=None, max_examples=200)
@given(STATES)
def test_what_is_read_is_what_was_written(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, state)
    assert same(load_state(folder), state)
    json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_shape_and_memory(tmp_path, dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    state = {
        "whole": whole,
        "again": whole,
        "columns": whole.T,
        "part": whole[1:3, ::2],
        "number": whole[0, 1],
        "nothing": whole[:0],
        "nothing else": whole[:0].clone(),
    }
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert all(found[name].dtype == dtype for name in state)
    # what stands in two places is written once
    size = (tmp_path / "state.safetensors").stat().st_size
    save_state(tmp_path, state | {"once more": whole})
    assert (tmp_path / "state.safetensors").stat().st_size == size


def test_generators_and_records(tmp_path):
    record = Restarts([0.0, -1.0], [torch.tensor([0, 1]), torch.tensor([0, 0])])
    state = {
        "python": random.getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "legacy": np.random.get_state(),  # noqa: NPY002
        "record": record,
        "elsewhere": [Elsewhere("a.b")],
        "number": np.float32(0.5),
        "count": np.int64(7),
    }
    save_state(tmp_path, state)
    found = load_state(tmp_path)
    random.setstate(found["python"])
    assert random.getstate() == state["python"]
    assert found["numpy"] == state["numpy"]
    np.random.set_state(found["legacy"])  # noqa: NPY002
    assert (found["record"].score, found["record"].found_by) == (record.score, record.found_by)
    assert found["elsewhere"] == [Elsewhere("a.b")]
    assert (found["number"], found["count"]) == (0.5, 7)


@dataclass
class Foreign:
    value: int = 0


@pytest.mark.parametrize("value", [object(), {1.5: 0}, Foreign(), {"deep": [{2, 3}]}, b"bytes"])
def test_other_types_are_refused_with_their_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"a state may not hold \w+ \(at \.here"):
        save_state(tmp_path, {"here": value})


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "subprocess:Popen",
        "torchrl_maxmin.core.run:write_json",
        "torchrl_maxmin.core.serial:os.system",
    ],
)
def test_a_file_names_no_code(tmp_path, name):
    save_state(tmp_path, {})
    (tmp_path / "state.json").write_text(json.dumps({"$record": [name, {}]}))
    with pytest.raises((ValueError, AttributeError)):
        load_state(tmp_path)
