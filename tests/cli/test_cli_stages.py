"""Tasks in processes: each after what it needs, and a mistake stops those that wait."""

import pytest

from torchrl_maxmin.cli.stages import Task, run_tasks
from torchrl_maxmin.errors import UserError


def test_a_task_waits_for_what_it_needs(tmp_path):
    tasks = {
        "b": Task(_append, (tmp_path / "order", "b"), after=("a",)),
        "c": Task(_append, (tmp_path / "order", "c")),
        "a": Task(_append, (tmp_path / "order", "a"), after=("c",)),
    }
    seconds = run_tasks(tasks, num_workers=2)
    assert (tmp_path / "order").read_text() == "cab"
    assert set(seconds) == {"a", "b", "c"}
    assert min(seconds.values()) >= 0


def test_a_mistake_in_a_task_stops_those_that_wait(tmp_path):
    tasks = {
        "a": Task(_refuse, "no such thing; give another"),
        "b": Task(_append, (tmp_path / "order", "b"), after=("a",)),
    }
    with pytest.raises(UserError, match="no such thing; give another"):
        run_tasks(tasks, num_workers=1)
    assert not (tmp_path / "order").exists()


def _append(where):
    path, letter = where
    with path.open("a") as file:
        file.write(letter)


def _refuse(message):
    raise UserError(message)
