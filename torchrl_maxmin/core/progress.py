"""Draw progress bars, or send them to the process that draws them; turn libraries' notices off."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from torchrl_maxmin.core.text_escape import terminal, terminal_lines

__all__ = [
    "PlainConsole",
    "bars",
    "console",
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


def bars() -> Progress:
    """Make bars in the one look that they have."""
    return Progress(
        _Words(lambda task: task.description, width=34),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _Words(lambda task: task.fields["note"]),
        console=console,
        disable=bool(os.environ.get("TORCHRL_MAXMIN_QUIET")),
    )


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
