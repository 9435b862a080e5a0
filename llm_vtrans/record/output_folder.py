"""Output that is either whole or absent: folders and files under a temporary name first."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from llm_vtrans.errors import UserError

MANIFEST_FILE = "vtrans.json"
PRIVATE = ~0o077  # what is unfinished is its owner's alone; finished it has the usual permissions
PRIVATE_FOLDER = 0o700


def what_to_name(folder: Path) -> str:
    """What to do where a folder is no result of `prune`: it may hold one of each `--budgets`."""
    results = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_FILE}"))
    if results:
        return f"name one of its results: {', '.join(results)}"
    return "name a folder that prune wrote"


class OutputFolder:
    """Context manager that yields a temporary sibling and renames it to `path` on success.

    A failure removes the temporary folder. An old folder is renamed aside before the new
    one takes its name and removed afterwards, so a crash leaves at least one of them;
    `check` puts it back.

    Attributes:
        path: the final folder, links resolved.
        partial: the temporary folder `.{name}.partial-{pid}` beside it.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        keep: tuple[str, ...] = (),
        manifest: str = MANIFEST_FILE,
    ) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            path: the final folder.
            overwrite: whether an earlier result in `path` may be replaced.
            keep: entries of `path` that a run writes while it goes on (its training state):
                they don't count as an earlier result and move over into the new folder.
            manifest: file by which an earlier result is known.
        """
        self.path = Path(path).resolve()
        self.partial = self._sibling("partial", os.getpid())
        self._aside = self._sibling("replaced", os.getpid())
        self._overwrite = overwrite
        self._keep = keep
        self._manifest = manifest

    def check(self) -> None:
        """Check before expensive work that the folder can be written; tidy up after a crash.

        Raises:
            UserError: the folder can't be made, or holds something that may not be deleted.
        """
        if self.path.is_mount():
            raise UserError(
                f"{self.path}: is a mount point and cannot be replaced as a whole; choose a "
                "folder inside it as --output."
            )
        existing = self._nearest_folder()
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"{self.path}: cannot be made, {existing} is no writable folder; "
                "choose another --output."
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; choose another --output.")
        self._tidy()
        self._check_replaceable()

    def require_space(self, bytes_needed: int) -> None:
        """Check that `bytes_needed` bytes fit beside what is there now.

        Raises:
            UserError: the disk has less free.
        """
        free = shutil.disk_usage(self._nearest_folder()).free
        if free < bytes_needed:
            raise UserError(
                f"{self.path}: needs {bytes_needed / 1e9:.2f} GB, its disk has "
                f"{free / 1e9:.2f} GB free; free some or choose another --output."
            )

    def __enter__(self) -> Path:
        """Check once more, make the temporary folder and return it."""
        self.check()
        self.partial.mkdir(parents=True)
        self._mode = self.partial.stat().st_mode
        _permit(self.partial, self._mode & PRIVATE)
        return self.partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the folder its final name, or remove it after a failure.

        Raises:
            UserError: something else has been put into the final folder meanwhile.
        """
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        _permit(self.partial, self._mode)
        _sync_tree(self.partial)
        try:
            self._check_replaceable()
        except UserError as refusal:
            raise UserError(
                f"{refusal} The finished result lies in {self.partial}: move it away first."
            ) from refusal
        self._publish()

    def _publish(self) -> None:
        """Swap the finished folder in; at every moment the old or the new one exists."""
        if self.path.exists():
            self.path.rename(self._aside)
        try:
            self.partial.rename(self.path)
        except OSError:
            if self._aside.exists():
                self._aside.rename(self.path)
            raise
        self._retire(self._aside)
        _sync(self.path.parent)

    def _retire(self, aside: Path) -> None:
        """Move what is kept out of an old folder, then remove it."""
        for name in self._keep:
            if (aside / name).exists() and not (self.path / name).exists():
                (aside / name).rename(self.path / name)
        shutil.rmtree(aside, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what dead processes left behind; finish or undo their swap."""
        for aside in self._leftovers("replaced"):
            if self.path.exists():
                self._retire(aside)
            else:
                aside.rename(self.path)
        for partial in self._leftovers("partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def _leftovers(self, kind: str) -> Iterator[Path]:
        """Temporary siblings whose process is gone; this one has made none yet."""
        for path in sorted(self.path.parent.glob(".*")):
            pid = path.name.removeprefix(f".{self.path.name}.{kind}-")
            if pid != path.name and pid.isdecimal() and not _is_alive(int(pid)):
                yield path

    def _check_replaceable(self) -> None:
        """The final folder must be absent, empty, or ours and given up by --overwrite."""
        if not self.path.exists():
            return
        entries = {entry.name for entry in self.path.iterdir()}
        if not entries - set(self._keep):
            return
        if not self._overwrite:
            raise UserError(
                f"{self.path}: is not empty; pass --overwrite to replace it, or choose another "
                "--output."
            )
        if self._manifest not in entries:
            raise UserError(
                f"{self.path}: has no {self._manifest}, so it is no earlier result and is not "
                "deleted; empty it yourself or choose another --output."
            )

    def _sibling(self, kind: str, pid: int) -> Path:
        return self.path.parent / f".{self.path.name}.{kind}-{pid}"

    def _nearest_folder(self) -> Path:
        """The parent, or the nearest thing above it that exists."""
        return next(parent for parent in self.path.parents if os.path.exists(parent))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps other runs out of an output folder while this one goes on.

    The lock is a file beside the folder that the system unlocks when its holder ends, however
    it ends. Where none can be made (a read-only place, a file system without locks) there is
    none; `OutputFolder.check` tells what is wrong with the place.

    Args:
        path: the output folder, which need not exist.

    Raises:
        UserError: another run holds the lock.
    """
    path = path.resolve()
    lock = path.parent / f".{path.name}.lock"
    descriptor = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock, path)
    try:
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(lock: Path, path: Path) -> int:
    """Descriptor of the locked file; a file that its holder has just removed is made anew."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{path}: {holder} is writing this folder; wait for it, or choose another --output."
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        os.close(descriptor)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """`atomic_write` for bytes that are there already."""
    atomic_write(path, [data])


def atomic_write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that a reader or a crash never sees half written; its folder must exist."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # "x" follows no link that somebody else put there
            mode = os.fstat(file.fileno()).st_mode
            _permit(file.fileno(), mode & PRIVATE)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            _permit(file.fileno(), mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` for text, as UTF-8; half of a pair of surrogates is written escaped."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def _permit(file: Path | int, mode: int) -> None:
    """Sets permissions, where the file system has any."""
    with suppress(OSError):
        os.chmod(file, mode)


def _is_alive(pid: int) -> bool:
    """Whether another process of this number runs; our own has left nothing behind yet."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True


def _sync_tree(folder: Path) -> None:
    """Bring a folder and all below it to the disk."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
