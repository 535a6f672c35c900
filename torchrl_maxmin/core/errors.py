"""Exceptions for what a user can mend."""


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
