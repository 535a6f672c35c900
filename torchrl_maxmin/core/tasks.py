"""Run stages with dependencies in a few processes that share one display of bars."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchrl_maxmin.core.interruption import Interrupted
from torchrl_maxmin.core.progress import bars, forward_to, prefixed, quiet
from torchrl_maxmin.core.system_errors import explained

__all__ = ["Task", "run_tasks"]


@dataclass(frozen=True)
class Task:
    """One call that waits for others.

    Attributes:
        function: a module-level function, called with ``config`` in a process of its own.
        config: its only argument.
        after: names of the tasks that must be done before.
    """

    function: Callable[[Any], Any]
    config: Any
    after: tuple[str, ...] = ()


def run_tasks(tasks: Mapping[str, Task], num_workers: int, overall: str = "") -> dict[str, float]:
    """Run tasks, each as soon as what it waits for is done; earlier ones go first.

    Args:
        tasks: by name; the name's part before ``/`` stands before the task's bars.
        num_workers: processes. Each uses one thread: small models run fastest that way.
        overall: name of a bar over all tasks, for runs of many; the bars of what is done then vanish.

    Returns:
        Seconds of each task.

    Raises:
        Exception: what a task raised; tasks that have not started are dropped.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    seconds: dict[str, float] = {}
    waiting = dict(tasks)
    running: dict[Future, str] = {}
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (queue,))
    with _Drawing(queue, overall), pool, _ended_together():
        while waiting or running:
            if overall:
                queue.put((overall, overall, len(seconds), len(tasks), ""))
            ready = [name for name, task in waiting.items() if all(dep in seconds for dep in task.after)]
            for name in ready[: num_workers - len(running)]:
                label = name.split("/")[0] + ": " if "/" in name else ""
                running[pool.submit(_call, waiting.pop(name), label)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                seconds[running.pop(future)] = _result(future, pool)
        if overall:
            queue.put((overall, overall, len(tasks), len(tasks), ""))
    return seconds


@contextmanager
def _ended_together() -> Iterator[None]:
    """Hand SIGTERM, which this process alone gets, to the workers: they write their checkpoints."""
    try:
        yield
    except Interrupted as error:
        if error.signum == signal.SIGTERM:
            for worker in multiprocessing.active_children():
                worker.terminate()
        raise


def _result(future: Future, pool: ProcessPoolExecutor) -> float:
    try:
        return future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _start_worker(queue: Any) -> None:
    """Set one thread, send progress to the parent's display, and end when the parent does."""
    import torch

    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(1)
    quiet()
    forward_to(queue)


def _follow_parent() -> None:
    """End this process when its parent is gone: a killed run must not go on in its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(task: Task, label: str) -> float:
    start = time.perf_counter()
    with prefixed(label), explained(getattr(task.config, "output_dir", None)):
        task.function(task.config)
    return time.perf_counter() - start


class _Drawing:
    """Draws the bars that workers send through a queue, in a thread, until the block ends."""

    def __init__(self, queue: Any, overall: str = ""):
        self.queue, self.overall = queue, overall

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._draw, daemon=True)
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.queue.put(None)
        self.thread.join()

    def _draw(self) -> None:
        known: dict[str, Any] = {}
        with bars() as progress:
            while (event := self.queue.get()) is not None:
                key, title, done, total, note = event
                if key not in known:
                    known[key] = progress.add_task(title, total=total, note="")
                passing = bool(self.overall) and key != self.overall
                progress.update(known[key], completed=done, note=note, visible=not passing or done < total)
