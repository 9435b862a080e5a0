"""How every command ends: a result, or one line and a non-zero status."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from llm_vtrans.commands.offline import forbid_network
from llm_vtrans.errors import Preempted, UserError
from llm_vtrans.record.redaction import redact

USER_ERROR, PREEMPTED, INTERRUPTED = 2, 75, 130
LONGEST = 2000  # characters of an error
OFFLINE = "--offline"  # every command takes it
RESUMABLE = ("prune",)  # commands that know --resume
GO_ON = "; --resume continues from the last saved state"
PATIENCE = 10.0  # seconds in which rank zero, and its launcher, end of the same error
LOST_PEER = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed
GLOO = "gloo/transport"  # it raises a plain RuntimeError that names its source file
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "the largest file allowed here is smaller: see `ulimit -f`, lower --shard-size",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "give the permission, or choose another place",
    errno.EPERM: "give the permission, or choose another place",
    errno.EMFILE: "allow more open files: see `ulimit -n`",
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake as every other one is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(f"{message}; see --help")


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a command and turns its failure into an exit status.

    Args:
        command: takes the arguments after its name.
        arguments: those arguments.

    Returns:
        0; 2 for a `UserError`, what the system refuses (a full disk) or the loss of another rank,
        told in one line; 75 if a scheduler asked it to go (`Preempted`): the same command with
        --resume goes on; 130 if interrupted.
    """
    go_on = GO_ON if getattr(command, "__name__", "") in RESUMABLE else ""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.SIG_DFL:  # the package's start: see llm_vtrans/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if OFFLINE in arguments:
            forbid_network()
        command([argument for argument in arguments if argument != OFFLINE])
    except UserError as error:
        return _tell(str(error))
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the system
            raise
        remedy = REMEDIES.get(error.errno, "see that it stays in place and can be used")
        return _tell(f"{error.filename or 'output'}: {error.strerror}; {remedy}", everywhere=True)
    except MemoryError:
        return _tell("out of memory; lower --batch-size or --seq-len", everywhere=True)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        reason = str(error).partition("\n")[0]
        return _tell(f"another rank has ended, or never came ({reason}){go_on}", everywhere=True)
    except Preempted as preempted:
        if is_rank_zero() or not preempted.is_agreed:
            _tell(str(preempted), everywhere=True)
        return PREEMPTED
    except KeyboardInterrupt:
        _tell(f"interrupted{go_on}", everywhere=True)
        return INTERRUPTED
    finally:
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGINT, handler)
    return 0


def printable(message: str) -> str:
    """One line of bounded length in which no character can command a terminal.

    Messages quote names out of files that may come from anywhere.
    """
    line = redact(" ".join(message.split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def is_rank_zero() -> bool:
    """Whether this process is the first of its launch, before any ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether torch.distributed waited in vain for another rank."""
    return type(error).__name__ in LOST_PEER or GLOO in str(error)


def _failed_alone() -> bool:
    """Whether rank zero goes on without this one: who fails as it does leaves the telling to it."""
    time.sleep(PATIENCE)
    meeting = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    with suppress(OSError), socket.create_connection(meeting, timeout=PATIENCE):
        return True
    return False


def _tell(message: str, everywhere: bool = False) -> int:
    """One line, from rank zero where it fails as well; `everywhere` where it may well not."""
    if not is_rank_zero():
        if not (everywhere or _failed_alone()):
            return USER_ERROR
        message = f"rank {os.environ['RANK']}: {message}"
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return USER_ERROR
