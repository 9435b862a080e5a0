"""A file system that passes everything on to a folder, but takes its time over every read.

`python tests/faults/slow_disk.py FOLDER MOUNT_POINT SECONDS` mounts it by FUSE until it is ended.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from mfusepy import FUSE, Operations

STATUS = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")
TIMES = ("st_atime", "st_mtime", "st_ctime")


class SlowDisk(Operations):
    """Files of a folder, each read some seconds late."""

    use_ns = True

    def __init__(self, folder: str, delay: float):
        self._folder, self._delay = folder, delay

    def _at(self, path: str) -> str:
        return self._folder + path

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(self._at(path))
        status = {name: getattr(found, name) for name in STATUS}
        return {**status, **{name: getattr(found, name + "_ns") for name in TIMES}}

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._at(path), flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        time.sleep(self._delay)
        return os.pread(fh, size, offset)

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path), length)

    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._at(path), ns=times)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)


if __name__ == "__main__":
    folder, mount_point, delay = sys.argv[1:]
    FUSE(SlowDisk(folder, float(delay)), mount_point, foreground=True)
