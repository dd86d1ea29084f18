"""Sockets that a QEMU holds for us, found again in its process and taken out of it (pidfd_getfd(2)).

That needs CAP_SYS_PTRACE, or QEMU's own user where Yama lets it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from refault.daemon.kernel.process import duplicate_of, process_started, sockets_of

ONE_FD = socket.CMSG_LEN(4)
"""Room for one descriptor: the kernel closes the others, as QEMU would."""
_SO_COOKIE = 57
"""include/uapi/asm-generic/socket.h; since Linux 4.12. Unlike an inode's number it is never used again."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """By which a socket is found again in QEMU's process, and the name by which QEMU holds it."""

    inode: int
    cookie: bytes
    name: str


def named(sock: socket.socket) -> Identity:
    """Of a socket that QEMU is to hold by a name that was never used."""
    return Identity(os.fstat(sock.fileno()).st_ino, cookie_of(sock), f"refault-kept-{secrets.token_hex(8)}")


def end_for_all(sock: socket.socket) -> None:
    """Ends a connection for all who hold it, or has a listening socket refuse, who waits there included."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            while True:
                sock.accept()[0].close()


def cookie_of(sock: socket.socket) -> bytes:
    """By which the kernel knows a socket. Raises OSError of what is none."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def passed_descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The descriptor in what recvmsg returned, or -1."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= 4:
            return int.from_bytes(data[:4], sys.byteorder, signed=True)
    return -1


class Held:
    """What one process has."""

    def __init__(self, pid: int, process: int) -> None:
        self._process = process
        self._numbers = sockets_of(pid)

    def take(self, identity: Identity) -> socket.socket | None:
        """A duplicate of one; None where it is not there. Raises OSError where that is not permitted."""
        number = self._numbers.get(identity.inode)
        if number is None:
            return None
        try:
            sock = socket.socket(fileno=duplicate_of(self._process, number))
        except OSError as error:
            if isinstance(error, PermissionError):
                raise
            return None  # closed meanwhile
        with contextlib.suppress(OSError):
            if cookie_of(sock) == identity.cookie:
                sock.setblocking(False)
                return sock
        sock.close()
        return None


@contextmanager
def held(pid: int, started: int) -> Iterator[Held]:
    """What the process has that is `pid` and has run since `started`. Raises OSError, also where it ended."""
    process = os.pidfd_open(pid)
    try:
        if process_started(pid) != started:
            raise ProcessLookupError(f"process {pid} has ended")
        yield Held(pid, process)
    finally:
        os.close(process)


def may_take(pid: int) -> None:
    """Raises OSError where descriptors of a process cannot be taken."""
    process = os.pidfd_open(pid)
    try:
        for number in sockets_of(pid).values():
            os.close(duplicate_of(process, number))
            return
    finally:
        os.close(process)
