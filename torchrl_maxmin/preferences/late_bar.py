"""A progress bar for work that is usually over before anybody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torchrl_maxmin.progress import progress_bar

__all__ = ["late_bar"]

_PATIENCE_S = 2.0


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
