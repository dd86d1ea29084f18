"""A file of refault's own, made or read as a whole, whatever somebody has put at its place."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How such a file is opened: nothing but the file itself, and no pipe keeps the event loop."""
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""How one is made: where nothing stands, nor a link."""
RECORD = 1 << 20
"""Bytes that no record of refault's comes near."""


def is_ours_alone(status: os.stat_result) -> bool:
    """Whether it is a file that nobody but this user, or root, can have written or read."""
    return stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o077


def whole(path: Path, most: int = RECORD) -> bytes:
    """What is in it. Raises OSError, also where it is no file or has more than `most` bytes."""
    fd = os.open(path, OPEN)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, "it is too large", str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)
