"""What no case may do: write elsewhere, reach the network, take memory, raise another type."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm_vtrans.commands.command import printable
from llm_vtrans.errors import UserError
from llm_vtrans.record.reporting import peak_rss

MEMORY = 2**30  # that a case may reserve beyond what the process has
RESIDENT = 300 * 2**20  # that the cases of one test may take
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
           "os.truncate", "os.chmod", "shutil.rmtree"}  # fmt: skip

_seen: list[str] | None = None  # what the audit hook records while `confined` is active
_allowed: Path | None = None


def watch() -> None:
    """Installs the audit hook, once for the process."""
    if not getattr(watch, "is_on", False):
        watch.is_on = True  # type: ignore[attr-defined]
        sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None or _allowed is None:
        return
    opens = event == "open" and isinstance(args[2], int) and bool(args[2] & WRITES)
    if opens or event in CHANGES:
        _note(event, args[0])
    elif event in ("socket.connect", "socket.getaddrinfo"):
        _seen.append(f"{event} {args[-1] if event == 'socket.connect' else args[0]}")
    elif event in ("subprocess.Popen", "os.system"):
        _seen.append(f"{event} {args[0]}")


def _note(event: str, path: Any) -> None:
    assert _seen is not None and _allowed is not None
    own = ("/proc/self/clear_refs", os.devnull)  # the peak of memory starts anew there
    if isinstance(path, int) or os.fsdecode(path) in own:
        return
    found = Path(os.path.realpath(os.fsdecode(path)))
    if not found.is_relative_to(_allowed) and ".hypothesis" not in found.parts:
        _seen.append(f"{event} {found}")


@contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Fails if what runs inside changes a file outside `folder`, connects or takes memory.

    Python's audit events are what is seen; compiled code of libraries is not.
    """
    global _seen, _allowed
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_rss()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    reserved = pages * resource.getpagesize()
    _seen, _allowed = [], folder.resolve()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        seen, _seen = _seen, None
    assert seen == [], seen
    taken = peak_rss() - before
    assert taken < RESIDENT, f"{taken / 2**20:.0f} MiB were taken"


def outcome(action: Callable[[], object]) -> str | None:
    """The line of a `UserError`, or None where the action succeeds; anything else is a crash."""
    try:
        action()
    except UserError as error:
        line = printable(str(error))
        assert line.strip(), "an empty line tells nothing"
        return line
    return None
