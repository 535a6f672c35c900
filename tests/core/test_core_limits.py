"""Calls that never return are ended; all others are as without a limit."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from torchrl_maxmin.core.limits import OutOfTime, call_within


def sleeps():
    time.sleep(600)


def turns():
    while True:
        pass


def waits_for_a_lock():
    lock = threading.Lock()
    with lock, lock:
        pass


def waits_for_a_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        child.wait()
    finally:
        child.kill()
        child.wait()


def swallows():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(600)


def swallows_everything_once():
    try:
        time.sleep(600)
    except BaseException:
        time.sleep(600)


def waits_for_a_thread():
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        thread.join()
    finally:
        end.set()


@pytest.mark.parametrize(
    "function",
    [
        sleeps,
        turns,
        waits_for_a_lock,
        waits_for_a_process,
        swallows,
        swallows_everything_once,
        waits_for_a_thread,
    ],
)
def test_what_never_returns_is_ended(function):
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with pytest.raises(OutOfTime, match=r"no answer within 0\.1 s"):
        call_within(0.1, function)
    assert before == [signal.getsignal(number) for number in signal.valid_signals()]


def test_what_returns_is_as_without_a_limit():
    for seconds in (0.0, 60.0):
        assert call_within(seconds, dict, [("a", 1)], b=2) == {"a": 1, "b": 2}
        with pytest.raises(ZeroDivisionError):
            call_within(seconds, divmod, 1, 0)
        assert call_within(seconds, threading.current_thread) is threading.current_thread()


def test_a_function_may_have_an_alarm_of_its_own():
    """As libraries that check answers of mathematics do."""

    def limited():
        def ring(*_):
            raise TimeoutError("its own")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(600)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    with pytest.raises(TimeoutError, match="its own"):
        call_within(60.0, limited)


def test_limits_nest():
    def outer():
        with pytest.raises(OutOfTime):
            call_within(0.05, sleeps)
        return "on"

    assert call_within(60.0, outer) == "on"


def test_another_thread_has_no_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(call_within(0.01, time.sleep, 0.1)))
    thread.start()
    thread.join()
    assert found == [None]
