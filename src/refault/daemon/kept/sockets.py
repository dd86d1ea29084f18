"""Sockets that a QEMU holds for us, found again in its process and taken out of it (pidfd_getfd(2)).

That needs CAP_SYS_PTRACE, or QEMU's own user where Yama lets it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from refault.daemon.host.fd_store import PREFIX
from refault.daemon.host.handed import stored
from refault.daemon.kernel.passing import descriptors_in
from refault.daemon.kernel.process import duplicate_of, sockets_of, start_of

ONE_FD = socket.CMSG_LEN(4)
"""Room for one descriptor: the kernel closes the others, as QEMU would."""
_UNREAD = 16 << 10
_SO_COOKIE = 57
"""include/uapi/asm-generic/socket.h; since Linux 4.12. Unlike an inode's number it is never used again."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """By which a socket is found again in QEMU's process, and the name by which QEMU holds it."""

    inode: int
    cookie: bytes
    name: str


def named(sock: socket.socket) -> Identity:
    """Of a socket that QEMU is to hold by a name that was never used."""
    return Identity(os.fstat(sock.fileno()).st_ino, cookie_of(sock), f"{PREFIX}{secrets.token_hex(8)}")


def end_for_all(sock: socket.socket) -> bool:
    """Ends a connection for all who hold it, or has a listening socket refuse, who waits there included.
    Whether it was one that listened.

    Descriptors that were passed there and that nobody has taken are closed: what is kept may stay for long.
    """
    listens = sock.family != socket.AF_UNIX and _listens(sock)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    if sock.family != socket.AF_UNIX:
        return listens
    try:  # nothing comes any more to what was shut down, so this ends
        while sock.recv(_UNREAD, socket.MSG_DONTWAIT):
            pass
    except OSError:
        listens = _listens(sock)
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            while listens:
                sock.accept()[0].close()
    return listens


def _listens(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def cookie_of(sock: socket.socket) -> bytes:
    """By which the kernel knows a socket. Raises OSError of what is none."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def passed_descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The descriptor in what recvmsg returned, or -1."""
    return next(iter(descriptors_in(ancillary)), -1)


class Stored:
    """What the service manager has kept for us."""

    def take(self, identity: Identity) -> socket.socket | None:
        """A duplicate of one; None where it is not there."""
        sock = stored(identity.name)
        return _checked(sock, identity) if sock is not None else None


def _checked(sock: socket.socket, identity: Identity) -> socket.socket | None:
    with contextlib.suppress(OSError):
        if cookie_of(sock) == identity.cookie:
            sock.setblocking(False)
            return sock
    sock.close()
    return None


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
        return _checked(sock, identity)


@contextmanager
def held(pid: int, started: int) -> Iterator[Held]:
    """What the process has that is `pid` and has run since `started`. Raises OSError, also where it ended."""
    process = os.pidfd_open(pid)
    try:
        if start_of(pid) != started:
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
