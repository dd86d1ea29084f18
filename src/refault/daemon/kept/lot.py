"""Where connections are kept while they are in nobody's hands: in flight, in the queue of a pair of sockets.

The kernel holds what was sent there for as long as somebody holds the pair (unix(7), SCM_RIGHTS), which
QEMU does: so it costs one call to keep a connection, and QEMU, which is told nothing of it, has no
descriptor more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Sequence

_AT_ONCE = 250
"""Descriptors in one message (net/core/scm.h, SCM_MAX_FD: 253)."""
_SO_PEEK_OFF = 42
_SEND = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Lot:
    """One pair. Raises OSError where nothing more can be put there."""

    def __init__(self, ends: Sequence[socket.socket] | None = None) -> None:
        self.entry, self.exit = ends or socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    @property
    def ends(self) -> tuple[socket.socket, socket.socket]:
        """What somebody is to hold."""
        return self.entry, self.exit

    def put(self, socks: Iterable[socket.socket]) -> None:
        """Keeps them, in addition."""
        fds = [sock.fileno() for sock in socks]
        for at in range(0, len(fds), _AT_ONCE):
            socket.send_fds(self.entry, [b"x"], fds[at : at + _AT_ONCE], _SEND)

    def look(self) -> list[socket.socket]:
        """Duplicates of all that are there, which stay."""
        self.exit.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        try:
            return [socket.socket(fileno=fd) for fds in self._all(socket.MSG_PEEK) for fd in fds]
        finally:
            self.exit.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)

    def empty(self) -> None:
        """Keeps none of them any more."""
        for fds in self._all(0):
            for fd in fds:
                os.close(fd)

    def _all(self, flags: int) -> Iterable[list[int]]:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, _ = self.exit.recvmsg(
                    8, socket.CMSG_SPACE(4 * (_AT_ONCE + 3)), flags | _RECEIVE
                )
                if not data:
                    return
                for level, kind, content in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        count = len(content) // 4
                        yield list(struct.unpack_from(f"{count}i", content))

    def close(self) -> None:
        """Closes our ends."""
        self.entry.close()
        self.exit.close()
