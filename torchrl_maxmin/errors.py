"""One exception for what a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave; the message names the cause and the fix.

    The command line prints it as one line and exits with code 2, without a traceback.
    """
