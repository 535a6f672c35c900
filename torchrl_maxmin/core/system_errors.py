"""What the system refuses (disk, permissions, files, memory), in one line with its cause and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl_maxmin.core.errors import EngineError, LostRankError, SystemFailure, UserError

__all__ = ["explained", "is_out_of_memory", "system_message"]

_SPACE = "free some space, or give a folder on another disk"
_MEMORY = (
    "the memory is not enough",
    "--per_device_train_batch_size, --generation_batch_size and --scoring_batch_size bound what is in memory "
    "at once, and torchrl-maxmin plan says how much a run needs",
)

#: errno -> (cause, what to do)
_REFUSALS = {
    errno.ENOSPC: ("no space is left on the disk", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("a file would be larger than is allowed", "raise the limit (ulimit -f)"),
    errno.EACCES: ("permission is denied", "change the permissions, or give a path of your own"),
    errno.EPERM: ("permission is denied", "change the permissions, or give a path of your own"),
    errno.EROFS: ("the file system can only be read", "give a folder on another one"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n), or use fewer workers"),
    errno.ENFILE: ("the system has too many open files", "close other programs, or use fewer workers"),
    errno.EAGAIN: ("no further process can be started", "raise the limit (ulimit -u), or use fewer workers"),
    errno.ENAMETOOLONG: ("a file's name is too long", "give a shorter path"),
    errno.ENOENT: ("there is no such file or folder", "check the path, and whether it was removed meanwhile"),
    errno.ENOTDIR: ("a part of the path is a file and no folder", "give another path"),
    errno.EISDIR: ("there is a folder where a file is meant", "give another path"),
    errno.EIO: ("the disk could not be read or written", "check the disk and its connection"),
    errno.ESTALE: ("the network drive was lost", "mount it again"),
    errno.ENOMEM: _MEMORY,
}
#: words of libraries that keep no number
_WORDS = {
    "out of memory": errno.ENOMEM,
    "DefaultCPUAllocator": errno.ENOMEM,
    "unexpected pos": errno.ENOSPC,  # torch.save could not write on
    "can't start new thread": errno.EAGAIN,
    "Parent directory": errno.ENOENT,
}
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)
_PATH = re.compile(r"at path \"([^\"]+)\"|Parent directory (\S+) does not exist|directory: '?(/[^']+)'?$")


@contextmanager
def explained(folder: str | Path | None = None) -> Iterator[None]:
    """Turn what the system refuses inside into :class:`SystemFailure`; all other errors pass.

    Args:
        folder: where the work inside writes, for errors that name no path.

    Raises:
        SystemFailure: with the line of :func:`system_message`.
    """
    try:
        yield
    except (UserError, LostRankError, EngineError, SystemFailure):
        raise
    except Exception as error:
        message = system_message(error, folder)
        if message is None:
            raise
        raise SystemFailure(message) from error


def system_message(error: BaseException, folder: str | Path | None = None) -> str | None:
    """Say in a line what the system refused, where, and what to do; None for an error of another kind.

    Args:
        error: an OSError, a want of memory, or a library's own error about either.
        folder: where the work was to write; named where the error names no path.

    Example:
        >>> system_message(OSError(28, "No space left on device", "/data/model.bin"))
        'no space is left on the disk (/data/model.bin); free some space, or give a folder on another disk'
        >>> system_message(ValueError("no")) is None
        True
    """
    number, text = _number(error), str(error)
    found = _PATH.search(text)
    path = getattr(error, "filename", None) or (found and found[found.lastindex or 0]) or folder
    place = "" if path is None else f" ({os.fsdecode(path) if isinstance(path, bytes) else path})"
    if number in _REFUSALS:
        cause, remedy = _REFUSALS[number]
        return f"{cause}{place}; {remedy}"
    if type(error).__name__ == "BrokenProcessPool":
        return f"a worker process was ended, as systems do for want of memory{place}; {_MEMORY[1]}"
    if isinstance(error, OSError):
        return f"the system refused ({text or type(error).__name__}){place}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a want of memory, on a device or of the system.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    return _number(error) == errno.ENOMEM


def _number(error: BaseException) -> int | None:
    """The errno behind an error, also where only a library's text has it."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.errno
    if not isinstance(error, OSError | RuntimeError) and type(error).__name__ != "SafetensorError":
        return None
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1])
    words = {os.strerror(number): number for number in _REFUSALS} | _WORDS
    return next((number for word, number in words.items() if word in text), None)
