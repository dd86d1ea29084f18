"""Where connections are kept while they are in nobody's hands: in flight, in the queue of a pair of sockets.

The kernel holds what was sent there for as long as somebody holds the pair (unix(7), SCM_RIGHTS), which
QEMU does: so it costs one call to keep a connection, and QEMU, which is told nothing of it, has no
descriptor more.

A guest that has broken out has what QEMU has, and may put anything there, and go on with that while we look.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from refault.daemon.kept.sockets import end_for_all
from refault.daemon.kernel.passing import descriptors_in, send_with

_AT_ONCE = 250
"""Descriptors in one message (net/core/scm.h, SCM_MAX_FD: 253)."""
_MOST_MESSAGES = 1024
"""That are looked at. The kernel lets a few hundred wait there, by their size (net.core.wmem_max)."""
_MOST_SOCKETS = 4096
"""That are taken at once: more than there are clients and listeners, those that have ended included."""
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
_SO_PEEK_OFF = 42
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Lot:
    """One pair. Raises OSError where nothing more can be put there."""

    in_flight: ClassVar[int] = 0
    """Descriptors in all lots of this process. The kernel counts them for each user (net/core/scm.c)."""

    def __init__(self, ends: Sequence[socket.socket] | None = None) -> None:
        self.entry, self.exit = ends or socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._count = 0

    def _has(self, count: int) -> None:
        Lot.in_flight += count - self._count
        self._count = count

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        """What somebody is to hold."""
        return self.entry, self.exit

    def put(self, socks: Iterable[socket.socket]) -> None:
        """Keeps them, in addition."""
        fds = [sock.fileno() for sock in socks]
        for at in range(0, len(fds), _AT_ONCE):
            send_with(self.entry, b"x", fds[at : at + _AT_ONCE], _SEND)
            self._has(self._count + len(fds[at : at + _AT_ONCE]))

    def look(self) -> list[socket.socket]:
        """Duplicates of all sockets that are there, which stay. Raises OSError where there are too many."""
        found: list[socket.socket] = []
        self.exit.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        try:
            for at, socks in enumerate(self._messages(socket.MSG_PEEK)):
                found += socks
                if len(found) > _MOST_SOCKETS or at + 1 == _MOST_MESSAGES:
                    raise OSError(errno.EOVERFLOW, "QEMU holds more for refault than refault has given it")
        except OSError:
            for sock in found:
                sock.close()
            raise
        finally:
            self.exit.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        self._has(len(found))
        return found

    def end(self) -> int:
        """Ends all that are there, for all who have them; how many there were. Raises OSError."""
        ended = 0
        for socks in self._messages(0):
            for sock in socks:
                with sock:
                    end_for_all(sock)
            ended += len(socks)
        return ended

    def empty(self) -> None:
        """Keeps none of them any more."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_MESSAGES):
                self.exit.recv(1, _RECEIVE)  # without room for descriptors: the kernel closes them
        self._has(0)

    def _messages(self, flags: int) -> Iterator[list[socket.socket]]:
        """The sockets of each message, the caller's. Raises OSError where we may not have so many."""
        for _ in range(_MOST_MESSAGES):
            try:
                _, ancillary, told, _ = self.exit.recvmsg(
                    8, socket.CMSG_SPACE(4 * (_AT_ONCE + 3)), flags | _RECEIVE
                )
            except BlockingIOError:
                return
            socks = [sock for fd in descriptors_in(ancillary) if (sock := _socket_of(fd)) is not None]
            if told & socket.MSG_CTRUNC:
                for sock in socks:
                    sock.close()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            yield socks

    def close(self) -> None:
        """Closes our ends."""
        self._has(0)
        self.entry.close()
        self.exit.close()


def _socket_of(fd: int) -> socket.socket | None:
    """Of a descriptor that is one such as clients and listeners have; another is closed."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if sock.family in _FAMILIES and sock.type == socket.SOCK_STREAM:
        return sock
    sock.close()
    return None
