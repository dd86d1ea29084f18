"""Who is at the other end of a connection, as the kernel has it, and whether he may speak."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass

import trio

from refault.daemon.monitor.address import host_port
from refault.qmp.access import Callers

_SO_PEERGROUPS = 59
"""linux/include/uapi/asm-generic/socket.h; since Linux 4.13."""
_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt

Socket = socket.socket | trio.socket.SocketType


@dataclass(frozen=True)
class Caller:
    """The process that connected, or listens where we connected, as it was then; over TCP only its address.

    The program's names are its own to choose (`comm`) or those of its file (`exe`): "?" where they cannot be
    read.
    """

    uid: int | None
    pid: int | None
    comm: str = "?"
    exe: str = "?"
    address: str | None = None

    def __str__(self) -> str:
        if self.uid is None:
            return self.address or "?"
        return f"uid {self.uid}, pid {self.pid or '?'}, {self.comm}, {self.exe}"


def caller_of(sock: Socket) -> Caller:
    """The process, which may have ended by now. A pid that our namespace does not know is None."""
    if sock.family != socket.AF_UNIX:
        return Caller(None, None, address=_address(sock))
    pid, uid, _ = _credentials(sock)
    return Caller(uid, pid or None, _comm(pid), _exe(pid))


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


def may_speak(sock: Socket, callers: Callers) -> bool:
    """Whether the process at the other end is one of `callers`."""
    if not callers:
        return True
    if sock.family != socket.AF_UNIX:
        return False
    return callers.admit(_credentials(sock)[1], lambda: groups_of(sock))


def _credentials(sock: Socket) -> tuple[int, int, int]:
    """Process, user and group (struct ucred)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = struct.unpack("iII", raw)
    return pid, uid, gid


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return _plain(file.read().rstrip(b"\n"))
    except OSError:
        return "?"


def _exe(pid: int) -> str:
    try:
        return _plain(os.readlink(f"/proc/{pid}/exe").encode(errors="surrogateescape"))
    except OSError:  # it is another user's
        return "?"


def _plain(name: bytes) -> str:
    """A name as it can stand in a line of the log, whatever a process calls itself."""
    text = name.decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text) or "?"


def _address(sock: Socket) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "?"
    return host_port(host, port)
