"""The one exception type whose message is meant for the user."""


class UserError(ValueError):
    """A mistake the user can correct: bad flags, unusable files, an unreachable budget.

    The message is one line that names the cause, the value and the remedy. The
    entry points print it without a traceback and exit with status 2.
    """
