"""Draw progress bars, as plain lines where no terminal shows them; or send them to the process that draws."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from torchrl_maxmin.core.text_escape import terminal, terminal_lines

__all__ = [
    "PlainConsole",
    "PlainLines",
    "bars",
    "console",
    "drawn_bars",
    "duration",
    "forward_to",
    "late_bar",
    "prefixed",
    "progress_bar",
    "quiet",
]


class PlainConsole(Console):
    """A console to which text is data: nothing in a string is markup, an emoji or a control sequence."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of a string, also one in a table, with what is hidden written out."""
        return super().render_str(terminal_lines(text), **options)


console = PlainConsole(stderr=True)
_PATIENCE_S = 2.0  # work that takes no longer gets no late bar
_LINE_S = 30.0  # between two lines about the same work, where they are read later
_INTERVAL_S = 0.2  # a bar that moves more often than this only costs time

_queue: Any = None
_prefix = ""


def forward_to(queue: Any) -> None:
    """Send this process's progress to ``queue`` instead of drawing it; None draws again."""
    global _queue
    _queue = queue


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put ``prefix`` before the bars that this process forwards."""
    global _prefix
    _prefix = prefix
    yield
    _prefix = ""


def bars() -> Progress | PlainLines:
    """Make bars in the one look that they have; plain lines where the output is no terminal.

    Of processes that torchrun started, the first alone shows any.
    """
    silent = bool(os.environ.get("TORCHRL_MAXMIN_QUIET")) or os.environ.get("RANK", "0") != "0"
    drawn = silent or console.is_terminal or console.is_jupyter
    return drawn_bars(silent) if drawn else PlainLines()


def drawn_bars(silent: bool = False) -> Progress:
    """Make the bars of a terminal.

    Args:
        silent: whether none is drawn.
    """
    return Progress(
        _Words(lambda task: task.description, width=34),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _Words(lambda task: task.fields["note"]),
        console=console,
        disable=silent,
    )


@dataclass
class _Work:
    """What one bar would show, and where its rate is counted from."""

    title: str
    total: int
    note: str
    done: int = 0
    visible: bool = True
    start: float = field(default_factory=lambda: time.monotonic())
    counted_from: tuple[float, int] | None = None

    def line(self, now: float) -> str:
        """Step, rate, time left and note."""
        since, before = self.counted_from or (self.start, 0)
        rate = (self.done - before) / max(now - since, 1e-9)
        words = [f"{terminal(self.title, most=60)}: {self.done:,}/{self.total:,}"]
        if self.done >= self.total:
            words.append(f"in {duration(now - self.start)}")
        elif rate > 0:
            # a rate below 1 a second reads better the other way round
            words.append(f"{rate:,.1f} a second" if rate >= 1 else f"{duration(1 / rate)} each")
            words.append(f"{duration((self.total - self.done) / rate)} left")
        else:
            words.append(f"for {duration(now - self.start)}")
        return ", ".join([*words, *([terminal(self.note, most=60)] if self.note else [])])


class PlainLines:
    """Progress for a log: a line every 30 seconds about whatever is at work, and one at the end of each.

    Args:
        interval: seconds between two lines about the same work.
    """

    def __init__(self, interval: float = _LINE_S):
        self.interval = interval
        self.works: list[_Work] = []
        self._over = threading.Event()
        self._writer = threading.Thread(target=self._write_on, daemon=True)

    def __enter__(self) -> PlainLines:
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._writer.join()

    def add_task(self, description: str, total: int, note: str = "") -> TaskID:
        """Begin some work; returns its number."""
        self.works.append(_Work(description, total, note))
        return TaskID(len(self.works) - 1)

    def update(
        self,
        task: TaskID,
        advance: int = 0,
        completed: int | None = None,
        note: str = "",
        visible: bool = True,
    ) -> None:
        """Say how far some work is; at its end a line is written."""
        work, now = self.works[task], time.monotonic()
        before = work.done
        work.done = work.done + advance if completed is None else completed
        work.note, work.visible = note or work.note, visible
        if now - work.start < 1:  # a run that goes on begins with what was done before
            work.counted_from = now, work.done
        if before < work.total <= work.done and visible:
            console.print(work.line(now), soft_wrap=True)

    def _write_on(self) -> None:
        while not self._over.wait(self.interval):
            for work in [*self.works]:
                if work.visible and work.done < work.total:
                    console.print(work.line(time.monotonic()), soft_wrap=True)


def duration(seconds: float) -> str:
    """Word a time: seconds below two minutes, minutes below two hours, hours.

    Example:
        >>> duration(7.24), duration(600), duration(9000), duration(0.012)
        ('7.2 s', '10 min', '2.5 h', '0.012 s')
    """
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


class _Words(ProgressColumn):
    """Words of a task, which may hold names."""

    def __init__(self, words: Callable[[Task], str], width: int = 0):
        super().__init__(Column(no_wrap=True))
        self.words, self.width = words, width

    def render(self, task: Task) -> Text:
        return Text(terminal(self.words(task), most=60).ljust(self.width))


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show one bar; yields ``advance(steps=1, note="")``.

    Args:
        description: what is being done.
        total: how many steps it takes.

    Example:
        >>> with progress_bar("counting", 3) as advance:
        ...     for _ in range(3):
        ...         advance()
    """
    if _queue is not None:
        yield from _forwarded(description, total)
        return
    with bars() as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)

        yield advance


def _forwarded(description: str, total: int) -> Iterator[Callable[..., None]]:
    done, last = 0, 0.0
    key = f"{os.getpid()}-{time.monotonic_ns()}"
    queue, title = _queue, _prefix + description
    queue.put((key, title, 0, total, ""))

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if done >= total or now - last > _INTERVAL_S:
            last = now
            queue.put((key, title, done, total, note))

    yield advance
    queue.put((key, title, total, total, ""))


@contextmanager
def late_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar once the work has taken two seconds; yields ``reach(done)``.

    Args:
        description: what is being done.
        total: how much there is to do, in the unit of ``done``.

    Example:
        >>> with late_bar("counting", 3) as reach:
        ...     for done in (1, 2, 3):
        ...         reach(done)
    """
    start, shown = time.monotonic(), 0
    advance: Callable[..., None] | None = None
    with ExitStack() as stack:

        def reach(done: int) -> None:
            nonlocal advance, shown
            if advance is None and time.monotonic() - start > _PATIENCE_S:
                advance = stack.enter_context(progress_bar(description, total))
            if advance is not None:
                advance(done - shown)
                shown = done

        yield reach
        if advance is not None and shown < total:  # at its end; what reads ahead says less
            advance(total - shown)


def quiet() -> None:
    """Turn libraries' notices off: what a user should read is what we print.

    Libraries set their loggers when they are imported; environment variables reach those not yet imported.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("RL_WARNINGS", "0")
    os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchrl", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
