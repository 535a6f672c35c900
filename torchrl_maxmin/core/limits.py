"""Call functions that may never return."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["OutOfTime", "call_within"]

_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)  # not SIGALRM, which functions set for themselves
_AGAIN_S = 1.0  # a function that swallows the interruption is interrupted again


class OutOfTime(Exception):
    """A function did not return in time."""


class _Interrupt(BaseException):
    """Ends the call, also where the function handles every ``Exception``."""


def call_within(seconds: float, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function, and end the call where it takes too long.

    The function runs in this thread, as without a limit: a signal interrupts what it waits for. Only the main
    thread can be interrupted, and no code that neither returns to Python nor waits for the system; elsewhere
    there is no limit.

    Args:
        seconds: that it may take; 0 for no limit.
        function: what to call.
        arguments: by place.
        named: by name.

    Raises:
        OutOfTime: where it takes longer.

    Example:
        >>> call_within(60.0, divmod, 7, 2)
        (3, 1)
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        return function(*arguments, **named)
    done, main = threading.Event(), threading.get_ident()

    def interrupt(*_: Any) -> None:
        if not done.is_set():
            raise _Interrupt

    def watch() -> None:
        pause = seconds
        while not done.wait(pause):
            signal.pthread_kill(main, _SIGNAL)
            pause = _AGAIN_S

    watcher = threading.Thread(target=watch, daemon=True)
    before = signal.signal(_SIGNAL, interrupt)
    try:
        watcher.start()
        try:
            return function(*arguments, **named)
        finally:
            done.set()
    except _Interrupt:
        raise OutOfTime(f"no answer within {seconds:g} s") from None
    finally:
        done.set()
        watcher.join()  # before the handler goes: no signal may come without one
        signal.signal(_SIGNAL, before)
