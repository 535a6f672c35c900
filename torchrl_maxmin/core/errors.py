"""Exceptions for what a user can mend, and for what a user asked for; nothing heavy is imported here."""

from __future__ import annotations

import signal
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave; the message names the cause and the fix.

    The command line prints it as one line and exits with code 2, without a traceback.
    """


class UnservedModelError(UserError):
    """A language model that cannot be sampled and trained as a policy, though it may give rewards."""


class LostRankError(RuntimeError):
    """Another of the processes that train one model together has ended."""


class RewardError(UserError):
    """What gives the rewards has failed; a run that had begun ends as by :class:`EngineError`."""


class EngineError(RuntimeError):
    """What samples the responses, or rewards them, has failed; training can go on from where it was."""


class SystemFailure(RuntimeError):
    """The system refuses something (disk, permissions, files, memory); the message says what to do."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to end; no error of its own, so that no handler of errors takes it for one.

    Args:
        signum: SIGINT or SIGTERM.
        text: what is saved, and how to go on.
    """

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text)
        self.signum = signum

    def __reduce__(self) -> tuple[type, tuple[int, str]]:  # goes from a worker to its parent
        return type(self), (self.signum, str(self))

    @classmethod
    def at_checkpoint(cls, signum: int, path: Path) -> Interrupted:
        """What to raise once a checkpoint is written."""
        return cls(signum, f"all steps until then are in {path}")

    @property
    def name(self) -> str:
        """What asked for it, in words."""
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


def first_line(error: Exception) -> str:
    """The first line of what an error says, and not much of it."""
    return str(error).partition("\n")[0][:200]
