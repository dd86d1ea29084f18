"""What the kernel tells of unix sockets without a connection to them (unix_diag, net/unix/diag.c)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NO_COOKIE = 0xFFFFFFFF
_UDIAG_SHOW_NAME = 1
_UDIAG_SHOW_VFS = 2
_UNIX_DIAG_NAME = 0
_UNIX_DIAG_VFS = 1
_UNIX_DIAG_PEER = 2
_UNIX_DIAG_SHUTDOWN = 6
_UDIAG_SHOW_PEER = 4
_ANY_STATE = 0xFFFFFFFF
_LISTEN = 1 << 10
"""TCP_LISTEN as a bit of the states that are asked for."""
_NLMSGHDR = struct.Struct("=IHHII")
_UNIX_DIAG_REQ = struct.Struct("=BBHIIIII")
_UNIX_DIAG_MSG_SIZE = 16
_RTATTR = struct.Struct("=HH")
_VFS = struct.Struct("=II")
_INODE = struct.Struct("=I")
_ANSWER = 64 << 10


@contextmanager
def _sock_diag() -> Iterator[socket.socket]:
    """A socket to ask at. Raises OSError where there is none to be had."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        yield netlink


def listens(where: str | bytes) -> bool:
    """Whether somebody of this network namespace listens at a unix socket's path, or at a name in the
    abstract namespace, which is bytes and begins with a zero one.

    Raises OSError where the kernel does not tell.
    """
    if isinstance(where, bytes):
        return any(name == where for name, _ in _listeners())
    try:
        status = os.stat(where)
    except (FileNotFoundError, NotADirectoryError):
        return False
    # The low half of the inode's number, and the kernel's own dev_t (linux/kdev_t.h), which is not that of
    # stat(2) on every file system.
    inode = status.st_ino & 0xFFFFFFFF
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    path = os.fsencode(where)
    return any(
        file is not None and file[0] == inode and (file[1] == device or name.rstrip(b"\0") == path)
        for name, file in _listeners()
    )


def _listeners() -> Iterator[tuple[bytes, tuple[int, int] | None]]:
    """The name of each listening unix socket, and inode and device of its file."""
    show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS
    body = _UNIX_DIAG_REQ.pack(socket.AF_UNIX, 0, 0, _LISTEN, 0, show, _NO_COOKIE, _NO_COOKIE)
    size = _NLMSGHDR.size + len(body)
    with _sock_diag() as netlink:
        netlink.send(_NLMSGHDR.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        while True:
            answer = netlink.recv(_ANSWER)
            at = 0
            while at + _NLMSGHDR.size <= len(answer):
                length, kind, *_ = _NLMSGHDR.unpack_from(answer, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR or length < _NLMSGHDR.size:
                    raise OSError(errno.EOPNOTSUPP, "the kernel does not tell of unix sockets (unix_diag)")
                name, file, shut = _about(answer[at : at + length])
                if not shut:  # it refuses everybody, whoever still holds it
                    yield name, file
                at += (length + 3) & ~3


def _about(message: bytes) -> tuple[bytes, tuple[int, int] | None, bool]:
    """Its name, its file, and whether it was shut down."""
    name, file, shut = b"", None, False
    at = _NLMSGHDR.size + _UNIX_DIAG_MSG_SIZE
    while at + _RTATTR.size <= len(message):
        length, kind = _RTATTR.unpack_from(message, at)
        value = message[at + _RTATTR.size : at + length]
        if kind == _UNIX_DIAG_NAME:
            name = value
        elif kind == _UNIX_DIAG_VFS and len(value) >= _VFS.size:
            file = _VFS.unpack_from(value)
        elif kind == _UNIX_DIAG_SHUTDOWN:
            shut = value[0] != 0
        at += max((length + 3) & ~3, _RTATTR.size)
    return name, file, shut


def peer_inode(sock: socket.socket) -> int:
    """The inode of the socket at the other side of a connected one, as /proc shows it.

    0 until that side has accepted it, or when it is gone (net/unix/diag.c, sk_diag_dump_peer). Raises OSError
    where the kernel does not tell.
    """
    with _sock_diag() as netlink:
        body = _UNIX_DIAG_REQ.pack(
            socket.AF_UNIX,
            0,
            0,
            _ANY_STATE,
            os.fstat(sock.fileno()).st_ino,
            _UDIAG_SHOW_PEER,
            _NO_COOKIE,
            _NO_COOKIE,
        )
        size = _NLMSGHDR.size + len(body)
        netlink.send(_NLMSGHDR.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        answer = netlink.recv(4096)
    if (
        len(answer) < _NLMSGHDR.size + _UNIX_DIAG_MSG_SIZE
        or _NLMSGHDR.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY
    ):
        raise OSError("the kernel does not tell of unix sockets (unix_diag)")
    at = _NLMSGHDR.size + _UNIX_DIAG_MSG_SIZE
    while at + _RTATTR.size + 4 <= len(answer):
        length, kind = _RTATTR.unpack_from(answer, at)
        if kind == _UNIX_DIAG_PEER:
            return int(_INODE.unpack_from(answer, at + _RTATTR.size)[0])
        at += max((length + 3) & ~3, _RTATTR.size)
    return 0


def peer_inode_now(sock: socket.socket) -> int:
    """The same; 0 also where it cannot be asked now, descriptors being short, say."""
    try:
        return peer_inode(sock)
    except OSError:
        return 0
