"""Progress where no terminal shows it: a line every while, and one at the end."""

import io
import re
import time

import pytest

from torchrl_maxmin.core import progress
from torchrl_maxmin.core.progress import PlainConsole, PlainLines, duration, late_bar, progress_bar


@pytest.fixture
def log(monkeypatch):
    """What is written where the output is a file, by a project that is not told to be silent."""
    file = io.StringIO()
    monkeypatch.delenv("TORCHRL_MAXMIN_QUIET")
    monkeypatch.setattr(progress, "console", PlainConsole(file=file))
    return lambda: file.getvalue().splitlines()


def wait_until(holds):
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def test_a_line_says_step_rate_time_left_and_the_note(log, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = PlainLines()
    task = lines.add_task("ppo (maxmin)", total=200)
    lines.update(task, advance=100)  # goes on from there
    now[0] += 50
    lines.update(task, advance=25, note="worst group 1 at -0.40")
    assert lines.works[task].line(now[0]) == (
        "ppo (maxmin): 125/200, 2 s each, 2 min left, worst group 1 at -0.40"
    )
    now[0] += 10
    lines.update(task, completed=200)
    assert lines.works[task].line(now[0]) == "ppo (maxmin): 200/200, in 60 s, worst group 1 at -0.40"


def test_lines_come_by_themselves_while_a_step_takes_long(log):
    with PlainLines(interval=0.02) as lines:
        task = lines.add_task("a long step", total=3)
        wait_until(lambda: len(log()) >= 2)
        lines.update(task, completed=3)
    count = len(log())
    assert re.fullmatch(r"a long step: 0/3, for [\d.e-]+ s", log()[0])
    assert log()[-1].startswith("a long step: 3/3, in ")
    time.sleep(0.1)
    assert len(log()) == count  # nothing writes on


def test_a_bar_in_a_log_is_one_line_at_its_end_and_names_are_inert(log):
    with progress_bar("\x1b[31mred\n[b]", 2) as advance:
        advance()
        advance(note="loss\x1b]0;x\x07 1")
    assert len(log()) == 1
    assert "\x1b" not in log()[0]
    assert "[b]: 2/2, in " in log()[0]


def test_work_that_broke_off_leaves_no_line(log):
    with pytest.raises(ValueError), progress_bar("breaks", 2) as advance:  # noqa: PT012 - it breaks within
        advance()
        raise ValueError
    assert log() == []


def test_a_terminal_keeps_its_bars(monkeypatch):
    monkeypatch.setattr(progress, "console", PlainConsole(file=io.StringIO(), force_terminal=True))
    assert not isinstance(progress.bars(), PlainLines)


def test_of_several_processes_one_writes(log, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress_bar("silent", 1) as advance:
        advance()
    monkeypatch.setenv("RANK", "0")
    with progress_bar("heard", 1) as advance:
        advance()
    assert [line.partition(":")[0] for line in log()] == ["heard"]


def test_a_late_bar_ends_at_its_total(log, monkeypatch):
    """What reads ahead of its place says less than there is when it comes to its end."""
    monkeypatch.setattr(progress, "_PATIENCE_S", -1.0)
    with late_bar("reading x", 1_224_767) as reach:
        reach(1_021_222)
    assert log()[-1].startswith("reading x: 1,224,767/1,224,767, in ")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.5, "0.5 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
