"""Who is at the other end of a unix socket (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

import trio


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a unix socket when it connected or listened; None where there is none
    to know.
    """

    pid: int | None
    uid: int | None


def peer_of(sock: socket.socket | trio.socket.SocketType) -> Peer:
    """The peer credentials. The pid of a process that our namespace does not know is None."""
    if sock.family != socket.AF_UNIX:
        return Peer(None, None)
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(pid or None, uid)
