"""Tasks in processes: each after what it needs, and a mistake stops those that wait."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchrl_maxmin.core.errors import SystemFailure, UserError
from torchrl_maxmin.core.tasks import Task, run_tasks


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


def test_what_the_system_refuses_a_worker_is_one_line_with_the_place(tmp_path):
    tasks = {"a": Task(_fail_to_write, SimpleNamespace(output_dir=str(tmp_path)))}
    with pytest.raises(SystemFailure) as refused:
        run_tasks(tasks, num_workers=1)
    assert str(refused.value).startswith(f"no space is left on the disk ({tmp_path}); free some space")


def _fail_to_write(config):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _append(where):
    path, letter = where
    with path.open("a") as file:
        file.write(letter)


def _refuse(message):
    raise UserError(message)


def test_workers_end_with_the_run_that_started_them(tmp_path):
    """A killed run must not go on in processes that nobody sees."""
    script = (
        "from pathlib import Path; from torchrl_maxmin.core.tasks import Task, run_tasks\n"
        "from test_core_tasks import _sleep_long\n"
        f"note = Path({str(tmp_path / 'pid')!r})\n"
        "if __name__ == '__main__': run_tasks({'a': Task(_sleep_long, note)}, 1)\n"
    )
    (tmp_path / "run.py").write_text(script)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env={**os.environ, "PYTHONPATH": path})
    assert _within(60, lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    worker = int((tmp_path / "pid").read_text())
    run.kill()
    run.wait()
    assert _within(20, lambda: not _alive(worker))


def _sleep_long(path):
    path.write_text(str(os.getpid()))
    time.sleep(300)


def _within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
