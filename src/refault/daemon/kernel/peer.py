"""Who is at the other end of a unix socket (unix(7), SO_PEERCRED and SO_PEERGROUPS)."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from dataclasses import dataclass

import trio

_SO_PEERGROUPS = 59
"""include/uapi/asm-generic/socket.h; since Linux 4.13."""
_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt

Socket = socket.socket | trio.socket.SocketType


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a unix socket when it connected or listened; None where there is none
    to know.
    """

    pid: int | None
    uid: int | None


def peer_of(sock: Socket) -> Peer:
    """The peer credentials. The pid of a process that our namespace does not know is None."""
    if sock.family != socket.AF_UNIX:
        return Peer(None, None)
    pid, uid, _ = _credentials(sock)
    return Peer(pid or None, uid)


def groups_of(sock: Socket) -> frozenset[int]:
    """The groups of the process at the other end of a unix socket, its primary one and the supplementary
    ones; where the kernel does not tell, none of these.
    """
    _, _, gid = _credentials(sock)
    size = ctypes.c_uint32(0)
    groups = ctypes.create_string_buffer(0)
    while _getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(size)):
        if ctypes.get_errno() != errno.ERANGE or size.value <= len(groups):
            return frozenset((gid,))
        groups = ctypes.create_string_buffer(size.value)
    return frozenset((gid, *struct.unpack(f"{size.value // 4}I", groups.raw[: size.value])))


def _credentials(sock: Socket) -> tuple[int, int, int]:
    """Process, user and group (struct ucred)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid
