"""Ctrl-C and SIGTERM end a run at the next boundary, where what is done can be written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchrl_maxmin.core.distributed import shares_rows
from torchrl_maxmin.core.errors import Interrupted

__all__ = ["Interrupted", "signals_as_interruptions", "signals_held"]


class _Request:
    """The signal that has come, and whether it waits."""

    holds = 0
    signum = 0


def _receive(signum: int, *_: Any) -> None:
    # whoever asks again does not want to wait
    if _Request.holds and not _Request.signum:
        _Request.signum = signum
        return
    raise Interrupted(signum)


@contextmanager
def signals_as_interruptions() -> Iterator[None]:
    """Raise :class:`Interrupted` for Ctrl-C and SIGTERM, in the main thread, unless somebody handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    plain: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = [number for number, handler in plain.items() if signal.getsignal(number) == handler]
    for number in taken:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, plain[number])


@contextmanager
def signals_held() -> Iterator[Callable[[], int]]:
    """Let a first signal wait until the block asks for it; a second one does not wait.

    Of processes that work as one none waits: they are at other places, and one may be gone.

    Yields:
        A function that gives the number of the signal that waits, 0 for none.
    """
    if shares_rows():
        yield lambda: 0
        return
    _Request.holds += 1
    try:
        yield lambda: _Request.signum
    except BaseException:
        _Request.signum = 0
        raise
    finally:
        _Request.holds -= 1
        waiting, _Request.signum = _Request.signum, 0
    if waiting:  # it came when the last boundary was past
        raise Interrupted(waiting)
