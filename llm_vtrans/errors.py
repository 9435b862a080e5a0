"""The exceptions whose messages are meant for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class UserError(ValueError):
    """A mistake the user can correct: bad flags, unusable files, an unreachable budget.

    The message is one line that names the cause, the value and the remedy. The
    entry points print it without a traceback and exit with status 2.
    """


class Preempted(BaseException):
    """The run was asked to go by a signal; what it did is saved.

    It can come at any line, as KeyboardInterrupt does, so `except Exception` must not take it for
    a failure of what it interrupts. The entry points print the message and exit with status 75
    (EX_TEMPFAIL): try again.

    Attributes:
        is_agreed: whether all ranks leave together; otherwise no other rank knows of the signal.
    """

    def __init__(self, message: str, is_agreed: bool = False) -> None:
        super().__init__(message)
        self.is_agreed = is_agreed


@contextmanager
def blame(what: object, remedy: str) -> Iterator[None]:
    """Turns whatever reading somebody else's content raises into a `UserError`.

    For content whose every damage cannot be foreseen: a config that a library builds a model
    from, a manifest that a report walks through.

    Args:
        what: the file whose content is read.
        remedy: what the user can do about it.

    Raises:
        UserError: anything was raised inside but an error of the system (a full disk).
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what}: {reason or 'damaged'} ({type(error).__name__}); {remedy}"
        ) from error


def require(package: str, asked: str, extra: str) -> None:
    """Says what to install for something optional.

    Args:
        package: that has it.
        asked: the user's wish.
        extra: of this project, with the package.

    Raises:
        UserError: the package is not there.
    """
    if find_spec(package) is None:
        raise UserError(f"{asked} needs {package}: pip install 'llm-vtrans[{extra}]'")
