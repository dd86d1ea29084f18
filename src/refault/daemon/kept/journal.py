"""The file in which the connections of one monitor are written down as they are used: cext/journal.h.

It is mapped, so what is written survives the process at once, and nothing waits. All its blocks are there
before they are used, for a full file system would be a SIGBUS.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from socket import socket

from refault.daemon.host.paths import make_again
from refault.daemon.kept._journal import ffi, lib
from refault.qmp import journal
from refault.qmp.journal import Kind

_LOG = 256 << 10
"""Bytes of a log at first. It grows where it must."""
_FULL = 128 << 10
"""Bytes of it from which on it should be begun anew."""
_LEAST = 4 << 10
"""Bytes of room with which a receiver is content."""
_PAGE = mmap.PAGESIZE
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class NoRoomError(Exception):
    """The file cannot be made larger."""


class Journal:
    """Written while `on`. Whoever writes makes sure that it is. Raises NoRoomError where it cannot be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on = False
        self._map: mmap.mmap
        self._file: object = None
        self._fd = -1
        self._ours = False
        """Whether the file is what was written here."""
        self._full = _FULL
        self._at = ffi.new("uint64_t *")
        self._passed = ffi.new("int *")

    @property
    def full(self) -> bool:
        """Whether it should be begun anew, at a moment when nothing is half done."""
        return bool(lib.rf_journal_used(self._file) > self._full)

    def begin(self, before: bytes) -> None:
        """Begins it anew: `before` is all that was. The file is replaced in one step, and what stood in the
        last one is gone. Raises OSError; then nothing has changed.
        """
        log_at = journal.HEADER + len(before)
        temporary = self.path.with_name(f"{self.path.name}.new")
        make_again(self.path.parent)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, _NEW, 0o600)
        try:
            size = log_at + _LOG
            size += -size % _PAGE
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, before, journal.HEADER)
            mapped = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            file = ffi.from_buffer("char[]", mapped, require_writable=True)
            lib.rf_journal_begin(file, log_at, size)
            temporary.replace(self.path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._forget()
        self._map, self._file, self._fd = mapped, file, fd
        # Saving takes as long as there is to be saved.
        self._full = max(_FULL, len(before))
        self.on = self._ours = True

    def give_up(self) -> None:
        """What befalls from here on is not written, and nobody can go on. It tells yet what QEMU holds."""
        if self.on:
            self.on = False
            self._map[: len(journal.GIVEN_UP)] = journal.GIVEN_UP
            self._forget()

    def give_up_left(self) -> None:
        """The same of what the last refault wrote, which is here no longer true. Raises OSError."""
        fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.pwrite(fd, journal.GIVEN_UP, 0)
        finally:
            os.close(fd)
        self._ours = True

    def end(self) -> None:
        """Nothing is to be known by it any more."""
        self.on = False
        self._forget()
        if self._ours:
            self._ours = False
            with contextlib.suppress(OSError):
                self.path.unlink()

    def leave(self) -> None:
        """It is for the next refault, as it is."""
        self.on = self._ours = False
        self._forget()

    def _forget(self) -> None:
        if self._fd >= 0:
            ffi.release(self._file)
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def append(self, kind: Kind, who: int, data: bytes = b"") -> None:
        """Writes a record."""
        self._reserve(len(data))
        lib.rf_journal_append(self._file, kind, who, data, len(data))

    def receive(self, sock: socket, who: int, most: int, *, takes: bool) -> tuple[bytes, int]:
        """Receives without waiting. With `takes` perhaps a descriptor comes along, else -1: then these bytes
        are to be consumed. Raises OSError."""
        self._reserve(_LEAST)
        most = min(most, int(lib.rf_journal_room(self._file)))
        self._passed[0] = -1
        if takes:
            count = lib.rf_journal_peek(
                self._file,
                sock.fileno(),
                Kind.RECEIVED,
                Kind.PEEKED,
                who,
                most,
                self._at,
                self._passed,
            )
        else:
            count = lib.rf_journal_receive(self._file, sock.fileno(), Kind.RECEIVED, who, most, self._at)
        if count > 0:
            at = self._at[0]
            return self._map[at : at + count], self._passed[0]
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return b"", -1

    def consume(self, sock: socket, who: int, count: int) -> None:
        """Takes bytes out of a socket that were received with a descriptor."""
        self._reserve(count)
        lib.rf_journal_receive(self._file, sock.fileno(), Kind.CONSUMED, who, count, self._at)

    def send(self, sock: socket, who: int, data: memoryview, fd: int) -> int:
        """Sends without waiting; the number of bytes that went. Raises OSError."""
        self._reserve(0)
        count = lib.rf_journal_send(
            self._file, sock.fileno(), Kind.SENT, who, ffi.from_buffer(data), len(data), fd
        )
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        return int(count)

    def _reserve(self, room: int) -> None:
        if lib.rf_journal_room(self._file) >= max(room, 8):
            return
        size = len(self._map) + room + _LOG
        size += -size % _PAGE
        try:
            os.posix_fallocate(self._fd, 0, size)
            mapped = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise NoRoomError(error.strerror) from error
        ffi.release(self._file)
        self._map.close()
        self._map, self._file = mapped, ffi.from_buffer("char[]", mapped, require_writable=True)
        lib.rf_journal_grown(self._file, size)


def left(path: Path) -> bytes | None:
    """What the last refault wrote; None where it has left nothing. Raises OSError."""
    try:
        fd = os.open(path, _OLD)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return file.read()
