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

import msgspec

from refault.daemon.host.paths import make_again
from refault.daemon.host.whole import NEW, whole
from refault.daemon.kept._journal import ffi, lib
from refault.daemon.kept.left import OtherVersionError, decode
from refault.qmp import journal
from refault.qmp.journal import Kind

_LOG = 256 << 10
"""Bytes of a log at first. It grows where it must."""
_FULL = 192 << 10
"""Bytes of it from which on it should be begun anew."""
_MOST = 4 << 30
"""Bytes that none has: more would be clients with gigabytes under way."""
_LEAST: int = lib.RF_JOURNAL_LEAST
_NO_ROOM: int = lib.RF_JOURNAL_NO_ROOM
_receive, _peek, _send = lib.rf_journal_receive, lib.rf_journal_peek, lib.rf_journal_send
_RECEIVED, _PEEKED, _SENT = int(Kind.RECEIVED), int(Kind.PEEKED), int(Kind.SENT)
_PAGE = mmap.PAGESIZE


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

    def begin(self, before: bytes) -> None:
        """Begins it anew: `before` is all that was. The file is replaced in one step, and what stood in the
        last one is gone. Raises OSError; then nothing has changed.
        """
        first = journal.checked(before)
        log_at = journal.HEADER + len(first)
        temporary = _new(self.path)
        make_again(self.path.parent)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        fd = os.open(temporary, NEW, 0o600)
        try:
            size = log_at + _LOG
            size += -size % _PAGE
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, first, journal.HEADER)
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
        """What befalls from here on is not written, and nobody can go on. It tells yet what QEMU holds, and
        nothing of what was said."""
        if self.on:
            self.on = False
            self._map[: len(journal.GIVEN_UP)] = journal.GIVEN_UP
            for at, size in _said(self._map[:]):
                self._map[at : at + size] = bytes(size)
            self._forget()

    def give_up_left(self) -> None:
        """The same of what the last refault wrote, which is here no longer true. Raises OSError."""
        data = whole(self.path, _MOST)
        fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "r+b", buffering=0):
            os.pwrite(fd, journal.GIVEN_UP, 0)
            for at, size in _said(data):
                os.pwrite(fd, bytes(size), at)
        self._ours = True

    def end(self) -> None:
        """Nothing is to be known by it any more."""
        self.on = False
        self._forget()
        if self._ours:
            self._ours = False
            with contextlib.suppress(OSError):
                remove(self.path)

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

    def receive(self, sock: socket, who: int, most: int, *, takes: bool) -> tuple[bytes, int] | None:
        """Receives without waiting. With `takes` perhaps a descriptor comes along, else -1: then these bytes
        are to be consumed. None where it should be begun anew first. Raises OSError."""
        full, found = self._full, self._at
        while True:
            if takes:
                passed = self._passed
                count = _peek(self._file, sock.fileno(), _RECEIVED, _PEEKED, who, most, full, found, passed)
                if count > 0:
                    at = found[0]
                    return self._map[at : at + count], passed[0]
            else:
                count = _receive(self._file, sock.fileno(), _RECEIVED, who, most, full, found)
                if count > 0:
                    at = found[0]
                    return self._map[at : at + count], -1
            if count == 0:
                return b"", -1
            if count != _NO_ROOM:
                raise OSError(-count, os.strerror(-count))
            if lib.rf_journal_used(self._file) > full:
                return None
            self._reserve(_LEAST)

    def consume(self, sock: socket, who: int, count: int) -> None:
        """Takes bytes out of a socket that were received with a descriptor."""
        self._reserve(max(count, _LEAST))
        full = lib.rf_journal_used(self._file)
        _receive(self._file, sock.fileno(), Kind.CONSUMED, who, count, full, self._at)

    def send(self, sock: socket, who: int, data: bytes | memoryview, fd: int) -> int:
        """Sends without waiting; the number of bytes that went. Raises OSError."""
        text = data if isinstance(data, bytes) else ffi.from_buffer(data)
        count: int = _send(self._file, sock.fileno(), _SENT, who, text, len(data), fd)
        if count >= 0:
            return count
        if count != _NO_ROOM:
            raise OSError(-count, os.strerror(-count))
        self._reserve(0)
        return self.send(sock, who, data, fd)

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


def _said(file: bytes) -> list[tuple[int, int]]:
    """Where in a journal stands what clients and QEMU have said: offsets and lengths."""
    first = bytes(journal.before(file))
    begins = file.index(first)
    said = [(begins + len(first), len(file) - begins - len(first))]
    with contextlib.suppress(msgspec.MsgspecError, OtherVersionError):
        core = decode(first, records=False).core
        said.append((begins + first.index(core), len(core)))
    return said


def forget_unfinished(path: Path) -> None:
    """Removes what a kill has left of a journal that was to take its place."""
    with contextlib.suppress(OSError):
        _new(path).unlink()


def _new(path: Path) -> Path:
    """The file that is to take its place."""
    return path.with_name(f"{path.name}.new")


def remove(path: Path) -> None:
    """Removes a journal. Raises OSError."""
    forget_unfinished(path)
    path.unlink()


def left(path: Path) -> bytes | None:
    """What the last refault wrote; None where it has left nothing. Raises OSError."""
    try:
        return whole(path, _MOST)
    except FileNotFoundError:
        return None
