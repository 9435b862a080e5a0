"""The exceptions whose messages are meant for the user."""


class UserError(ValueError):
    """A mistake the user can correct: bad flags, unusable files, an unreachable budget.

    The message is one line that names the cause, the value and the remedy. The
    entry points print it without a traceback and exit with status 2.
    """


class Preempted(Exception):
    """The run was asked to go by a signal; what it did is saved.

    The entry points print the message and exit with status 75 (EX_TEMPFAIL): try again.
    """
